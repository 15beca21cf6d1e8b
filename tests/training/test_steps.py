"""What a training step is told: how far its blocks reach; and that it learns all of its batches."""

import pytest
import torch
from accelerate import Accelerator
from tiny_models import tiny_model

from pardec.training.module import Drafter, MaskTokenTrainer
from pardec.training.steps import Learner, cpu_minutes, depth_at, make_schedule


def test_every_depth_has_an_equal_share_of_the_steps_and_the_last_is_the_last():
    depths = [depth_at(step, 10, [1, 2, 4, 8, 16]) for step in range(1, 11)]
    assert depths == [1, 1, 2, 2, 4, 4, 8, 8, 16, 16]


def test_shares_that_do_not_divide_the_steps_rise_once_each():
    depths = [depth_at(step, 7, [1, 2, 4]) for step in range(1, 8)]
    assert depths == sorted(depths)
    assert sorted(map(depths.count, (1, 2, 4))) == [2, 2, 3]


def test_the_last_step_trains_all_however_few_there_are():
    assert [depth_at(step, 2, [1, 2, 4, 8]) for step in (1, 2)] == [2, 8]
    assert depth_at(1, 1, [1, 2]) == 2


def test_without_growth_every_step_trains_all_mask_tokens():
    assert [depth_at(step, 3, None) for step in (1, 2, 3)] == [None] * 3


@pytest.mark.parametrize("anchors_per_forward", [None, 2])
def test_every_batch_of_a_step_has_all_of_its_own_anchors(anchors_per_forward):
    trainer = MaskTokenTrainer(tiny_model("llama"), Drafter(2))
    parameters = {name: p for name, p in trainer.named_parameters() if p.requires_grad}
    ids = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(0))
    whole = {"input_ids": ids, "loss_mask": torch.ones_like(ids, dtype=torch.bool)}
    few, many = ({**whole, "anchors": torch.arange(N).expand(2, -1)} for N in (2, 7))

    def rows_of(batches) -> int:
        frozen = torch.optim.SGD(parameters.values(), lr=0.0)
        learner = Learner(
            Accelerator(cpu=True), trainer, parameters, frozen, make_schedule(frozen, 0, 10, 0), 0,
            anchors_per_forward, 1.0,
        )  # fmt: skip
        return int(learner.update(batches, 1, with_metrics=False)[0][-1, 0])

    assert rows_of([few, many]) == rows_of([many, few]) == 2 * 2 * (2 + 7)


def test_cpu_minutes_are_those_of_all_processes_and_of_what_the_run_goes_on_from(monkeypatch):
    monkeypatch.setattr("time.process_time", lambda: 120.0)
    assert cpu_minutes(1.5, num_processes=4) == 9.5
