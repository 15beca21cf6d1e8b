"""The walk against a loop that goes from child to child."""

import pytest
import torch
from tree_samples import TREES, random_tree, walked

from pardec.decoding.verify import verify_greedy
from pardec.draft_tree import DraftTree
from pardec.layout import next_blocks
from pardec.trees.walk import WalkTables, walk

ALL = [*TREES.values(), *(random_tree(seed, num_nodes=9) for seed in range(8))]


def tokens_for(tree: DraftTree, num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Target and node tokens over so few words that walks go far; siblings differ, as ranks do."""
    generator = torch.Generator().manual_seed(seed)
    width = max(tree.ranks) + 1
    target = torch.randint(0, width, (num, tree.num_nodes + 1), generator=generator)
    turn = torch.randint(0, width, (num, tree.num_nodes + 1), generator=generator)
    nodes = [(turn[:, parent] + rank) % width for parent, rank in zip(tree.parents, tree.ranks, strict=True)]
    return target, torch.stack(nodes, dim=1)


@pytest.mark.parametrize("tree", ALL)
def test_a_walk_goes_to_the_child_that_the_targets_token_is_and_no_deeper_than_nodes_exist(tree):
    K = tree.num_speculative_tokens
    tables = WalkTables.of(tree, torch.device("cpu"))
    behind = next_blocks(tree.runs, tree.num_nodes - K).tolist()
    reached = set()
    for length in range(K + 1):
        target, nodes = tokens_for(tree, 60, length)
        found = walk(tables, target, nodes, torch.full((60,), length))
        for b in range(60):
            path = walked(tree, target[b].tolist(), nodes[b].tolist(), length)
            a = len(path) - 1
            reached.add(path[-1])
            assert int(found.num_accepted[b]) == a
            assert found.path[b].tolist() == [*path, *range(a + 1, K + 1)]
            assert found.tokens[b, : a + 1].tolist() == [int(target[b, row]) for row in path]
            assert [*found.next_rows[b].tolist(), int(found.next_length[b])] == behind[path[-1]]
            assert int(found.next_length[b]) == tree.runs[path[-1]]
    assert reached == set(range(tree.num_nodes + 1))


@pytest.mark.parametrize("blocks", [(1, 1), (3, 3, 3, 3), (3, 2, 1, 0), (0, 2, 1)])
def test_of_a_chain_the_walk_is_greedy_verification(blocks):
    K, generator = len(blocks) - 1, torch.Generator().manual_seed(1)
    tables = WalkTables.of(DraftTree.chain(blocks), torch.device("cpu"))
    target = torch.randint(0, 2, (200, K + 1), generator=generator)
    drafts = torch.randint(0, 2, (200, K), generator=generator)
    length = torch.randint(0, K + 1, (200,), generator=generator)
    found, verdict = walk(tables, target, drafts, length), verify_greedy(target, drafts, length)
    assert torch.equal(found.num_accepted, verdict.num_accepted)
    index = torch.arange(K + 1)
    valid = index <= verdict.num_accepted[:, None]
    assert torch.equal(found.tokens[valid], verdict.tokens[valid])
    assert torch.equal(found.path, index.expand(200, -1))
    table = next_blocks(blocks)[verdict.num_accepted]
    assert torch.equal(found.next_rows, table[:, :K])
    assert torch.equal(found.next_length, table[:, K])


def test_shapes_that_disagree_are_named():
    tables = WalkTables.of(TREES["wide"], torch.device("cpu"))
    tokens = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(
        ValueError, match=r"target_tokens: expected shape \(2, 4\).*found \(2, 3\), \(2, 3\) and \(2,\)"
    ):
        walk(tables, tokens[:, :3], tokens[:, :3], tokens[:, 0])
    with pytest.raises(ValueError, match=r"found \(2, 4\), \(2, 2\) and \(2,\)"):
        walk(tables, tokens, tokens[:, :2], tokens[:, 0])
    with pytest.raises(ValueError, match=r"found \(2, 4\), \(2, 3\) and \(1,\)"):
        walk(tables, tokens, tokens[:, :3], tokens[:1, 0])
