"""Candidates against sorted logits, and against a head that is asked node by node."""

import pytest
import torch
from tree_samples import TREES, random_tree

from pardec.adapters.head import SamplerHead
from pardec.trees.candidates import TreeCandidates

B, V, H, D, S = 3, 40, 6, 5, 9
ALL = [*TREES.values(), *(random_tree(seed, num_nodes=9) for seed in range(4))]
CPU = torch.device("cpu")


def rows(depth: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(B, depth, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("tree", ALL)
def test_nodes_are_the_likeliest_tokens_of_the_mask_row_of_their_depth(tree):
    logits = rows(tree.num_speculative_tokens)
    found = TreeCandidates.of(tree, CPU).from_rows(logits)
    for b in range(B):
        for node, rank in enumerate(tree.ranks):
            scores = logits[b, tree.depths[node + 1] - 1].tolist()
            assert int(found[b, node]) == sorted(range(V), key=lambda i: -scores[i])[rank]


@pytest.fixture(scope="module")
def head():
    torch.manual_seed(0)
    head = SamplerHead(H, D, 7).double()
    torch.nn.init.normal_(head.outer.weight)
    embeddings, output = torch.randn(V, D, dtype=torch.float64), torch.randn(V, H, dtype=torch.float64)
    return head.requires_grad_(False), embeddings, output


@pytest.mark.parametrize("tree", ALL)
@pytest.mark.parametrize("way", ["from_head", "from_pairs"])
def test_with_a_head_each_node_has_its_rank_behind_its_own_parent(tree, way, head):
    module, embeddings, output = head
    K = tree.num_speculative_tokens
    logits, hidden, bonus = rows(K), rows(K, 1)[:, :, :H], torch.tensor([1, 7, 30])
    candidates = TreeCandidates.of(tree, CPU)
    found = getattr(candidates, way)(module, logits, hidden, bonus, lambda ids: embeddings[ids], output, S)
    orders = set()
    for b in range(B):
        for node, (parent, rank) in enumerate(zip(tree.parents, tree.ranks, strict=True)):
            depth = tree.depths[node + 1] - 1
            before = int(bonus[b] if parent == 0 else found[b, parent - 1])
            correction = output @ module(hidden[b, depth], embeddings[before])
            scores = (logits[b, depth] + correction).tolist()
            plain = logits[b, depth].tolist()
            shortlist = sorted(range(V), key=lambda i: -plain[i])[:S]
            ranked = sorted(shortlist, key=lambda i: -scores[i])
            assert int(found[b, node]) == ranked[rank]
            orders.add((b, depth, tuple(ranked)))
    # the head tells parents apart
    assert len(orders) > B * K or len({(d, p) for d, p in zip(tree.depths[1:], tree.parents, strict=True)}) == K
