"""Starting from an adapter that exists: its numbers are taken over, frozen parts stay, misfits are refused."""

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model

from pardec.adapters.adapter import Adapter, AdapterMetadata, BaseReference, HeadShape
from pardec.target.fingerprint import fingerprint
from pardec.training.module import Drafter, MaskTokenTrainer
from pardec.training.peft_lora import inject_lora
from pardec.training.warm_start import learned_adapter, warm_start

K = 3
SHAPE = "^adapter.transfer: expected another base of the same shape: "


def make(
    family: str = "llama", *, rank: int = 2, width: int = 5, num_masks: int = K, seed: int = 0, base_seed=0, **changes
):
    """A training module with all parts, its PEFT model, and the identity of its base."""
    model = tiny_model(family, seed=base_seed, **changes)
    identity = fingerprint(model, None)
    torch.manual_seed(seed)
    peft_model = inject_lora(model, r=rank, alpha=4, target_modules="all-linear") if rank else None
    module = MaskTokenTrainer(model, Drafter(num_masks, has_lora=bool(rank), head_width=width))
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter)
    return module, peft_model, identity


def adapter_of(module, peft_model, identity, base: str = "tiny") -> Adapter:
    metadata = AdapterMetadata(
        num_speculative_tokens=module.drafter.num_speculative_tokens,
        base=BaseReference(name=base),
        fingerprint=identity,
        head=None if module.head is None else HeadShape(width=module.drafter.head_width, shortlist=4),
    )
    return learned_adapter(module, peft_model, metadata)


def learned(module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if "lora_" in n or not n.startswith("base.")}


def test_every_part_takes_the_adapters_numbers():
    source, peft_model, identity = make(seed=1)
    adapter = adapter_of(source, peft_model, identity)
    module, peft_model, identity = make(seed=2)
    before = learned(module)
    warm_start(module, peft_model, adapter, identity)
    expected = learned(source)
    assert len(expected) == 1 + 3 + 2 * 21  # mask embeddings, head, 7 layers in each of 3 blocks
    for name, found in learned(module).items():
        assert not torch.equal(before[name], found)
        torch.testing.assert_close(found, expected[name].to(found.dtype), rtol=1e-6, atol=1e-6)
    assert all(p.requires_grad for n, p in module.named_parameters() if n in expected)


def test_a_lora_names_its_base_without_the_path_that_it_was_loaded_from():
    module, peft_model, identity = make()
    peft_model.peft_config["default"].base_model_name_or_path = "/home/me/cache/tiny"
    config = adapter_of(module, peft_model, identity, "/home/me/models/tiny").lora.config
    assert config["base_model_name_or_path"] == "tiny"
    assert "/home/me" not in str(config)


def test_a_part_that_the_adapter_lacks_keeps_its_own_beginning():
    source, peft_model, identity = make(width=0, seed=1)
    module, own, _ = make(seed=2)
    before = learned(module)
    warm_start(module, own, adapter_of(source, peft_model, identity), identity)
    after = learned(module)
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith("head.")


