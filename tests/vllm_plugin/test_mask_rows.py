"""Mask embeddings stand by depth wherever the mask token's id stands, and the gate is open there alone."""

import pytest
import torch

from pardec.vllm_plugin.mask_rows import MaskRows

MASK, K, D = 100, 3, 4  # beyond the vocabulary of 50


@pytest.fixture
def masks():
    return MaskRows(torch.arange(K * D).view(K, D) + 1000.0, mask_id=MASK, max_rows=16)


def embed(ids):
    assert int(ids.max()) < 50
    return ids[:, None].expand(-1, D).float()


@pytest.mark.parametrize(
    ("ids", "depths"),
    [
        ([5, 6, 7], [None] * 3),
        ([5, MASK, MASK, MASK], [None, 0, 1, 2]),
        # two sequences, rejected rows behind the first one's block
        ([5, 6, MASK, MASK, 0, 0, 9, MASK, MASK], [None, None, 0, 1, None, None, None, 0, 1]),
        ([5, MASK, MASK, MASK, MASK], [None, 0, 1, 2, 2]),
    ],
)
def test_each_mask_row_has_the_embedding_of_its_depth(masks, ids, depths):
    ids = torch.tensor(ids, dtype=torch.int32)
    found = masks.embed(ids, embed)
    for row, depth in enumerate(depths):
        expected = embed(ids[row : row + 1])[0] if depth is None else masks.embeddings[depth]
        assert torch.equal(found[row], expected), row
    assert masks.gate[: len(ids), 0].tolist() == [float(depth is not None) for depth in depths]


def test_the_gate_is_written_where_it_is(masks):
    gate = masks.gate
    masks.embed(torch.tensor([5, MASK, MASK]), embed)
    masks.embed(torch.tensor([MASK, 5, 6]), embed)
    assert masks.gate.data_ptr() == gate.data_ptr()
    assert gate[:3, 0].tolist() == [1, 0, 0]
