"""Parts of the training script: what a continued run must find again."""

import importlib.util
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tiny_models import tiny_model

from pardec.adapters.gated_lora import inject_lora
from pardec.config.adapter_recipe import Recipe
from pardec.config.recipe_files import load_recipe
from pardec.training.module import Drafter, MaskTokenTrainer

ROOT = Path(__file__).parents[2]
K, T = 3, 20


@pytest.fixture(scope="module")
def script():
    """train/train_adapter.py as a module."""
    spec = importlib.util.spec_from_file_location("train_adapter", ROOT / "train" / "train_adapter.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recipe(name: str, *overrides: str):
    sizes = ("train.batch_size=2", "train.anchors_per_sequence=4", f"adapter.num_speculative_tokens={K}")
    return load_recipe(ROOT / "recipes" / f"{name}.yaml", [*sizes, *overrides], Recipe)


def test_a_step_draws_the_same_noise_in_a_run_that_is_continued(script):
    """So the loss of a step depends on the step, not on how often the run was started."""
    model = tiny_model("llama")
    torch.manual_seed(7)
    inject_lora(model, r=2, alpha=4, target_modules="all-linear")
    trainer = MaskTokenTrainer(model, Drafter(K, has_lora=True, draft_input="uniform_noise"))
    parameters = {name: p for name, p in trainer.named_parameters() if p.requires_grad}
    batch = {
        "input_ids": torch.randint(0, 61, (2, T)),
        "loss_mask": torch.ones(2, T, dtype=torch.bool),
        "anchors": torch.stack([torch.randperm(T - 2)[:4] for _ in range(2)]),
    }

    def loss(step: int, seed: int) -> float:
        frozen = torch.optim.SGD(parameters.values(), lr=0.0)
        told = recipe("tiny_python_noise", f"train.seed={seed}")
        sums, norm = script.optimiser_step(told, Accelerator(cpu=True), trainer, parameters, frozen, [batch], step)
        assert norm > 0
        return float(sums[-2, 0])

    torch.manual_seed(1)
    first = loss(step=5, seed=0)
    torch.manual_seed(2)
    assert loss(step=5, seed=0) == first
    assert len({first, loss(step=6, seed=0), loss(step=5, seed=1)}) == 3


def test_a_run_is_not_continued_on_another_source_than_it_began_with(script):
    """Frozen parts are read from there at every start."""
    told = recipe("tiny_python_head")
    before = {"lora/adapter_model.safetensors": "1234"}
    script.check_source(told, {"best": 1.0, "started_from": before}, dict(before))
    script.check_source(recipe("quickstart"), {"best": 1.0}, None)
    with pytest.raises(ValueError, match=r"^adapter\.start_from .*distilled: expected the adapter that this run began"):
        script.check_source(told, {"best": 1.0, "started_from": before}, {"lora/adapter_model.safetensors": "5678"})