def test_frozen_parts_get_no_gradient_and_the_head_alone_is_trained():
    source, peft_model, identity = make(width=0, seed=1)
    module, own, _ = make(seed=2)
    warm_start(module, own, adapter_of(source, peft_model, identity), identity, ["mask_embeddings", "lora"])
    ids = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "loss_mask": torch.ones(2, 20, dtype=torch.bool), "anchors": torch.tensor([[3, 8]] * 2)}
    loss, _, _ = module(**batch)
    loss.backward()
    touched = {n for n, p in module.named_parameters() if p.grad is not None}
    assert touched == {"head.inner.weight", "head.inner.bias", "head.outer.weight"}
    gradients = {n: p.grad.clone() for n, p in module.named_parameters() if n in touched}
    # the head learns the same when what it reads is trained beside it
    free, own, _ = make(seed=2)
    warm_start(free, own, adapter_of(source, peft_model, identity), identity)
    free(**batch)[0].backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(dict(free.named_parameters())[name].grad, gradient)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"family": "qwen3"}, "belongs to another base: .*model_type: expected 'llama', found 'qwen3'$"),
        ({"vocab_size": 64}, "belongs to another base: .*; adapter.transfer=true starts from it nevertheless$"),
        ({"rank": 3}, "expected a LoRA of r 3 or more for all layers of the recipe, found r 2"),
        ({"num_masks": 2}, r"mask_embeddings: expected shape \[2, 32\] as in the recipe, found \[3, 32\]"),
        ({"width": 6}, r"head.inner.weight: expected shape \[6, 64\] as in the recipe, found \[5, 64\]"),
        ({"width": 0}, "found none of head"),
        ({"rank": 0}, "found none of lora"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(changes, words):
    source, peft_model, identity = make()
    adapter = adapter_of(source, peft_model, identity)
    module, own, identity = make(**changes)
    with pytest.raises(ValueError, match=words):
        warm_start(module, own, adapter, identity)


@pytest.mark.parametrize("changes", [{"base_seed": 5}, {"base_seed": 5, "vocab_size": 64}])
def test_an_adapter_is_moved_to_another_base_of_the_same_shape(changes):
    source, peft_model, identity = make(seed=1)
    adapter = adapter_of(source, peft_model, identity, "/home/me/models/tiny")
    measured = {"sampled": {"mean_acceptance_length": 1.75}, "greedy": {"mean_acceptance_length": 2.0}, "seed": 0}
    adapter = replace(adapter, metadata=adapter.metadata.model_copy(update={"measured": measured}))
    module, own, identity = make(seed=2, **changes)
    with pytest.raises(ValueError, match=r"another base: .*; adapter.transfer=true"):
        warm_start(module, own, adapter, identity)
    moved = warm_start(module, own, adapter, identity, transfer=True)
    lengths = {"sampled": 1.75, "greedy": 2.0}
    assert moved == {"base": "tiny", "revision": None, "mean_acceptance_length": lengths}
    expected = learned(source)
    for name, found in learned(module).items():
        torch.testing.assert_close(found, expected[name].to(found.dtype), rtol=1e-6, atol=1e-6)


def test_an_adapter_of_this_very_base_is_not_moved():
    source, peft_model, identity = make(seed=1)
    adapter = adapter_of(source, peft_model, identity)
    module, own, identity = make(seed=2)
    assert warm_start(module, own, adapter, identity, transfer=True) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"family": "qwen3"}, SHAPE + "model_type: expected 'llama', found 'qwen3'$"),
        ({"num_hidden_layers": 2}, SHAPE + "num_hidden_layers: expected 3, found 2$"),
        ({"num_key_value_heads": 1, "num_hidden_layers": 2}, SHAPE + "num_hidden_layers: expected 3, found 2$"),
        ({"num_key_value_heads": 4}, SHAPE + "num_key_value_heads: expected 2, found 4$"),
        (
            {"intermediate_size": 40},
            r"^adapter.start_from: LoRA of model.*mlp.*: expected \(40, 32\) features, found \(48, 32\)",
        ),
    ],
)
def test_a_base_of_another_shape_is_told_by_its_first_difference(changes, words):
    source, peft_model, identity = make()
    module, own, identity_of_other = make(**changes)
    adapter = adapter_of(source, peft_model, identity)
    with pytest.raises(ValueError, match=words):
        warm_start(module, own, adapter, identity_of_other, transfer=True)


def test_a_part_cannot_be_frozen_that_the_adapter_lacks():
    source, peft_model, identity = make(width=0)
    module, own, _ = make()
    with pytest.raises(ValueError, match=r"train.frozen: expected parts that adapter.start_from has, found head"):
        warm_start(module, own, adapter_of(source, peft_model, identity), identity, ["head"])


def test_a_frozen_lora_cannot_be_made_smaller():
    source, peft_model, identity = make()
    module, own, _ = make(rank=1)
    adapter = adapter_of(source, peft_model, identity)
    with pytest.raises(ValueError, match=r"train.frozen: .* r 2 on 21 layers, found r 1 on 21 layers$"):
        warm_start(module, own, adapter, identity, ["lora"])
    warm_start(module, own, adapter, identity)
