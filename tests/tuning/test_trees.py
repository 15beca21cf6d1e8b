"""Chances of rank paths, the chain over runs, growing and replaying: against loops, simulation and brute force."""

import itertools
import random

import numpy as np
import pytest
from tree_samples import BRANCHING, TREES, random_tree

from pardec.draft_tree import DraftTree
from pardec.tuning.chain import expected_steps, expected_tokens_per_step
from pardec.tuning.rank_paths import NUM_RANKS, RankPaths, chances_of
from pardec.tuning.tree_chain import TreeChain, chain_of
from pardec.tuning.tree_growth import best_trees, full_tree, grow, tree_of
from pardec.tuning.tree_replay import RankReplay

K = 3
ALL = {**TREES, **{f"random {seed}": random_tree(seed) for seed in range(6)}}


def random_ranks(num_places: int, seed: int = 0, width: int = 5) -> np.ndarray:
    """Ranks at places, low ones likelier, and a good first guess makes good ones behind it likelier."""
    draw, rows = random.Random(seed), []
    for _ in range(num_places):
        ease = draw.choice([0.3, 0.7])
        row = []
        for _ in range(K):
            rank = 0
            while rank < width and draw.random() > ease:
                rank += 1
            row.append(rank if rank < width else 40)
        rows.append(row)
    return np.array(rows)


# ---------------------------------------------------------------------- chances


def test_with_many_places_a_path_has_the_share_of_places_that_were_guessed_on_it():
    ranks = random_ranks(40_000)
    paths = RankPaths.of(ranks)
    for path in [(), (0,), (1,), (0, 0), (0, 2), (2, 1), (0, 0, 0), (1, 0, 1)]:
        share = np.mean([tuple(row[: len(path)]) == path for row in ranks.tolist()])
        assert chances_of(paths, [path[:n] for n in range(len(path) + 1)])[-1] == pytest.approx(share, rel=0.05)


def test_paths_that_were_never_met_have_the_chances_of_their_depths():
    ranks = np.array([[0, 1, 0]] * 50 + [[1, 0, 0]] * 50)
    paths = RankPaths.of(ranks)
    assert paths.by_depth[0, :2].tolist() == [0.5, 0.5]
    assert paths.given((5,))[:2].tolist() == paths.by_depth[1, :2].tolist()
    # seen 50 times, and 20 more as the depth has it
    assert paths.given((0,))[:2] == pytest.approx([(0 + 20 * 0.5) / 70, (50 + 20 * 0.5) / 70])


def test_places_without_a_token_say_nothing_of_what_is_behind_the_end():
    whole, cut = RankPaths.of([[0, 0, 0]] * 30), RankPaths.of([[0, 0, 0]] * 30 + [[0, -1, -1]] * 500)
    assert cut.given((0,)) == pytest.approx(whole.given((0,)))
    assert cut.by_depth == pytest.approx(whole.by_depth)


def test_ranks_that_are_told_apart_no_longer_are_no_guess():
    paths = RankPaths.of([[NUM_RANKS, 0, 0], [0, 0, 0]])
    assert paths.by_depth[0].sum() == 0.5
    assert chances_of(paths, [(), (NUM_RANKS,)])[1] == 0


@pytest.mark.parametrize("ranks", [np.zeros((0, 3)), np.zeros((4, 0)), np.zeros(4)])
def test_ranks_of_other_shapes_are_refused(ranks):
    with pytest.raises(ValueError, match=r"ranks: expected shape \[places, K\], found \["):
        RankPaths.of(ranks)


# ---------------------------------------------------------------------- the chain


def simulate(tree: DraftTree, chances: np.ndarray, *, num_steps: int = 0, num_tokens: int = 0, seed=0) -> list[int]:
    """Accepted nodes of steps that walk by chance, each as deep as the run behind the last end was long."""
    draw, length, found = random.Random(seed), tree.num_speculative_tokens, []
    while len(found) < num_steps if num_steps else sum(found) + len(found) < num_tokens:
        row = depth = 0
        while depth < length:
            at = draw.random() * chances[row]
            for child, parent in enumerate(tree.parents, start=1):
                if parent == row:
                    at -= chances[child]
                    if at < 0:
                        row, depth = child, depth + 1
                        break
            else:
                break
        found.append(depth)
        length = tree.runs[row]
    return found


@pytest.mark.parametrize("tree", ALL.values(), ids=ALL)
def test_tokens_per_step_are_those_of_long_simulations(tree):
    chances = chances_of(RankPaths.of(random_ranks(2000)), tree.rank_paths)
    chain = chain_of(tree, chances)
    assert chain.ends.sum(axis=1) == pytest.approx(1)
    found = simulate(tree, chances, num_steps=60_000)
    assert chain.tokens_per_step == pytest.approx(1 + np.mean(found), rel=0.015)


@pytest.mark.parametrize("tree", [BRANCHING, TREES["wide"]], ids=["branching", "wide"])
def test_expected_steps_are_those_of_simulations(tree):
    chances = chances_of(RankPaths.of(random_ranks(2000)), tree.rank_paths)
    expected = chain_of(tree, chances).expected_steps(30)
    for n in (1, 7, 30):
        found = np.mean([len(simulate(tree, chances, num_tokens=n, seed=seed)) for seed in range(4000)])
        assert expected[n] == pytest.approx(found, rel=0.02)
    assert expected[0] == 0


@pytest.mark.parametrize("blocks", [(3, 3, 3, 3), (3, 2, 0, 1), (1, 0), (0, 1)])
def test_of_a_chain_it_is_the_chain(blocks):
    law = [0.7, 0.5, 0.4][: len(blocks) - 1]
    chain = chain_of(DraftTree.chain(blocks), np.cumprod([1.0, *law]))
    assert chain.tokens_per_step == pytest.approx(expected_tokens_per_step(law, blocks))
    assert chain.expected_steps(20) == pytest.approx(expected_steps(law, blocks, 20))


