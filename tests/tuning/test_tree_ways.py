"""Trees among the ways that tuning measures, on a machine whose cost is known and whose texts have known ranks."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from pardec.draft_tree import DraftTree, DynamicTree
from pardec.tuning.choice import PLAIN_WAY, TREES, Way, tree_way
from pardec.tuning.dynamic_trees import DrawnTexts
from pardec.tuning.measuring import Effort, max_calls, measure
from pardec.tuning.timing import Call
from pardec.tuning.tree_replay import RankReplay
from pardec.tuning.tree_ways import TreeWays

K, NEW, PREFILL_SECONDS = 3, 100, 0.02
EFFORT = Effort(num_shapes=4, num_batches=2, num_finalists=3, repetitions=2, num_trees=3, copy_tokens=())


def text(seed: int) -> np.ndarray:
    """Ranks at 140 places, the first guess right at four of ten."""
    draw = random.Random(seed)
    return np.array([[min(int(draw.expovariate(0.5)), 20) for _ in range(K)] for _ in range(140)])


def drawn(ranks: np.ndarray, better: float = 1.0) -> np.ndarray:
    """Rows in drawn trees that are such ranks' doing: each depth follows the one before it, likelier paths first."""
    places = np.cumprod(1 + np.minimum(ranks, 20), axis=1)  # of paths, the likeliest having one
    rows = np.ceil(places / better + np.arange(K)).astype(int)
    lengths = np.arange(1, K + 1)
    return np.where(np.arange(K) < lengths[:, None], rows[:, None], 0)


class Machine:
    """Decodes by walking texts with known ranks; a step takes as long as a formula of its rows says.

    Of two steps with copied tokens beside a tree the first is one whose copies bring what the second would have.
    """

    def __init__(self, seconds_per_row: float, batch_size: int = 1, seconds_of_trees: float = 0.0, better: float = 1.0):
        self.seconds_per_row, self.batch_size, self.seconds_of_trees = seconds_per_row, batch_size, seconds_of_trees
        self.num_calls, self.better, self.kinds = 0, better, set()

    def step_seconds(self, way: Way) -> float:
        forwards = 2 if way.mode == "two_pass" else 1
        slower = self.seconds_of_trees if way.tree is not None else 0.0
        return 0.01 * forwards + self.seconds_per_row * (way.num_rows - forwards) + slower

    def ranks(self, batch: int) -> list[np.ndarray]:
        return [text(10 * batch + row) for row in range(self.batch_size)]

    def decode(self, way: Way, batch: int, max_new_tokens: int) -> Call:
        self.num_calls += 1
        self.kinds.add(way.kind)
        tree = way.tree
        if tree is None and way != PLAIN_WAY:
            tree = (
                DraftTree.chain(way.block_lengths[: way.num_speculative_tokens + 1]) if max(way.block_lengths) else None
            )
        wanted = [max_new_tokens] * self.batch_size
        two_pass, ranks = way.mode == "two_pass", self.ranks(batch)
        if tree is None:
            accepted = [[0] * (max_new_tokens - 1)] * self.batch_size
        elif isinstance(tree, DynamicTree):
            rows = [drawn(one, self.better) for one in ranks]
            accepted = DrawnTexts(rows).accepted(tree, wanted, two_pass=two_pass)
        else:
            accepted = RankReplay(ranks).accepted(tree, wanted, two_pass=two_pass)
        if way.copy_tokens and way.tree is not None:
            accepted = [one[::2] for one in accepted]
        seconds = PREFILL_SECONDS + max(map(len, accepted)) * self.step_seconds(way)
        return Call(seconds, wanted, accepted)


def measured(machine, num_batches=6, max_tree_rows=64, is_drawn=True, effort=EFFORT):
    def rank(use_head, calls):
        texts = [one for batch in range(len(calls)) for one in machine.ranks(batch)]
        return texts, [drawn(one, machine.better) for one in texts] if is_drawn else None

    return measure(machine.decode, num_batches, K, NEW, effort, 1, rank=rank, max_tree_rows=max_tree_rows)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_where_rows_are_nearly_free_a_tree_is_chosen_and_runs_as_predicted(batch_size):
    machine = Machine(0.00002, batch_size)
    found = measured(machine)
    chosen = found.chosen.candidate
    assert chosen.way.tree is not None
    best_chain = max(one.tokens_per_second for one in found.measured if one.candidate.way.tree is None)
    assert found.chosen.tokens_per_second > 1.1 * best_chain
    for one in found.measured:
        if one.candidate.way.tree is not None:
            assert one.tokens_per_second == pytest.approx(one.candidate.tokens_per_second, rel=0.02 * batch_size)
            assert one.tokens_per_step == pytest.approx(one.candidate.tokens_per_step, rel=0.05)
            assert one.ms_per_step == pytest.approx(1000 * machine.step_seconds(one.candidate.way), rel=0.01)
    trees = {(one.candidate.way.mode, one.candidate.way.kind) for one in found.measured if one.candidate.way.tree}
    assert trees == set(itertools.product(("fused", "two_pass"), TREES))


