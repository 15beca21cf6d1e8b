"""Every shipped recipe is read without complaint and names the command that uses it."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

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


@pytest.mark.parametrize("machines", [1, 4])
def test_launcher_configurations_are_what_their_names_say(machines):
    """And are read without complaint by accelerate itself."""
    path = RECIPES[0].parent / f"accelerate/{machines}x8.yaml"
    config = load_config_from_file(str(path))
    assert (config.num_machines, config.num_processes) == (machines, machines * 8)
    assert config.distributed_type == "MULTI_GPU"
    command = path.read_text().split("\n")[0]
    assert command.startswith(f"# accelerate launch --config_file recipes/accelerate/{path.name} ")
    assert "train/train_adapter.py recipes/" in command


def test_there_are_recipes():
    assert {"quickstart.yaml", "quickstart_embeddings.yaml"} <= {path.name for path in RECIPES}
