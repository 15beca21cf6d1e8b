"""Adapters in memory: parts that fit each other, and refusals of those that do not."""

import pytest
import torch
from adapter_samples import D, H, K, W, head_tensors, make_adapter

from pardec.adapters.adapter import Adapter, AdapterError, BaseReference


def test_fewer_mask_tokens_than_trained_are_the_first_ones():
    adapter = make_adapter()
    for n in range(K + 1):
        assert torch.equal(adapter.embeddings_for(n), adapter.mask_embeddings[:n])
    with pytest.raises(ValueError, match=r"num_speculative_tokens: expected at most 3, .*, found 4"):
        adapter.embeddings_for(4)


def test_one_shared_mask_token_serves_any_number():
    adapter = make_adapter(sharing="shared")
    for n in (0, 1, K, K + 5):
        assert adapter.embeddings_for(n).shape == (n, D)
        assert all(torch.equal(row, adapter.mask_embeddings[0]) for row in adapter.embeddings_for(n))


@pytest.mark.parametrize(
    ("sharing", "shape"),
    [
        ("distinct", (K - 1, D)),
        ("distinct", (1, D)),
        ("shared", (K, D)),
        ("distinct", (D,)),
        ("distinct", (K, 1, D)),
    ],
)
def test_embeddings_of_another_shape_are_refused(sharing, shape):
    rows = 1 if sharing == "shared" else K
    found = ", ".join(map(str, shape))
    with pytest.raises(AdapterError, match=rf"expected shape \[{rows}, D\] .*{K}, found \[{found}\]"):
        Adapter(torch.zeros(shape), make_adapter(sharing=sharing).metadata)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_refused(bad):
    adapter = make_adapter()
    adapter.mask_embeddings[1, 2] = bad
    with pytest.raises(AdapterError, match="mask embeddings: expected finite numbers, found NaN or infinity"):
        Adapter(adapter.mask_embeddings, adapter.metadata)


def test_an_adapter_of_noise_has_no_embeddings_to_ask_for():
    with pytest.raises(ValueError, match="mask embeddings: expected some, found draft_input uniform_noise"):
        make_adapter(noise=True, lora=True).embeddings_for(1)


def test_noise_needs_a_lora_and_no_embeddings():
    noise = make_adapter(noise=True, lora=True)
    with pytest.raises(AdapterError, match=r"lora: expected one with draft_input uniform_noise, .*, found none"):
        Adapter(None, noise.metadata)
    with pytest.raises(AdapterError, match=rf"expected none with draft_input uniform_noise, found \[{K}, {D}\]"):
        Adapter(torch.zeros(K, D), noise.metadata, noise.lora)


def test_mask_embeddings_must_be_there_unless_noise_stands_for_them():
    with pytest.raises(AdapterError, match=rf"mask embeddings: expected shape \[{K}, D\] .*, found none"):
        Adapter(None, make_adapter().metadata)


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("some/base", "some/base"),
        ("tiny-python", "tiny-python"),
        ("/home/me/models/mine", "mine"),
        ("/home/me/models/mine/", "mine"),
        ("~/models/mine", "mine"),
        ("../models/mine", "mine"),
        ("models/mine-Q4.gguf", "mine-Q4.gguf"),
        ("models/here", "here"),
        ("/", "base"),
    ],
)
def test_a_base_has_a_name_that_tells_nothing_of_the_machine(name, public, tmp_path, monkeypatch):
    (tmp_path / "models/here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert BaseReference(name=name).public_name == public


def with_head(**changes) -> Adapter:
    """An adapter whose head has other tensors; None leaves one out."""
    adapter, tensors = make_adapter(head=True), head_tensors() | changes
    head = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return Adapter(adapter.mask_embeddings, adapter.metadata, head=head)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"outer.weight": None}, "expected inner.bias, inner.weight, outer.weight, found inner.bias, inner.weight"),
        ({"outer.bias": torch.zeros(H)}, "found inner.bias, inner.weight, outer.bias, outer.weight"),
        (dict.fromkeys(head_tensors(), None), "expected inner.bias, inner.weight, outer.weight, found nothing"),
        ({"inner.bias": torch.zeros(W + 1)}, rf"expected inner.bias \[{W}\], .*'inner.bias': \[{W + 1}\]"),
        ({"inner.weight": torch.zeros(W + 1, H + D)}, rf"'inner.weight': \[{W + 1}, {H + D}\]"),
        ({"inner.weight": torch.zeros(W, H)}, rf"'inner.weight': \[{W}, {H}\]"),  # no room for an embedding
        ({"inner.weight": torch.zeros(W)}, rf"'inner.weight': \[{W}\]"),
        ({"outer.weight": torch.zeros(H, W + 1)}, rf"'outer.weight': \[{H}, {W + 1}\]"),
        ({"outer.weight": torch.zeros(0, W)}, rf"'outer.weight': \[0, {W}\]"),
        ({"outer.weight": torch.tensor(1.0)}, r"'outer.weight': \[\]"),
        ({"inner.bias": torch.full((W,), torch.nan)}, "expected finite numbers, found NaN or infinity"),
        ({"outer.weight": torch.full((H, W), torch.inf)}, "expected finite numbers, found NaN or infinity"),
    ],
)
def test_heads_that_cannot_be_are_refused(changes, words):
    with pytest.raises(AdapterError, match=f"^head: .*{words}"):
        with_head(**changes)


def test_a_head_without_its_shape_and_a_shape_without_a_head_are_refused():
    bare, full = make_adapter(), make_adapter(head=True)
    with pytest.raises(AdapterError, match=r"head: expected .*, or neither, found weights without the key head"):
        Adapter(bare.mask_embeddings, bare.metadata, head=full.head)
    with pytest.raises(AdapterError, match=r"head: expected .*, or neither, found that key without weights"):
        Adapter(full.mask_embeddings, full.metadata)
