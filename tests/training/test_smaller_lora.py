"""A LoRA that starts smaller: whole layers as they were, lower ranks as the best approximation by numpy's own SVD."""

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from pardec.adapters.gated_lora import LoraWeights
from pardec.training.peft_lora import inject_lora, load_lora_weights, lora_weights


def random_lora(*, rank: int, alpha: float, target_modules: str | list[str] = "all-linear") -> LoraWeights:
    weights = empty_lora(rank=rank, alpha=alpha, target_modules=target_modules)
    generator = torch.Generator().manual_seed(0)
    return LoraWeights(
        weights.config, {k: torch.randn(t.shape, generator=generator) for k, t in weights.tensors.items()}
    )


def empty_lora(*, rank: int, alpha: float, target_modules: str | list[str] = "all-linear") -> LoraWeights:
    return lora_weights(inject_lora(tiny_model("llama"), r=rank, alpha=alpha, target_modules=target_modules))


def started(source: LoraWeights, **shape) -> LoraWeights:
    peft_model = inject_lora(tiny_model("llama"), **shape)
    load_lora_weights(peft_model, source)
    return lora_weights(peft_model)


def products(weights: LoraWeights) -> dict[str, np.ndarray]:
    return {name: weights.scaling * (b.double() @ a.double()).numpy() for name, (a, b) in weights.pairs().items()}


def test_fewer_layers_keep_their_numbers():
    source = random_lora(rank=4, alpha=8)
    found = started(source, r=4, alpha=8, target_modules=r".*layers\.[12]\..*(q_proj|down_proj)")
    assert len(found.pairs()) == 4  # of two layers, each in two blocks
    for key, tensor in found.tensors.items():
        assert torch.equal(tensor, source.tensors[key])


@pytest.mark.parametrize("alpha", [4, 10])  # the same scaling, and another one
def test_a_lower_rank_is_the_best_approximation_of_what_the_lora_adds(alpha):
    source = random_lora(rank=4, alpha=8)
    found = products(started(source, r=2, alpha=alpha, target_modules="all-linear"))
    assert len(found) == 21
    for name, whole in products(source).items():
        u, s, v = np.linalg.svd(whole, full_matrices=False)
        np.testing.assert_allclose(found[name], (u[:, :2] * s[:2]) @ v[:2], rtol=1e-4, atol=1e-4)


def test_layers_with_fewer_features_than_the_lower_rank_lose_nothing():
    source = random_lora(rank=24, alpha=24)
    found = started(source, r=20, alpha=20, target_modules="all-linear")  # k_proj and v_proj have 16 outputs
    narrow = [name for name, (_, b) in found.pairs().items() if b.shape[0] < 20]
    assert len(narrow) == 6
    for name in narrow:
        np.testing.assert_allclose(products(found)[name], products(source)[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learned", [0, 1])  # ranks of B that are not 0, as of a run that was kept at its start
def test_ranks_that_add_nothing_can_learn(learned):
    whole = random_lora(rank=4, alpha=4)
    for key, tensor in whole.tensors.items():
        if "lora_B" in key:
            tensor[:, learned:] = 0
    found = started(whole, r=3, alpha=3, target_modules="all-linear")
    for name, (a, b) in found.pairs().items():
        np.testing.assert_allclose(products(found)[name], products(whole)[name], rtol=1e-4, atol=1e-4)
        assert bool((a != 0).any(1).all())  # so that B has a gradient
        assert bool((b[:, learned:] == 0).all())


def test_another_scaling_alone_adds_the_same():
    source = random_lora(rank=4, alpha=8)
    found = products(started(source, r=4, alpha=4, target_modules="all-linear"))
    for name, whole in products(source).items():
        np.testing.assert_allclose(found[name], whole, rtol=1e-5, atol=1e-5)


def test_more_layers_and_higher_ranks_are_refused():
    with pytest.raises(
        ValueError, match=r"start_from: expected a LoRA of r 3 or more for all layers of the recipe, found r 2$"
    ):
        started(random_lora(rank=2, alpha=4), r=3, alpha=4, target_modules="all-linear")
    attention = random_lora(rank=2, alpha=4, target_modules=["q_proj", "v_proj"])
    with pytest.raises(
        ValueError, match=r"start_from: expected a LoRA of r 2 or more for all layers .* found none for model.layers.0."
    ):
        started(attention, r=2, alpha=4, target_modules="all-linear")
