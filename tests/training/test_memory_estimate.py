"""What training is said to take, against what it takes: every allocation of full steps counted."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model

from pardec.training.live_bytes import LiveBytes
from pardec.training.memory import learned_bytes, measure_step
from pardec.training.memory_fit import GIB, check_fits, fit_step, free_bytes
from pardec.training.module import Drafter, MaskTokenTrainer
from pardec.training.objective import Objective
from pardec.training.peft_lora import inject_lora
from pardec.training.prefix_memory import measure_slices
from pardec.training.prefix_pass import run_prefix

# family, changes of its sizes, LoRA rank, head width, B, T, N: many mask rows, long sequences, a large vocabulary
SHAPES = {
    "rows": ("llama", {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 8}, 4, 0, 2, 128, 120),
    "length": ("llama", {"num_hidden_layers": 6}, 0, 0, 2, 1024, 8),
    "vocabulary": ("qwen3", {"vocab_size": 8192}, 4, 16, 2, 96, 80),
    "all scores": ("llama-eager", {}, 4, 0, 2, 160, 40),
}
K = 4


def trainer_of(family, changes, rank, head_width) -> MaskTokenTrainer:
    base = tiny_model(family, dtype=torch.float32, **{"max_position_embeddings": 2048, **changes})
    if rank:
        inject_lora(base, r=rank, alpha=2 * rank, target_modules="all-linear")
    drafter = Drafter(K, has_lora=rank > 0, head_width=head_width)
    return MaskTokenTrainer(base, drafter, Objective("kl", "expected_length"))


def peak_of_step(trainer: MaskTokenTrainer, B: int, T: int, N: int) -> int:
    """Bytes beside the weights, the learned numbers and their gradients."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(trainer.target.vocab_size, (B, T), generator=generator)
    anchors = torch.rand(B, T - 1, generator=generator).argsort()[:, :N]
    for parameter in trainer.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    counted = LiveBytes()
    counted.leave_out([*trainer.parameters(), *trainer.buffers()])
    counted.leave_out([p.grad for p in trainer.parameters() if p.grad is not None])
    with counted:
        loss, _, _ = trainer(ids, torch.ones_like(ids, dtype=torch.bool), anchors)
        loss.backward()
    return counted.peak


@pytest.mark.parametrize("checkpointing", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", SHAPES)
def test_the_estimate_is_within_15_percent_of_what_a_step_takes(name, checkpointing):
    *what, B, T, N = SHAPES[name]
    trainer = trainer_of(*what)
    trainer.run_layers_twice(checkpointing)
    measured, peak = measure_step(trainer), peak_of_step(trainer, B, T, N)
    found = measured.bytes_for(B, T, B * N * K)
    # counted as if they were alive together with the widest rows of a layer, which they are not where all run twice
    scores = min(measured.most_scores, measured.scores * T * B * N * K) if checkpointing == 1 else 0
    assert 0.85 * peak <= found <= 1.15 * peak + scores


def test_measuring_leaves_the_module_as_it_was():
    trainer = trainer_of("llama", {}, 4, 8)
    before = {name: p.clone() for name, p in trainer.named_parameters()}
    state, most_rows = torch.get_rng_state(), trainer.most_rows
    measure_step(trainer)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.most_rows == most_rows
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in trainer.named_parameters())


def test_a_storage_is_counted_once_and_until_it_is_gone():
    with LiveBytes() as counted:
        one = torch.zeros(100)
        view = one[10:].view(9, 10)
        two = one + 1
        assert counted.live == 800
        del one, view
        assert counted.live == 400
    assert counted.peak == 800
    assert two.shape == (100,)
    assert learned_bytes(3) == 48


