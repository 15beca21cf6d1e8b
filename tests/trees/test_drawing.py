"""Drawn trees against all paths of tokens, sorted by their probability."""

import itertools

import pytest
import torch

from pardec.adapters.head import SamplerHead
from pardec.draft_tree import DynamicTree
from pardec.trees.drawing import Drawing, most_nodes

B, K, V, H, D, S = 3, 3, 40, 6, 5, 4
CPU = torch.device("cpu")
BONUS = torch.tensor([1, 7, 30])
LENGTH = torch.tensor([3, 2, 1])


@pytest.fixture(scope="module")
def rows():
    """Logits and hidden states of mask rows, and the head that reads them."""
    torch.manual_seed(0)
    logits, hidden = 2 * torch.randn(B, K, V, dtype=torch.float64), torch.randn(B, K, H, dtype=torch.float64)
    head = SamplerHead(H, D, 7).double()
    torch.nn.init.normal_(head.outer.weight)
    embeddings, output = torch.randn(V, D, dtype=torch.float64), torch.randn(V, H, dtype=torch.float64)
    return logits, hidden, head.requires_grad_(False), embeddings, output


def likeliest_paths(log_probs, length: int, num: int) -> list[tuple[int, ...]]:
    """Of all paths of at most so many tokens; `log_probs` of a path's next tokens, by token."""
    found = [((), 0.0)]
    for path, before in itertools.takewhile(lambda one: len(one[0]) < length, found):
        found += [((*path, token), before + one) for token, one in log_probs(path).items()]
    return [path for path, _ in sorted(found[1:], key=lambda one: -one[1])[:num]]


def paths_of(tokens: list[int], parents: list[int]) -> list[tuple[int, ...]]:
    paths = [()]
    for token, parent in zip(tokens, parents, strict=True):
        assert parent < len(paths)
        paths.append((*paths[parent], token))
    return paths[1:]


@pytest.mark.parametrize("num_nodes", [3, 4, 9, 30])
def test_without_a_head_nodes_are_the_paths_of_largest_product_of_what_mask_rows_say(rows, num_nodes):
    logits = rows[0]
    found = Drawing.of(DynamicTree((K,) * (num_nodes + 1)), CPU).from_rows(logits, LENGTH)
    for b in range(B):
        each = [dict(enumerate(row.tolist())) for row in logits[b].log_softmax(dim=1)]
        expected = likeliest_paths(lambda path, each=each: each[len(path)], int(LENGTH[b]), num_nodes)
        assert paths_of(found.tokens[b].tolist(), found.parents[b].tolist()) == expected


@pytest.mark.parametrize("num_nodes", [3, 4, 9, 30])
@pytest.mark.parametrize("way", ["from_head", "from_pairs"])
def test_with_a_head_nodes_are_the_paths_that_it_makes_likeliest_token_by_token(rows, way, num_nodes):
    logits, hidden, head, embeddings, output = rows
    drawing = Drawing.of(DynamicTree((K,) * (num_nodes + 1)), CPU)
    found = getattr(drawing, way)(head, logits, hidden, BONUS, LENGTH, lambda ids: embeddings[ids], output, S)
    for b in range(B):

        def log_probs(path, b=b):
            row, before = len(path), path[-1] if path else int(BONUS[b])
            shortlist = logits[b, row].topk(S).indices
            scores = logits[b, row] + output @ head(hidden[b, row], embeddings[before])
            return dict(zip(shortlist.tolist(), scores[shortlist].log_softmax(dim=0).tolist(), strict=True))

        expected = likeliest_paths(log_probs, int(LENGTH[b]), num_nodes)
        nodes = paths_of(found.tokens[b].tolist(), found.parents[b].tolist())
        # where all nodes that a run allows are drawn, deeper ones stand behind them, which no walk reaches
        assert nodes[: len(expected)] == expected
        assert all(len(path) > int(LENGTH[b]) for path in nodes[len(expected) :])
        assert len(set(nodes)) == num_nodes


@pytest.mark.parametrize("others", ["-inf", "nan"])
def test_tokens_that_are_certain_or_impossible_or_no_numbers_leave_parents_before_children(others):
    logits = torch.full((1, K, V), float(others))
    logits[0, :, 3] = 0.0
    found = Drawing.of(DynamicTree((K,) * 31), CPU).from_rows(logits, torch.tensor([K]))
    nodes = paths_of(found.tokens[0].tolist(), found.parents[0].tolist())
    assert others == "nan" or nodes[:K] == [(3,), (3, 3), (3, 3, 3)]
    assert len(set(nodes)) == 30


@pytest.mark.parametrize(("ranked", "depth", "nodes"), [(2, 1, 2), (2, 3, 14), (64, 1, 64), (1, 5, 5), (3, 2, 12)])
def test_no_more_nodes_can_be_drawn_than_there_are_paths(ranked, depth, nodes):
    assert most_nodes(ranked, depth, 512) == nodes
    assert most_nodes(ranked, depth, nodes - 1) == nodes - 1
