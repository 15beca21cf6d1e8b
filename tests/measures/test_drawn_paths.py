"""Rows in drawn trees against what the decoder itself drafts and accepts with those trees."""

import pytest
import torch
from tiny_models import make_adapter, tiny_model

from pardec.draft_tree import DynamicTree
from pardec.measures.drawn_paths import drawn_rows_by_place
from pardec.model import SelfSpeculativeModel
from pardec.tuning.dynamic_trees import DrawnTexts

K, V, NEW = 3, 13, 40
PROMPTS = [[5, 9, 2, 4, 7, 7, 3], [3], [11, 12, 10, 1, 2, 3, 4, 0, 5, 6, 7, 8]]


@pytest.fixture(scope="module", params=["llama", "gemma3-mixed-windows"])
def model(request):
    """Of so few tokens that trees of a random adapter are often right."""
    base = tiny_model(request.param, vocab_size=V)
    return SelfSpeculativeModel(base, None, make_adapter(base, K, lora_rank=2, head_width=6, shortlist=7))


@pytest.mark.parametrize("use_head", [None, False])
@pytest.mark.parametrize("mode", ["fused", "two_pass"])
def test_replays_of_rows_accept_what_the_decoder_accepts_with_trees_of_any_size_and_any_runs(model, mode, use_head):
    further = model.generate(PROMPTS, mode="plain", max_new_tokens=NEW + K + 1).token_ids
    rows = drawn_rows_by_place(model, PROMPTS, further, 12, use_head=use_head, batch_size=2)
    assert all(len(one) >= NEW + K + 2 and one.shape[1:] == (K, K) for one in rows)
    texts = DrawnTexts([one.numpy() for one in rows])
    total = 0
    for runs in ((3,) * 13, (3, 2, 1, 0, 1, 2, 3), (2, 0, 1, 2), (1, 1, 0, 1, 1, 1)):
        tree = DynamicTree(runs)
        out = model.generate(PROMPTS, max_new_tokens=NEW, tree=tree, mode=mode, use_head=use_head)
        found = texts.accepted(tree, [NEW] * 3, two_pass=mode == "two_pass")
        assert [one.accepted for one in out.counts] == found
        total += sum(map(sum, found))
    assert total > 15


def test_places_without_a_token_have_no_row(model):
    (rows,) = drawn_rows_by_place(model, [[1, 2, 3]], [[4, 5]], 8)
    # places: the prompt's last token, 4, and 5, behind which there is no bonus token
    assert list(rows.shape) == [3, K, K]
    assert torch.equal(rows[1:], torch.zeros_like(rows[1:]))
    assert torch.equal(rows[0, :, 1:], torch.zeros_like(rows[0, :, 1:]))
    for length in range(K):
        assert (rows[:, length, length + 1 :] == 0).all()
