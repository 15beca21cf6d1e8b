"""The training benchmark: the dense form is the same step, and what is timed and counted is said right."""

import pytest
import torch
import training
from programs import run
from timing import shapes
from timing.joint_forward import JointForward

from pardec.training.memory import learned_bytes, measure_step
from pardec.training.module import Drafter, MaskTokenTrainer
from pardec.training.objective import Objective
from pardec.training.peft_lora import inject_lora
from pardec.training.running.processes import make_accelerator

B, T, N, K = 2, 16, 3, 2


def trainer_of(rank: int) -> MaskTokenTrainer:
    base = shapes.random_model(shapes.config_of("tiny"), torch.device("cpu"), torch.float32, seed=0)
    if rank:
        inject_lora(base, r=rank, alpha=2 * rank, target_modules="all-linear")
        for name, values in base.named_parameters():
            if "lora_B" in name:  # which start at 0, and then nothing reaches the other half
                torch.nn.init.normal_(values, std=0.3, generator=torch.Generator().manual_seed(1))
    trainer = MaskTokenTrainer(base, Drafter(K, has_lora=rank > 0), Objective(weights="expected_length"))
    assert trainer.mask_embeddings is not None
    torch.nn.init.normal_(trainer.mask_embeddings, generator=torch.Generator().manual_seed(2))
    return trainer


def loss_and_gradients(form, trainer: MaskTokenTrainer, **part):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(512, (B, T), generator=generator)
    kept = torch.rand(B, T, generator=generator) < 0.8
    anchors = torch.tensor([[0, 13, 6], [15, 2, 14]])  # blocks beyond the end too
    trainer.zero_grad()
    loss, count, _ = form(ids, kept, anchors, **part)
    loss.backward()
    found = {name: p.grad.clone() for name, p in trainer.named_parameters() if p.grad is not None}
    return loss.detach(), count, found


@pytest.mark.parametrize("rank", [0, 4])
def test_the_dense_form_has_the_same_loss_and_gradients(rank):
    trainer = trainer_of(rank)
    expected_loss, expected_count, expected = loss_and_gradients(trainer, trainer)
    loss, count, found = loss_and_gradients(JointForward(trainer), trainer)
    assert loss == pytest.approx(float(expected_loss), rel=1e-4)
    assert count == expected_count > 0
    assert set(found) == set(expected)
    assert len(found) == 1 + 2 * 14 * (rank > 0)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_parts_of_the_anchors_add_up_to_the_whole_and_the_lora_is_off_again():
    trainer = trainer_of(4)
    joint = JointForward(trainer)
    whole, *_ = loss_and_gradients(joint, trainer)
    parts = [loss_and_gradients(joint, trainer, first_anchor=at, num_anchors=1)[0] for at in range(N)]
    assert sum(map(float, parts)) == pytest.approx(float(whole), rel=1e-4)
    halves = [part for name, part in trainer.base.named_modules() if name.endswith("lora_B.default")]
    assert halves
    assert not any(half._forward_hooks for half in halves)
    assert all(layer.disable_adapters for layer in trainer.base.modules() if hasattr(layer, "disable_adapters"))


@pytest.fixture
def small(monkeypatch):
    """Sequences so short that a step is nothing."""
    monkeypatch.setattr(training, "QUICK", {"batch_size": 1, "length": 12, "anchors": 2, "repetitions": 1})


@pytest.mark.usefixtures("small")
def test_both_forms_take_turns_and_the_estimate_is_that_of_training(tmp_path):
    ended = run(training.main, "--quick", "--lora-rank", "2", "--output", tmp_path / "found")
    assert ended.code == 0, ended.err
    rows = ended.result["rows"]
    forms = (training.PREFIX_CACHED, training.DENSE_JOINT)
    assert [(row["learned"], row["form"]) for row in rows] == [
        (learned, form) for learned in ("embeddings", "LoRA r 2") for form in forms
    ]
    assert all(row["ms_per_step"] > 0 and row["peak_memory_gib"] is None for row in rows)
    assert [row["ratio_to_prefix_cached"] for row in rows[::2]] == [1.0, 1.0]
    trainer = trainer_of(2)
    weights = sum(p.numel() * p.element_size() for p in trainer.base.parameters() if not p.requires_grad)
    numbers = 4 * 64 + sum(p.numel() for name, p in trainer.named_parameters() if "lora_" in name)
    assert rows[2]["num_learned"] == numbers
    trainer = MaskTokenTrainer(trainer.base, Drafter(4, has_lora=True), Objective(weights="expected_length"))
    with make_accelerator("auto").autocast():
        expected = weights + learned_bytes(numbers) + measure_step(trainer).bytes_for(1, 12, 8)
    assert rows[2]["estimate_gib"] == pytest.approx(expected / 2**30, rel=1e-3)
    page = (tmp_path / "found.md").read_text()
    assert page.count("| dense joint |") == 2
    assert "estimate GiB" in ended.out


@pytest.mark.usefixtures("small")
def test_a_form_that_does_not_fit_is_left_out_and_the_other_is_measured(tmp_path, monkeypatch):
    def too_much(self, *args, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(JointForward, "forward", too_much)
    ended = run(training.main, "--quick", "--output", tmp_path / "found")
    assert ended.code == 0, ended.err
    assert {row["form"] for row in ended.result["rows"]} == {training.PREFIX_CACHED}
    assert [one["form"] for one in ended.result["left_out"]] == [training.DENSE_JOINT] * 2
    assert "left out: embeddings, dense joint: it does not fit" in (tmp_path / "found.md").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--shape", "huge"), "shape: expected one of tiny"),
        (("--anchors", "100"), "anchors: expected at most 64, the length, found 100"),
        (("--num-speculative-tokens", "65"), "num_speculative_tokens: expected at most 64, found 65"),
        (("--repetitions", "0"), "repetitions: expected an integer >= 1, found 0"),
    ],
)
def test_bad_input_is_told_in_one_line(options, said):
    assert said in run(training.main, "--quick", *options).error
