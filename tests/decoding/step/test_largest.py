"""The largest logits, against topk."""

import pytest
import torch

from pardec.decoding.sampling import largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("vocab_size", "k"), [(64 * 40, 7), (64 * 40 + 13, 10), (64 * 40 + 63, 1), (50, 7)])
def test_the_largest_are_those_of_topk_wherever_they_stand(dtype, vocab_size, k):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(3, 2, vocab_size, generator=generator).to(dtype)
    logits[0, 0, -k:] += 9  # all in the last tokens, which fill no chunk
    logits[0, 1, :k] += 9  # all in one chunk
    logits[1, 0] = -torch.inf
    logits[1, 0, vocab_size // 2 :: 3] = 1.0  # fewer numbers than places among the ties
    values, ids = largest(logits, k)
    expected = logits.topk(k, dim=-1)
    assert torch.equal(values, expected.values)
    assert torch.equal(logits.gather(-1, ids), values)
    assert all(len(set(row.tolist())) == k for row in ids.flatten(0, 1))
    assert values.dtype == dtype
