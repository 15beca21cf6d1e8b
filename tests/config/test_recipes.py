"""Every shipped recipe is read without complaint and names the command that uses it."""

from pathlib import Path

import pytest

from pardec.config.adapter_recipe import Recipe
from pardec.config.pretrain_recipe import PretrainRecipe
from pardec.config.recipe_files import load_recipe
from pardec.config.responses_recipe import ResponsesRecipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
# by the first word of a recipe's name, all others being adapters
SCRIPTS = {"pretrain": ("pretrain_base.py", PretrainRecipe), "responses": ("generate_responses.py", ResponsesRecipe)}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_loads_and_shows_its_command(path):
    script, model = SCRIPTS.get(path.name.partition("_")[0], ("train_adapter.py", Recipe))
    load_recipe(path, (), model)
    header = path.read_text().split("\n\n")[0]
    assert f"accelerate launch train/{script} recipes/{path.name}" in header


def test_there_are_recipes():
    assert {"quickstart.yaml", "quickstart_embeddings.yaml"} <= {path.name for path in RECIPES}
