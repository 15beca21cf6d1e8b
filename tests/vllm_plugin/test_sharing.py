"""The one function of vLLM that is replaced: for drafts that borrow, where it is the one that was tested."""

import pytest
from torch import nn

from pardec.vllm_plugin.sharing import let_drafts_borrow, version_note


class Draft:
    def borrow_layers(self, target):
        self.target = target


def proposer_of(model):
    """A class as vLLM's, and a proposer with a loaded draft."""

    class Proposer:
        def __init__(self):
            self.model, self.shared = model, []

        def _maybe_share_embeddings(self, target_language_model):
            self.shared.append(target_language_model)

    return Proposer, Proposer()


def test_a_draft_that_borrows_is_given_the_target_and_others_are_treated_as_before():
    target, draft = nn.Linear(1, 1), Draft()
    kind, proposer = proposer_of(draft)
    let_drafts_borrow(kind)
    proposer._maybe_share_embeddings(target)
    assert draft.target is target
    assert proposer.shared == []
    kind, proposer = proposer_of(nn.Linear(1, 1))
    let_drafts_borrow(kind)
    proposer._maybe_share_embeddings(target)
    assert proposer.shared == [target]


def test_it_is_replaced_once():
    kind, _ = proposer_of(Draft())
    let_drafts_borrow(kind)
    replaced = kind._maybe_share_embeddings
    let_drafts_borrow(kind)
    assert kind._maybe_share_embeddings is replaced


def test_a_vllm_without_that_function_is_refused_with_the_versions_that_were_tested():
    class Other:
        pass

    class Changed:
        def _maybe_share_embeddings(self, target, device):
            pass

    with pytest.raises(ValueError) as caught:
        let_drafts_borrow(Other)
    assert str(caught.value) == (
        "vllm: expected Other._maybe_share_embeddings(self, target_language_model), as in 0.32.0, which pardec was "
        "tested with, found none"
    )
    with pytest.raises(ValueError, match=r"found one with \(self, target, device\)"):
        let_drafts_borrow(Changed)


def test_another_version_is_worth_a_note():
    assert version_note("0.32.0") is None
    assert version_note("0.32.0+cpu") is None
    assert version_note("0.33.1") == "vllm: expected 0.32.0, which pardec was tested with, found 0.33.1; going on"
