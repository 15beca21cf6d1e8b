"""FlexAttention as a route of steps: what it is told of what rows see, and of how to run."""

import pytest
import torch
from timing import flex_route, shapes, split_route
from timing.steps import FLEX, Subject, Variant
from torch._subclasses.fake_tensor import FakeTensorMode

from pardec.target.forward import TargetModel


@pytest.fixture(scope="module")
def subject():
    base = shapes.random_model(shapes.config_of("tiny"), torch.device("cpu"), torch.float32, seed=0)
    return Subject(TargetModel.wrap(base), shapes.random_mask_embeddings(base, 11, 0), None)


@pytest.mark.parametrize("length", [0, 1, 119, 120, 127, 128, 250])
@pytest.mark.parametrize("num_drafted", [2, 11])
def test_blocks_hold_all_that_rows_see_and_full_ones_nothing_else(subject, length, num_drafted):
    decoder = subject.engine(num_drafted, Variant(compile=False, lora=False, attention=FLEX), 8).decoder
    plan, num_slots = decoder._plans["step"], 512
    R, G = plan.layout.num_rows, 2
    mask = flex_route.step_block_mask(plan, torch.tensor([length]), num_slots, G)
    assert mask.shape == (1, 1, G * R, num_slots)
    seen = torch.zeros(R, num_slots, dtype=torch.bool)
    seen[:, :length] = True
    seen[:, length : length + R] = plan.layout.visible
    seen = seen.repeat(G, 1)
    listed = torch.zeros_like(seen)
    for r in range(G * R):
        block = r // flex_route.BLOCK
        pairs = ((mask.full_kv_num_blocks, mask.full_kv_indices, True), (mask.kv_num_blocks, mask.kv_indices, False))
        for counts, indices, is_full in pairs:
            for index in indices[0, 0, block, : counts[0, 0, block]].tolist():
                slots = torch.arange(index * flex_route.BLOCK, (index + 1) * flex_route.BLOCK)
                listed[r, slots] = True if is_full else mask.mask_mod(torch.tensor(0), None, torch.tensor(r), slots)
    assert torch.equal(listed, seen)


def test_the_kernel_is_told_warps_and_splits_where_it_splits_keys(monkeypatch):
    monkeypatch.setattr(split_route, "num_multiprocessors", lambda device: 132)
    found = {}
    with FakeTensorMode(), torch.device("cuda"):
        key = torch.empty(1, 8, 1024, 128)
        for rows in (4, 100, 127, 128, 324):
            found[rows] = flex_route._options(torch.empty(1, 8, rows, 128), key, key)
    assert found[4] == {"num_warps": 4, "SPLIT_KV": 16}
    assert found[100] == found[127] == {"num_warps": 8, "SPLIT_KV": 16}
    assert found[128] is found[324] is None
