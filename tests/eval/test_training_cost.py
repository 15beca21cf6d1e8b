"""What a slot of training costs: forms beside ours are the steps that they are said to be, and are counted right."""

import json

import pytest
import torch
import training_cost
from programs import run
from timing import shapes
from timing.pard_forward import PardForward
from timing.training_ways import (
    CHECKPOINTED,
    DENSE_JOINT,
    PARD,
    PARDEC,
    Dropping,
    batch_of,
    build_ways,
    measure_in_turn,
)

from pardec.config.train_section import default_anchors
from pardec.layout import nested_block_lengths
from pardec.training.module import METRICS, Drafter, MaskTokenTrainer
from pardec.training.objective import Objective
from pardec.training.running.processes import make_accelerator

B, T, K = 2, 12, 3
SIZES = {"batch_size": B, "length": T, "anchors": 5, "seed": 1}


def tiny(dtype=torch.float64):
    return shapes.random_model(shapes.config_of("tiny"), torch.device("cpu"), dtype, seed=0)


def ways():
    accelerator = make_accelerator("no")
    options = {"lora_rank": 2, "full": K, "dropped": 4, "dropping": Dropping(0.7, 0.2), "checkpointing": 0.5}
    return build_ways(accelerator, tiny(), **options, num_steps=8, seed=0)


def batch():
    generator = torch.Generator().manual_seed(2)
    return {
        "input_ids": torch.randint(512, (B, T), generator=generator),
        "loss_mask": torch.rand(B, T, generator=generator) < 0.8,
        "anchors": torch.rand(B, T, generator=generator).argsort(),
    }


def test_the_segments_of_pard_have_the_losses_of_the_model_itself_and_of_mask_tokens_behind_every_position():
    base = tiny()
    pard = PardForward(base, K)
    torch.nn.init.normal_(pard.mask_embedding, generator=torch.Generator().manual_seed(3))
    loss, count, metrics = pard(**batch())
    trainer = MaskTokenTrainer(base, Drafter(K - 1, mask_sharing="shared"), Objective("cross_entropy"))
    trainer.mask_embeddings = pard.mask_embedding
    _, _, of_masks = trainer(**batch())
    ids, kept = batch()["input_ids"], batch()["loss_mask"][:, 1:]
    own = torch.nn.functional.cross_entropy(base(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(metrics[1, 0], (own * kept).sum().float())
    torch.testing.assert_close(metrics[:2, 1:], of_masks[:2, :])
    assert float(metrics[0, 0]) == int(kept.sum())
    torch.testing.assert_close(metrics[1].sum(), loss.detach().float())
    assert int(count) == int(metrics[0].sum())
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in pard.parameters())


def test_dropped_segments_of_pard_keep_the_shares_of_its_paper():
    pard = PardForward(tiny(), 4, keep_ratio=0.7, keep_floor=0.4)
    rows = pard(**batch() | {"loss_mask": torch.ones(B, T, dtype=torch.bool)})[2][METRICS.index("rows")]
    lengths = nested_block_lengths(T, 4, 0.7, 0.4)
    order, expected = batch()["anchors"].tolist(), [0, 0, 0, 0]
    for sequence in order:
        for anchor, length in zip(sequence, lengths, strict=True):
            for depth in range(length):
                expected[depth] += anchor + depth + 1 < T
    assert rows.tolist() == expected
    assert pard.num_mask_rows(T) == sum(lengths) - T


def test_the_dense_joint_form_has_the_loss_of_ours_and_a_way_counts_the_rows_that_have_targets():
    found = ways()
    assert [(way.form, way.learned, way.num_speculative_tokens) for way in found] == [
        (PARDEC, "LoRA r 2", K), (DENSE_JOINT, "LoRA r 2", K), (CHECKPOINTED, "LoRA r 2", K),
        (PARDEC, "embeddings", K), (DENSE_JOINT, "embeddings", K), (CHECKPOINTED, "embeddings", K),
        (PARDEC, "LoRA r 2", 4), (PARD, "all weights", K), (PARD, "all weights", 4),
    ]  # fmt: skip
    for way in found:
        for name, values in way.module.named_parameters():
            if "lora_B" in name or "mask_embedding" in name:  # which start at 0 and where a draft is right
                torch.nn.init.normal_(values, std=0.3, generator=torch.Generator().manual_seed(4))
    sums = [torch.stack(way.learner.wrapped(**batch_of(way, **SIZES))[:2]).detach() for way in found]
    for other, ours in ((1, 0), (2, 0), (4, 3), (5, 3)):
        torch.testing.assert_close(sums[other], sums[ours], rtol=1e-5, atol=0)
    assert not torch.allclose(sums[0], sums[3], rtol=0.1)  # the LoRA is on in the first three alone
    costs = measure_in_turn(found, [batch_of(way, **SIZES) for way in found], repetitions=2)
    assert [cost.slots for cost in costs] == [int(one[1]) for one in sums]
    assert all(len(cost.seconds) == len(cost.cpu_seconds) == 2 for cost in costs)
    (short,) = measure_in_turn(found[3:4], [batch_of(found[3], **SIZES)], repetitions=9, most_seconds=0)
    assert len(short.seconds) == 1
    assert costs[1].peak_bytes > costs[0].peak_bytes > costs[2].peak_bytes
    # gradients of all weights are among what its step makes
    assert costs[7].peak_bytes > sum(p.numel() * p.element_size() for p in found[7].module.parameters())


def test_the_table_has_every_way_at_every_length_beside_ours(tmp_path):
    ended = run(training_cost.main, "--quick", "--most-rows", 100, "--output", tmp_path / "found")
    assert ended.code == 0, ended.err
    rows = ended.result["rows"]
    assert [row["length"] for row in rows] == [16] * 9 + [32] * 7
    assert {row["anchors"] for row in rows if row["form"] != PARD} == {default_anchors(16), default_anchors(32)}
    for row in rows:
        assert row["slots"] <= row["mask_rows"] + (row["batch_size"] * row["length"] if row["form"] == PARD else 0)
        assert row["cpu_us_per_slot"] > 0
        if row["form"] == PARDEC:
            assert row["ratio_to_pardec"] == row["memory_ratio_to_pardec"] == 1
    left = ended.result["left_out"]
    assert left == ["T = 32, PARD, all weights, K = 4: 128 rows in a forward", *left[1:]]
    assert len(left) == 2
    page = (tmp_path / "found.md").read_text()
    assert page.count("| dense joint |") == 4
    assert "left out: T = 32, PARD" in page
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_stays_where_a_longer_length_is_cut_off(tmp_path, monkeypatch):
    measure = training_cost.measure

    def cut_off(args, found, length):
        if length == 32:
            raise ValueError("cut off")
        return measure(args, found[:2], length)

    monkeypatch.setattr(training_cost, "measure", cut_off)
    assert "cut off" in run(training_cost.main, "--quick", "--output", tmp_path / "found").error
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [(row["length"], row["form"]) for row in rows] == [(16, PARDEC), (16, DENSE_JOINT)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--lengths", "0"), "lengths: expected integers >= 1"),
        (("--anchors", "17"), "anchors: expected 1 to 16, the shortest length, found 17"),
        (("--dropped", "65"), "dropped: expected 1 to 64, found 65"),
        (("--repetitions", "0"), "repetitions: expected an integer >= 1, found 0"),
    ],
)
def test_bad_input_is_told_in_one_line(options, said):
    assert said in run(training_cost.main, "--quick", *options).error
