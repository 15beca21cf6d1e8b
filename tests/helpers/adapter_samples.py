"""Small adapters of random numbers, and what their folders hold."""

from pathlib import Path

import pytest
import torch

from pardec.adapters.adapter import Adapter, AdapterError, AdapterMetadata, BaseReference, HeadShape
from pardec.adapters.files import load_adapter
from pardec.adapters.gated_lora import LoraWeights
from pardec.target.fingerprint import Fingerprint

K, D, H, W = 3, 8, 6, 5


LORA_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}


LORA_FILES = {"lora/adapter_config.json", "lora/adapter_model.safetensors", "lora/README.md"}


def make_adapter(seed=0, sharing="distinct", lora=False, head=False, noise=False):
    generator = torch.Generator().manual_seed(seed)
    metadata = AdapterMetadata(
        num_speculative_tokens=K,
        mask_sharing=sharing,
        draft_input="uniform_noise" if noise else "mask_embeddings",
        head=HeadShape(width=W, shortlist=7 + seed) if head else None,
        base=BaseReference(name="some/base", revision="abc"),
        fingerprint=Fingerprint(
            embedding_rows="0" * 64,
            embedding_sample=[0.1, -1e-30, 1 / 3],
            architecture={"hidden_size": D, "rope": {"all": {"rope_theta": 1e4}}},
            architecture_sha256="1" * 64,
            tokenizer=None,
        ),
        training={"objective": "kl", "seed": seed, "command": "train 'a b'"},
        measured={"mean_acceptance_length": 1.7 + seed},
    )
    weights = None
    if lora:
        shapes = {"lora_A": (2, D), "lora_B": (D, 2)}
        tensors = {
            f"base_model.model.layers.{n}.q_proj.{half}.weight": torch.randn(shape, generator=generator)
            for n in range(2)
            for half, shape in shapes.items()
        }
        weights = LoraWeights(LORA_CONFIG, tensors)
    rows = 1 if sharing == "shared" else K
    masks = None if noise else torch.randn(rows, D, generator=generator)
    return Adapter(masks, metadata, weights, head_tensors(generator) if head else None)


def head_tensors(generator=None) -> dict[str, torch.Tensor]:
    shapes = {"inner.weight": (W, H + D), "inner.bias": (W,), "outer.weight": (H, W)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def same(one: Adapter, other: Adapter) -> bool:
    """Bitwise equality of everything but the list of files."""
    if (one.lora is None) != (other.lora is None):
        return False
    if not same_tensors(one.head, other.head):
        return False
    if one.lora is not None and other.lora is not None:
        if one.lora.config != other.lora.config or one.lora.tensors.keys() != other.lora.tensors.keys():
            return False
        if not all(torch.equal(one.lora.tensors[key], other.lora.tensors[key]) for key in one.lora.tensors):
            return False
    described = [a.metadata.model_copy(update={"files": {}}) for a in (one, other)]
    masks = [None if a.mask_embeddings is None else {"masks": a.mask_embeddings} for a in (one, other)]
    return described[0] == described[1] and same_tensors(*masks)


def same_tensors(one: dict | None, other: dict | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def refusal(folder) -> str:
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files_of_adapter(lora):
    return {"pardec.json", "mask_embeddings.safetensors"} | (LORA_FILES if lora else set())