def test_a_run_that_takes_more_than_is_free_is_refused_with_the_setting_that_fits():
    needed = {64: 40 * 2**30, 32: 20 * 2**30, 8: 5 * 2**30}
    check_fits(needed, 2**30, 41 * 2**30, batch_size=4)
    with pytest.raises(
        ValueError,
        match=r"at most 22.00 GiB .* found an estimate of 41.00 GiB with 64 anchors a "
        r"forward; train.anchors_per_forward=32 would fit",
    ):
        check_fits(needed, 2**30, 22 * 2**30, batch_size=4)
    with pytest.raises(ValueError, match=r"not even one anchor at a time fits; lower train.batch_size, here 4"):
        check_fits(needed, 2**30, 2**30, batch_size=4)
    with pytest.raises(ValueError, match=r"; train.anchors_per_forward=32 or train.gradient_checkpointing=1 would fit"):
        check_fits(needed, 2**30, 22 * 2**30, batch_size=4, checkpointed=21 * 2**30)


def test_checkpointing_is_named_where_it_lets_a_run_fit():
    trainer = trainer_of(*SHAPES["rows"][:4])
    rows, sizes = {120: 2 * 120 * K, 1: 2 * K}, {"batch_size": 2, "num_tokens": 128, "learned": 0}
    _, of_step = fit_step(trainer, rows, **sizes, free=2**40)
    with pytest.raises(ValueError, match=r"train.anchors_per_forward=1 or train.gradient_checkpointing=1 would fit"):
        fit_step(trainer, rows, **sizes, free=of_step // 2)
    assert not trainer.mask_pass.run_twice
    trainer.run_layers_twice(1.0)
    _, checkpointed = fit_step(trainer, rows, **sizes, free=of_step // 2)
    assert checkpointed < of_step // 2


LONG = {"max_position_embeddings": 2048}
# windows far shorter than the sequence are made a mask of; eager attention makes all scores at once
PREFIXES = {
    "llama": ({**LONG, "num_hidden_layers": 6}, 2, 1024),
    "llama-eager": (LONG, 2, 512),
    "gemma3-mixed-windows": ({**LONG, "sliding_window": 128, "hidden_size": 96, "intermediate_size": 384}, 1, 768),
    "phi3-window": ({**LONG, "sliding_window": 128}, 1, 768),
}


@pytest.mark.parametrize("num_slices", [1, 4])
@pytest.mark.parametrize("family", PREFIXES)
def test_the_estimate_of_the_pass_over_real_tokens_knows_masks_scores_and_slices(family, num_slices):
    changes, B, T = PREFIXES[family]
    trainer = trainer_of(family, changes, 0, 0)
    ids = torch.randint(trainer.target.vocab_size, (B, T))
    counted = LiveBytes()
    counted.leave_out([*trainer.parameters(), *trainer.buffers()])
    with counted:
        run_prefix(trainer.own_head, ids, num_slices)
    measured = measure_step(trainer).prefix if num_slices == 1 else measure_slices(trainer.own_head)
    assert measured.bytes_for(B, T, num_slices) == pytest.approx(counted.peak, rel=0.15)


def test_the_pass_over_real_tokens_is_cut_only_as_far_as_it_must_be():
    trainer = trainer_of("llama-eager", {"max_position_embeddings": 4096, "num_attention_heads": 8}, 0, 0)
    sizes = {"batch_size": 2, "num_tokens": 2048, "learned": 1000}
    whole, of_step = fit_step(trainer, {8: 8 * K}, **sizes, free=2**40)
    assert whole == 1
    slices = measure_slices(trainer.own_head)
    for num_slices in (2, 8, 32):
        free = 1000 + slices.bytes_for(2, 2048, num_slices)
        assert fit_step(trainer, {8: 8 * K}, **sizes, free=free) == (num_slices, free - 1000)
        assert free < of_step
    with pytest.raises(ValueError, match=r"not even one anchor at a time fits; lower train\.batch_size, here 2"):
        fit_step(trainer, {8: 8 * K}, **sizes, free=slices.bytes_for(2, 2048, 64))


def test_processes_that_share_a_machine_share_what_is_free_on_it(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=8 * GIB))
    assert free_bytes(torch.device("cpu")) == 8 * GIB
    assert free_bytes(torch.device("cpu"), 4) == 2 * GIB
