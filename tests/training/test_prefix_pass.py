"""The pass over real tokens in slices leaves what the model's own forward leaves."""

import pytest
import torch
from tiny_models import tiny_model

import pardec.training.prefix_pass
from pardec.target.forward import TargetModel
from pardec.target.own_head import OwnHead
from pardec.training.prefix_pass import may_be_sliced, run_prefix

# soft caps, windows that mix or not, norms of queries and keys, one matrix for all three, learned positions
FAMILIES = (
    "llama",
    "gemma2-eager",
    "gemma3-mixed-windows",
    "qwen3",
    "mistral-window",
    "phi3-window",
    "gpt2",
    "granite",
)
T = 23  # beyond windows of 8, and of no number of slices a multiple


def own_head_of(family: str) -> OwnHead:
    return OwnHead.of(TargetModel.wrap(tiny_model(family)))


def some_ids(batch: int) -> torch.Tensor:
    return torch.randint(0, 61, (batch, T), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_leave_what_the_models_own_forward_leaves(family):
    own_head, ids = own_head_of(family), some_ids(2)
    # eager attention rounds its softmax to float32
    near = {"rtol": 0.0, "atol": 2e-6 if family.endswith("eager") else 1e-9}
    expected, _ = run_prefix(own_head, ids)
    with torch.no_grad():
        own = own_head.body(ids, use_cache=False).last_hidden_state
    assert may_be_sliced(own_head)
    for num_slices in (2, 5, T):
        cache, hidden = run_prefix(own_head, ids, num_slices)
        torch.testing.assert_close(hidden, own, **near)
        for found, whole in zip(cache.layers, expected.layers, strict=True):
            assert found.keys.shape == whole.keys.shape
            torch.testing.assert_close(found.keys, whole.keys, **near)
            torch.testing.assert_close(found.values, whole.values, **near)


def test_a_model_for_which_slices_are_not_the_whole_is_seen(monkeypatch):
    own_head = own_head_of("llama")
    honest = pardec.training.prefix_pass.slice_mask

    def of_itself_alone(target, rows):
        mask = honest(target, rows)
        return mask & (torch.arange(rows.stop) >= rows.start)

    monkeypatch.setattr(pardec.training.prefix_pass, "slice_mask", of_itself_alone)
    assert not may_be_sliced(own_head)

    def refused(target, rows):
        raise TypeError("no such mask")

    monkeypatch.setattr(pardec.training.prefix_pass, "slice_mask", refused)
    assert not may_be_sliced(own_head)
