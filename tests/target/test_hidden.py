"""The tap on the output head: it sees what the head reads, in this thread and while it is attached, and no more."""

import threading

import pytest
import torch
from greedy_oracle import prompts
from tiny_models import tiny_model
from transformers import AutoModel

from pardec.decoding.prepack import PackedLinears
from pardec.decoding.probing.probe import probe_head
from pardec.target import forward as forward_module
from pardec.target.cache import SlotCache
from pardec.target.forward import TargetModel, UnsupportedModelError
from pardec.target.hidden import HiddenTap, rows_of_each
from pardec.target.survey import survey

FAMILIES = ["llama", "gemma3-mixed-windows", "gpt2", "opt", "gpt_neox"]


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny_model(request.param)


def test_logits_are_made_of_what_was_seen(model):
    tap, ids = HiddenTap(model), torch.tensor([[5, 3, 8], [1, 2, 9]])
    with tap.attached():
        logits = model(ids).logits
        torch.testing.assert_close(tap.hidden @ tap.output_embeddings.T, logits, rtol=1e-9, atol=1e-9)
        logits = model(ids, logits_to_keep=1).logits  # rows as they are in the logits
        torch.testing.assert_close(tap.hidden @ tap.output_embeddings.T, logits, rtol=1e-9, atol=1e-9)
        probe_head(TargetModel.wrap(model), tap)
    assert tap.output_embeddings is model.get_output_embeddings().weight


def test_nothing_is_on_the_model_and_nothing_is_kept_outside():
    model = tiny_model("llama")
    tap, ids = HiddenTap(model), torch.tensor([[5, 3]])
    with tap.attached():
        with tap.attached():
            model(ids)
        model(ids)  # one of two contexts still holds
        assert tap.has_seen
    assert not tap.has_seen
    assert not any(module._forward_pre_hooks for module in model.modules())
    model(ids)
    assert not tap.has_seen


def test_forwards_of_other_threads_are_not_seen():
    model = tiny_model("llama")
    tap, seen = HiddenTap(model), []

    def elsewhere():
        model(torch.tensor([[1, 2, 3, 4]]))
        seen.append(tap.hidden.shape)

    with tap.attached():
        model(torch.tensor([[5, 3]]))
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert (tap.hidden.shape, seen) == ((1, 2, 32), [(1, 4, 32)])


def test_rows_of_each_sequence_are_taken():
    x = torch.arange(24).view(2, 4, 3)
    rows = torch.tensor([[3, 0], [1, 1]])
    expected = [[x[b, r].tolist() for r in row] for b, row in enumerate(rows.tolist())]
    assert rows_of_each(x, rows).tolist() == expected


@pytest.mark.parametrize("takes_rows_of_each", [True, False], ids=["newer", "older"])
def test_rows_that_differ_between_sequences_bring_their_own_hidden_states(model, takes_rows_of_each, monkeypatch):
    """Also where transformers takes one set of rows for all sequences."""
    if takes_rows_of_each and not forward_module._TAKES_ROWS_OF_EACH:
        takes_rows_of_each = False
    monkeypatch.setattr(forward_module, "_TAKES_ROWS_OF_EACH", takes_rows_of_each)
    target, tap = TargetModel.wrap(model), HiddenTap(model)
    ids, rows = torch.tensor(prompts(61, (7, 7))), torch.tensor([[2, 6, 3], [5, 0, 5]])
    positions = torch.arange(7).expand(2, -1)
    with tap.attached():
        logits = target.run_at(rows, target.embed(ids), positions, None, SlotCache(3, 7), tap)
        torch.testing.assert_close(tap.hidden @ tap.output_embeddings.T, logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits, rows_of_each(model(ids).logits, rows), rtol=1e-9, atol=1e-9)


def test_packed_weights_do_not_hide_the_input(tiny_base):
    target = TargetModel.wrap(tiny_base)
    linears, tap = PackedLinears(survey(target).siblings), HiddenTap(tiny_base)
    linears.refresh()
    assert tiny_base.get_output_embeddings() in linears.modules
    with tap.attached(), linears.installed(), linears.active():
        logits = tiny_base(torch.tensor([[5, 3, 8]])).logits
        torch.testing.assert_close(tap.hidden @ tap.output_embeddings.T, logits, rtol=1e-4, atol=1e-4)


def test_a_base_without_output_embeddings_is_refused(monkeypatch):
    model = tiny_model("llama")
    words = "adapter.head: expected a base whose output head has a weight matrix, found none"
    with pytest.raises(ValueError, match=words):
        HiddenTap(AutoModel.from_config(model.config))
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(61, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=words):  # quantised
        HiddenTap(model)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(61 * 32))
    with pytest.raises(ValueError, match=words):
        HiddenTap(model)


def test_a_base_whose_output_head_is_not_called_for_each_row_is_refused(monkeypatch):
    model = tiny_model("llama")
    tap, target = HiddenTap(model), TargetModel.wrap(model)
    head = model.lm_head
    monkeypatch.setattr(model.lm_head, "forward", lambda x: x @ head.weight.T)
    probe_head(target, tap)  # its own forward, called as a module, is good enough
    another = torch.nn.Linear(32, 61, bias=False, dtype=torch.float64)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: another)
    with pytest.raises(UnsupportedModelError, match=r"llama: expected an output head that reads .*, found None and 61"):
        probe_head(target, tap)