# ---------------------------------------------------------------------- growing


def test_grown_trees_are_the_best_of_all_trees_of_their_size():
    paths = RankPaths.of(random_ranks(500, width=2))
    every = [path for depth in (1, 2, 3) for path in itertools.product(range(2), repeat=depth)]
    value = dict(zip([(), *every], chances_of(paths, [(), *every]), strict=True))
    for num_nodes in (1, 2, 3, 4):
        for depth in (1, 2, 3):
            trees = [
                nodes
                for nodes in itertools.combinations(every, num_nodes)
                if all(len(one) <= depth and (len(one) == 1 or one[:-1] in nodes) for one in nodes)
            ]
            best = max((sum(value[one] for one in nodes) for nodes in trees), default=None)
            taken = grow(paths, num_nodes, depth)
            if best is not None and len(taken) == num_nodes + 1:
                assert sum(value[one] for one in taken[1:]) == pytest.approx(best)


def test_the_likeliest_branch_comes_first_so_that_nothing_moves_where_it_is_accepted():
    taken = grow(RankPaths.of(random_ranks(500)), 12, 3)
    tree = tree_of(taken, dict.fromkeys(taken, 3))
    assert tree.paths[3] == (0, 1, 2, 3)
    assert tree.rank_paths[3] == (0, 0, 0)
    assert set(tree.rank_paths) == set(taken)


def test_for_every_number_of_rows_shortened_runs_come_close_to_the_best_of_all_runs():
    paths = RankPaths.of(random_ranks(2000))
    found: dict[int, float] = {}
    for one in best_trees(paths, 64, nodes=(4,)):
        assert one.tree.num_nodes == 4
        assert one.tokens_per_step == pytest.approx(
            chain_of(one.tree, chances_of(paths, one.tree.rank_paths)).tokens_per_step
        )
        found[one.tree.num_rows] = max(one.tokens_per_step, found.get(one.tree.num_rows, 0))
    best: dict[int, float] = {}
    for depth in (1, 2, 3):
        taken = grow(paths, 4, depth)
        parents = [taken.index(path[:-1]) for path in taken[1:]]
        depths, chances = [len(path) for path in taken], chances_of(paths, taken)
        for runs in itertools.product(range(max(depths) + 1), repeat=5):
            if max(runs) == max(depths):
                tokens = TreeChain.of(parents, depths, runs, chances).tokens_per_step
                best[5 + sum(runs)] = max(tokens, best.get(5 + sum(runs), 0))
    assert found.keys() <= best.keys()
    assert all(found[rows] <= best[rows] + 1e-9 for rows in found)
    assert np.mean([best[rows] - found[rows] for rows in found]) < 0.01
    assert max(best[rows] - found[rows] for rows in found) < 0.05


def test_no_tree_has_more_rows_than_asked_for_and_none_is_made_where_nothing_is_guessed():
    assert max(one.tree.num_rows for one in best_trees(RankPaths.of(random_ranks(300)), 20)) <= 20
    hopeless = RankPaths.of(np.full((10, K), 99))
    assert best_trees(hopeless, 64) == []
    assert full_tree(hopeless, 4) is None


# ---------------------------------------------------------------------- replay


def test_a_replay_walks_each_text_as_a_decoder_would():
    # one text: places 0..; ranks of the tokens at 1, 2, 3 behind each
    ranks = [[0, 1, 0], [9, 0, 0], [1, 0, 0], [0, 0, 1], [2, 0, 0], [0, 0, 0], [1, 1, 1], [0, -1, -1], [-1, -1, -1]]
    tree = DraftTree((0, 1, 0, 3), (0, 1, 1, 0), (2, 0, 2, 1, 2))
    # place 0: ranks 0, 1 lead to row 2 (run 2), on to place 3: rank 0 to row 1 (run 0), on to place 5: no node lives,
    # to place 6 by the root's run: rank 1 to row 3 (run 1), on to place 8, the end
    assert RankReplay([np.array(ranks)]).accepted(tree, [9]) == [[2, 1, 0, 1]]
    # until there are enough tokens: 1 of prefill, then 3, 2, 1
    assert RankReplay([np.array(ranks)]).accepted(tree, [5]) == [[2, 1]]
    assert RankReplay([np.array(ranks)]).accepted(tree, [1]) == [[]]
    # a round of two_pass drafts behind the bonus token, at place 1 the first: no node lives; two tokens on, at place 3,
    # rank 0 leads to row 1, three on, at place 6, rank 1 to row 3
    assert RankReplay([np.array(ranks)]).accepted(tree, [9], two_pass=True) == [[0, 1, 1]]


def test_replays_of_many_texts_agree_with_the_chain_where_places_do_not_hang_together():
    ranks = random_ranks(60_000)
    for tree in (BRANCHING, TREES["crooked"]):
        chances = chances_of(RankPaths.of(ranks), tree.rank_paths)
        (found,) = RankReplay([ranks]).accepted(tree, [60_000])
        assert 1 + np.mean(found) == pytest.approx(chain_of(tree, chances).tokens_per_step, rel=0.01)


def test_a_tree_deeper_than_its_ranks_is_refused():
    with pytest.raises(ValueError, match="tree: expected a depth of at most 3, that of the ranks, found 4"):
        RankReplay([random_ranks(5)]).accepted(DraftTree.chain((4,) * 5), [3])
    with pytest.raises(ValueError, match=r"ranks: expected shape \[places, K\] for each of some texts, found \[\]"):
        RankReplay([])
