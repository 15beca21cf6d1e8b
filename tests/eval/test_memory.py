"""Memory of training: every figure at the top of a recipe is the one that is estimated, within its card."""

import memory
import pytest
from matrix.published_sizes import PUBLISHED, published_model
from programs import run

from pardec.config.adapter_recipe import Recipe
from pardec.config.recipe_files import load_recipe

# as their publishers state them, in billions
PARAMETERS = {
    "Qwen/Qwen3-0.6B": 0.6, "Qwen/Qwen3-8B": 8.2, "meta-llama/Llama-3.2-1B-Instruct": 1.23,
    "HuggingFaceTB/SmolLM3-3B": 3.08, "google/gemma-3-270m-it": 0.27, "google/gemma-3-4b-it": 4.3,
    "mistralai/Mistral-7B-Instruct-v0.3": 7.25, "microsoft/Phi-4-mini-instruct": 3.8, "openai/gpt-oss-20b": 20.9,
}  # fmt: skip


@pytest.mark.parametrize("path", memory.RECIPES, ids=lambda path: path.stem)
def test_recipes_state_what_is_estimated_and_fit_their_cards(path):
    launches = memory.launches_of(path)
    assert {launch.card_gb for launch in launches} == ({80} if path.stem == "gpt_oss_20b" else {24, 80})
    for launch in launches:
        found = memory.estimate(load_recipe(path, launch.overrides, Recipe))
        assert f"{found.total_gib:.1f}" == f"{launch.stated_gib:.1f}", launch
        assert found.weights_gib < found.total_gib < memory.ROOM * launch.card_gb


def test_every_published_model_has_its_commands():
    assert {launch.base for path in memory.RECIPES for launch in memory.launches_of(path)} == set(PUBLISHED)


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes_have_as_many_parameters_as_their_publishers_state(name):
    count = sum(p.numel() for p in published_model(name).parameters()) / 1e9
    assert count == pytest.approx(PARAMETERS[name], rel=0.02)


def test_a_figure_that_is_not_the_estimate_is_told(tmp_path):
    text = (memory.ROOT / "recipes/gemma3.yaml").read_text()
    first = next(line for line in text.splitlines() if line.startswith("# 24 GB"))
    stated = first.split()[3]
    path = tmp_path / "gemma3.yaml"
    lines = [line for line in text.splitlines() if not line.startswith("# ")]
    path.write_text("\n".join([first.replace(f"{stated} GiB", "99.9 GiB"), *lines]))
    ended = run(memory.main, path)
    assert ended.code == 1
    assert ended.result["rows"][0]["verdict"] == "states 99.9"
    path.write_text("\n".join([first.replace("gemma3.yaml", "qwen3.yaml"), *lines]))
    assert (
        "gemma3.yaml: expected commands with recipes/gemma3.yaml, found recipes/qwen3.yaml"
        in run(memory.main, path).error
    )
    path.write_text("\n".join(lines))
    assert (
        "gemma3.yaml: expected commands that begin '# 24 GB, 1.0 GiB: accelerate launch'"
        in run(memory.main, path).error
    )


def test_checkpointing_lowers_what_a_step_is_estimated_to_take():
    (path,) = (path for path in memory.RECIPES if path.stem == "gemma3")
    overrides = memory.launches_of(path)[0].overrides
    found = [
        memory.estimate(load_recipe(path, [*overrides, f"train.gradient_checkpointing={share}"], Recipe))
        for share in (0, 0.5, 1)
    ]
    assert found[0].total_gib > found[1].total_gib > found[2].total_gib > found[2].weights_gib
    assert found[0].weights_gib == found[1].weights_gib
