"""Tells whether a base model is the one that an adapter was trained for.

Fingerprints depend on neither dtype nor library version, so a downcast or quantised copy of the same base passes.
"""

import hashlib
import json
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pardec.errors import short, shown
from pardec.target.forward import config_value, embedding_weight, text_config

NUM_ROWS = 64
# what the parts of an adapter are shaped by; a fine-tune may have more tokens or positions than what it was tuned from
_SHAPE = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_SIZES = (*_SHAPE, "vocab_size", "max_position_embeddings")


class Fingerprint(BaseModel):
    """What identifies a base.

    Attributes:
        embedding_rows: sha256 of 64 evenly spaced input embedding rows, cast to bfloat16.
        embedding_sample: one number of each of those rows, for copies in float16, whose cast rounds differently.
        architecture: sizes, rope and window parameters.
        architecture_sha256: of their JSON.
        tokenizer: sha256 of the sorted vocabulary; None if the base came without a tokenizer.
    """

    model_config = ConfigDict(extra="forbid")

    embedding_rows: str
    embedding_sample: list[float]
    architecture: dict[str, Any]
    architecture_sha256: str
    tokenizer: str | None

    @property
    def digest(self) -> str:
        """SHA-256 of all of it that is the same for every copy of the base on this device."""
        return _sha256(f"{self.embedding_rows} {self.architecture_sha256} {self.tokenizer}".encode())


def fingerprint(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Fingerprint:
    """The fingerprint of a base and of the tokenizer that goes with it."""
    rows = _fixed_rows(base)
    as_bfloat16 = rows.to(torch.bfloat16).view(torch.uint8).contiguous()
    architecture = _architecture(base)
    vocabulary = None if tokenizer is None else _sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    return Fingerprint(
        embedding_rows=_sha256(bytes(as_bfloat16.flatten().tolist())),
        embedding_sample=_sample(rows).tolist(),
        architecture=architecture,
        architecture_sha256=_sha256(json.dumps(architecture, sort_keys=True).encode()),
        tokenizer=vocabulary,
    )


def differences(expected: Fingerprint, found: Fingerprint, found_dtype: torch.dtype) -> list[str]:
    """What makes `found` another base than `expected`, in words; empty for the same base."""
    lines = []
    for key in sorted(expected.architecture.keys() | found.architecture.keys()):
        want, have = expected.architecture.get(key), found.architecture.get(key)
        if want != have:
            lines.append(f"{short(key)}: expected {shown(want)}, found {shown(have)}")
    if not lines and expected.embedding_rows != found.embedding_rows:
        want, have = torch.tensor(expected.embedding_sample), torch.tensor(found.embedding_sample)
        # float16 keeps 11 significant bits, and steps of 2^-24 near zero
        rounding = want.abs() * 2**-11 + 2**-24
        if found_dtype != torch.float16 or bool(((want - have).abs() > rounding).any()):
            wanted = short(expected.embedding_rows[:12])
            lines.append(f"input embeddings: expected sha256 {wanted}, found {found.embedding_rows[:12]}")
    if expected.tokenizer and found.tokenizer and expected.tokenizer != found.tokenizer:
        lines.append(
            f"tokenizer vocabulary: expected sha256 {short(expected.tokenizer[:12])}, found {found.tokenizer[:12]}"
        )
    return lines


def shape_difference(expected: Fingerprint, found: Fingerprint) -> str | None:
    """The first difference, in words, for which `found` cannot take the parts of an adapter of `expected`, or None."""
    for key in _SHAPE:
        want, have = expected.architecture.get(key), found.architecture.get(key)
        if want != have:
            return f"{key}: expected {shown(want)}, found {shown(have)}"
    return None


def _fixed_rows(base: PreTrainedModel) -> Tensor:
    weight = embedding_weight(base).detach()
    index = torch.linspace(0, text_config(base).vocab_size - 1, NUM_ROWS, dtype=torch.float64).long()
    return weight[index.to(weight.device)].float().cpu()


def _sample(rows: Tensor) -> Tensor:
    index = torch.arange(rows.shape[0])
    return rows[index, index % rows.shape[1]]


def _architecture(base: PreTrainedModel) -> dict[str, Any]:
    config = text_config(base)
    values: dict[str, Any] = {key: config_value(config, key) for key in _SIZES}
    kinds = sorted(set(config_value(config, "layer_types") or []))
    windowed = "sliding_attention" in kinds or not kinds
    values["sliding_window"] = config_value(config, "sliding_window") if windowed else None
    rope = config_value(config, "rope_parameters") or {}
    # models with several kinds of layers nest one set of parameters under each kind
    nested = {k: v for k, v in rope.items() if isinstance(v, dict)} or {"all": rope}
    values["rope"] = {
        kind: {key: parameters.get(key) for key in ("rope_type", "rope_theta", "factor")}
        for kind, parameters in sorted(nested.items())
    }
    return values


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
