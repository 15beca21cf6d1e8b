"""Every shipped recipe is read without complaint and names the command that uses it."""

from pathlib import Path

import pytest

from pardec.config import load_recipe
from pardec.pretrain_config import PretrainRecipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_loads_and_shows_its_command(path):
    pretrains = path.name.startswith("pretrain_")
    load_recipe(path, model=PretrainRecipe) if pretrains else load_recipe(path)
    script = "pretrain_base.py" if pretrains else "train_adapter.py"
    header = path.read_text().split("\n\n")[0]
    assert f"accelerate launch train/{script} recipes/{path.name}" in header


def test_there_are_recipes():
    assert {"quickstart.yaml", "quickstart_embeddings.yaml"} <= {path.name for path in RECIPES}
