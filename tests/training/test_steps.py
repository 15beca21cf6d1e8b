"""What a training step is told: how far its blocks reach."""

from pardec.training.steps import depth_at


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
