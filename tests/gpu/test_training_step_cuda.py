"""A step of training on a CUDA device against the same on a CPU; run with `pytest -m gpu`."""

import pytest
import torch
from tiny_models import tiny_model

from pardec.training.module import Drafter, MaskTokenTrainer
from pardec.training.objective import Objective
from pardec.training.peft_lora import inject_lora

pytestmark = pytest.mark.gpu
B, T, N, K = 2, 48, 8, 3


@pytest.fixture(autouse=True)
def exact_matrix_products():
    torch.backends.cuda.matmul.allow_tf32 = False


def found_on(device: str, objective: str, *, autocast: bool) -> list[torch.Tensor]:
    """Loss, metrics and gradients of one step, on the CPU."""
    base = tiny_model("llama", dtype=torch.float32)
    inject_lora(base, r=2, alpha=4, target_modules="all-linear")
    trainer = MaskTokenTrainer(base, Drafter(K, has_lora=True), Objective(objective, "expected_length"))
    generator = torch.Generator().manual_seed(1)
    for parameter in trainer.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    trainer = trainer.to(device)
    batch = {
        "input_ids": torch.randint(61, (B, T), generator=generator),
        "loss_mask": torch.rand(B, T, generator=generator) < 0.8,
        "anchors": torch.rand(B, T, generator=generator).argsort()[:, :N],
    }
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss, _, metrics = trainer(**{name: one.to(device) for name, one in batch.items()}, with_metrics=True)
    loss.backward()
    return [loss.detach().cpu(), metrics.cpu(), *(p.grad.cpu() for p in trainer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("objective", ["kl", "lk_hybrid", "cross_entropy_argmax"])
def test_losses_metrics_and_gradients_are_those_of_a_cpu(objective):
    expected = found_on("cpu", objective, autocast=False)
    found = found_on("cuda", objective, autocast=False)
    assert len(found) > 3
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def test_under_autocast_the_loss_stays_near_and_gradients_are_finite():
    exact, found = (found_on("cuda", "kl", autocast=autocast) for autocast in (False, True))
    torch.testing.assert_close(found[0], exact[0], rtol=0.1, atol=0.0)
    assert all(bool(one.isfinite().all()) for one in found)
