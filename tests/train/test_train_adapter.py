"""Parts of an adapter's training: what a continued run must find again."""

import pytest
import torch
from accelerate import Accelerator
from tiny_models import tiny_model

from pardec.adapters.gated_lora import inject_lora
from pardec.training.module import Drafter, MaskTokenTrainer
from pardec.training.steps import Learner, make_schedule
from pardec.training.warm_start import check_source

K, T = 3, 20


def test_a_step_draws_the_same_noise_in_a_run_that_is_continued():
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
        learner = Learner(
            Accelerator(cpu=True), trainer, parameters, frozen, make_schedule(frozen, 0, 10, 0), seed, None, 1.0
        )
        sums, norm = learner.update([batch], step, with_metrics=False)
        assert norm > 0
        return float(sums[-2, 0])

    torch.manual_seed(1)
    first = loss(step=5, seed=0)
    torch.manual_seed(2)
    assert loss(step=5, seed=0) == first
    assert len({first, loss(step=6, seed=0), loss(step=5, seed=1)}) == 3


def test_a_run_is_not_continued_on_another_source_than_it_began_with():
    """Frozen parts are read from there at every start."""
    before = {"lora/adapter_model.safetensors": "1234"}
    check_source("runs/distilled", before, dict(before))
    check_source(None, None, None)
    with pytest.raises(ValueError, match=r"^adapter\.start_from .*distilled: expected the adapter that this run began"):
        check_source("runs/distilled", before, {"lora/adapter_model.safetensors": "5678"})
