"""Trees of drafts for tests, and what they mean, written out as loops."""

import random

from pardec.draft_tree import DraftTree, DynamicTree

# two children of the root and of one node each, runs of every length; the first branch is rows 1, 2, 3
BRANCHING = DraftTree((0, 1, 2, 0, 0, 4, 1), (0, 0, 0, 1, 2, 0, 1), (3, 3, 2, 1, 2, 0, 3, 1))
# nodes in an order that is not that of their depth, and a first branch that is not the likeliest
CROOKED = DraftTree((0, 1, 0, 3, 1), (1, 0, 0, 1, 2), (2, 0, 2, 1, 1, 2))
WIDE = DraftTree((0, 0, 0), (0, 1, 2), (1, 1, 0, 1))
TREES = {"branching": BRANCHING, "crooked": CROOKED, "wide": WIDE, "chain": DraftTree.chain((3, 2, 0, 3))}


DYNAMIC = {"dynamic": DynamicTree((3, 3, 2, 2, 1, 0, 3, 1)), "dynamic, few": DynamicTree((3, 0, 1, 2))}


def random_tree(seed: int, num_nodes: int = 7, width: int = 3, depth: int = 3) -> DraftTree:
    """Nodes with parents, ranks and runs by chance, none deeper or wider than that."""
    chance = random.Random(seed)
    parents, ranks, depths = [], [], [0]
    for _ in range(num_nodes):
        taken = set(zip(parents, ranks, strict=True))
        free = [
            (parent, rank)
            for parent, above in enumerate(depths)
            for rank in range(width)
            if above < depth and (parent, rank) not in taken
        ]
        parent, rank = chance.choice(free)
        parents.append(parent)
        ranks.append(rank)
        depths.append(depths[parent] + 1)
    K = max(depths)
    runs = [chance.randint(0, K) for _ in depths]
    runs[chance.randrange(len(runs))] = K
    return DraftTree(tuple(parents), tuple(ranks), tuple(runs))


def ancestors(tree: DraftTree, row: int) -> set[int]:
    """Rows that a real row descends from, and itself."""
    found = {row}
    while row:
        row = tree.parents[row - 1]
        found.add(row)
    return found


def children(tree: DraftTree, row: int) -> list[int]:
    """Rows of a row's children."""
    return [node for node, parent in enumerate(tree.parents, start=1) if parent == row]


def walked(tree: DraftTree, target_tokens: list[int], node_tokens: list[int], draft_length: int) -> list[int]:
    """Rows that a walk comes through, the root first."""
    path = [0]
    while len(path) <= draft_length:
        taken = [row for row in children(tree, path[-1]) if node_tokens[row - 1] == target_tokens[path[-1]]]
        if not taken:
            break
        (row,) = taken
        path.append(row)
    return path


def nodes_that_lead_to(tree: DraftTree, row: int, truth: list[int], vocab_size: int = 61) -> list[int]:
    """Tokens of nodes by which a walk goes to `row` and ends there, where `truth` is what the target goes on with."""
    path = set(tree.paths[row])
    return [
        truth[depth - 1] if node in path else (truth[depth - 1] + 1 + rank) % vocab_size
        for node, (depth, rank) in enumerate(zip(tree.depths[1:], tree.ranks, strict=True), start=1)
    ]