def test_of_two_kinds_of_trees_that_is_chosen_which_catches_more():
    assert measured(Machine(0.0002, better=4.0)).chosen.candidate.way.kind == "dynamic tree"
    assert measured(Machine(0.0002, better=0.2)).chosen.candidate.way.kind == "tree"


def test_where_rows_or_trees_are_dear_none_is_chosen():
    assert measured(Machine(0.01)).chosen.candidate.way == PLAIN_WAY
    dear = measured(Machine(0.0002, seconds_of_trees=0.02)).chosen.candidate.way
    assert dear.tree is None
    assert dear != PLAIN_WAY


def test_no_tree_is_thought_of_that_has_more_rows_than_were_timed():
    found = measured(Machine(0.0), max_tree_rows=20)
    trees = [one.candidate.way for one in found.measured if one.candidate.way.tree is not None]
    assert trees
    assert all(way.num_rows <= 20 for way in trees if way.mode == "fused")
    assert all(way.tree is not None and way.tree.num_nodes < 20 for way in trees)


def test_tuning_makes_no_more_calls_than_it_says():
    machine = Machine(0.0002)
    found = measured(machine, num_batches=5, is_drawn=False)
    assert machine.num_calls <= max_calls(EFFORT, 5, 1)
    assert "dynamic tree" not in {one.candidate.way.kind for one in found.measured}


def test_an_effort_without_dynamic_trees_thinks_of_none():
    machine = Machine(0.0002, better=4.0)
    assert measured(machine, effort=replace(EFFORT, num_dynamic_trees=0)).chosen.candidate.way.kind == "tree"
    assert "dynamic tree" not in machine.kinds


@pytest.mark.parametrize(("seconds_per_row", "mode"), [(0.00002, "fused"), (0.002, "two_pass")])
def test_copies_are_tried_beside_the_fastest_tree_and_predicted_by_the_rows_of_its_steps(seconds_per_row, mode):
    machine, effort = Machine(seconds_per_row), replace(EFFORT, copy_tokens=(2, 4))
    found = measured(machine, is_drawn=False, effort=effort)
    assert machine.num_calls <= max_calls(effort, 6, 1)
    both = [one for one in found.measured if one.candidate.way.tree is not None and one.candidate.way.copy_tokens]
    assert found.chosen in both
    assert found.chosen.candidate.way.mode == mode
    # fewer rows than were timed are taken to cost as much, of which two_pass has some
    within = 0.02 if mode == "fused" else 0.08
    for one in both:
        assert one.tokens_per_second == pytest.approx(one.candidate.tokens_per_second, rel=within)
        assert one.candidate.ms_per_step == pytest.approx(1000 * machine.step_seconds(one.candidate.way), rel=within)
    without = measured(machine, is_drawn=False, effort=replace(effort, copies_beside_tree=False))
    assert not any(one.candidate.way.tree and one.candidate.way.copy_tokens for one in without.measured)


def test_probes_go_from_the_smallest_tree_to_the_largest():
    ways = TreeWays.of([text(0), text(1)], 2, 40, True)
    probes = ways.probes(3)
    rows = [way.num_rows for way in probes]
    assert rows[0] == min(ways.by_rows)
    assert rows[-1] == max(ways.by_rows) == 40
    assert rows == sorted(rows)
    assert all(way.tree is not None and way == tree_way("fused", way.tree) for way in probes)


def test_drafts_that_are_never_right_leave_no_trees():
    for ways in (
        TreeWays.of([np.full((30, K), 99)], 1, 40, True),
        TreeWays.of_drawn([np.zeros((30, K, K), dtype=int)], 1, 40, True),
    ):
        assert ways.probes(3) == []
        assert ways.by_rows == {}
        assert ways.for_two_pass == [] or ways.kind == "tree"
