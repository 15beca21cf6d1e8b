"""An adapter in memory: mask embeddings, a gated LoRA, a sampler head, and their provenance.

Legend: K num_speculative_tokens, D width of an input embedding, H of a hidden state, W of the head.
"""

import os
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictInt
from torch import Tensor

from pardec.adapters.gated_lora import LoraWeights, check_numbers
from pardec.errors import short
from pardec.layout import MAX_SPECULATIVE_TOKENS
from pardec.target.fingerprint import Fingerprint

FORMAT_VERSION = 1
HEAD_TENSORS = ("inner.bias", "inner.weight", "outer.weight")
_PATH = "^[^/]{0,255}(/[^/]{0,255})*$"  # what a file system can be asked for
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
MASK_EMBEDDINGS, UNIFORM_NOISE = "mask_embeddings", "uniform_noise"  # what may stand at mask rows


class AdapterError(ValueError):
    """An adapter directory that cannot be used; the message says what was expected and what was found."""


class BaseReference(BaseModel):
    """Where the base was loaded from."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=4095, pattern=_PATH)
    revision: str | None = None

    @property
    def public_name(self) -> str:
        """The name as others may read it: of a folder or file of the machine that trained, its last part alone."""
        path = os.path.expanduser(self.name)
        is_local = os.path.isabs(path) or self.name.startswith(".") or self.name.endswith(".gguf")
        if not is_local and not os.path.exists(path):
            return self.name
        return os.path.basename(os.path.abspath(path)) or "base"


class HeadShape(BaseModel):
    """Sizes of a sampler head.

    Attributes:
        width: W.
        shortlist: tokens of each mask row that it scores.
    """

    model_config = ConfigDict(extra="forbid")

    width: int = Field(ge=1, lt=2**31)
    shortlist: int = Field(ge=1, lt=2**31)


class AdapterMetadata(BaseModel):
    """Content of `pardec.json`.

    Attributes:
        num_speculative_tokens: K that the adapter was trained with.
        mask_sharing: one embedding per position, or one for all.
        draft_input: what stands at mask rows: mask embeddings, or embeddings of uniformly random tokens.
        head: of the sampler head; None without one, and then not written, as older versions know no such key.
        base: where the base was loaded from.
        fingerprint: what identifies the base.
        training: objective, data, command, git commit, library versions, steps.
        measured: acceptance of the real decoder on validation prompts.
        files: sha256 of every other file.
    """

    model_config = ConfigDict(extra="forbid")

    format_version: int = FORMAT_VERSION
    num_speculative_tokens: StrictInt = Field(ge=1, le=MAX_SPECULATIVE_TOKENS)
    mask_sharing: Literal["distinct", "shared"] = "distinct"
    draft_input: Literal["mask_embeddings", "uniform_noise"] = MASK_EMBEDDINGS
    head: HeadShape | None = None
    base: BaseReference
    fingerprint: Fingerprint
    training: dict[str, Any] = {}
    measured: dict[str, Any] = {}
    files: dict[str, Sha256] = {}


@dataclass(frozen=True)
class Adapter:
    """Learned numbers and where they come from.

    Attributes:
        mask_embeddings: shape [K, D], or [1, D] if shared, in the space of the embedding module's output.
            None where random tokens stand at mask rows.
        metadata: provenance.
        lora: the gated LoRA, or None.
        head: weights of the sampler head, by name: inner.weight [W, H + D], inner.bias [W],
            outer.weight [H, W]; or None.

    Raises:
        AdapterError: for parts that do not fit each other.
    """

    mask_embeddings: Tensor | None
    metadata: AdapterMetadata
    lora: LoraWeights | None = None
    head: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.metadata.draft_input == UNIFORM_NOISE:
            if self.mask_embeddings is not None:
                shape = list(self.mask_embeddings.shape)
                raise AdapterError(f"mask embeddings: expected none with draft_input {UNIFORM_NOISE}, found {shape}")
            if self.lora is None:
                raise AdapterError(
                    f"lora: expected one with draft_input {UNIFORM_NOISE}, as all is learned by it, found none"
                )
        else:
            _check_mask_embeddings(self.mask_embeddings, self.metadata)
        _check_head(self.head, self.metadata.head)

    def rounded(self, dtype: torch.dtype) -> "Adapter":
        """The same with every number in this dtype."""
        masks, lora, head = self.mask_embeddings, self.lora, self.head
        return replace(
            self,
            mask_embeddings=None if masks is None else masks.to(dtype),
            lora=None if lora is None else LoraWeights(lora.config, {k: v.to(dtype) for k, v in lora.tensors.items()}),
            head=None if head is None else {name: tensor.to(dtype) for name, tensor in head.items()},
        )

    @property
    def has_distinct_masks(self) -> bool:
        """Whether there is a mask token of its own for each draft, so that no more can be drafted."""
        return self.mask_embeddings is not None and self.metadata.mask_sharing != "shared"

    def embeddings_for(self, num_speculative_tokens: int) -> Tensor:
        """Mask embeddings of shape [num_speculative_tokens, D].

        Raises:
            ValueError: if there are none, or more are asked for than were trained and they are distinct.
        """
        if self.mask_embeddings is None:
            raise ValueError(f"mask embeddings: expected some, found draft_input {self.metadata.draft_input}")
        trained = self.metadata.num_speculative_tokens
        if self.metadata.mask_sharing == "shared":
            return self.mask_embeddings.expand(num_speculative_tokens, -1)
        if num_speculative_tokens > trained:
            raise ValueError(
                f"num_speculative_tokens: expected at most {trained}, the number of distinct mask tokens that the "
                f"adapter was trained with, found {num_speculative_tokens}"
            )
        return self.mask_embeddings[:num_speculative_tokens]


def _check_mask_embeddings(mask_embeddings: Tensor | None, metadata: AdapterMetadata) -> None:
    rows = 1 if metadata.mask_sharing == "shared" else metadata.num_speculative_tokens
    if mask_embeddings is None or mask_embeddings.dim() != 2 or mask_embeddings.shape[0] != rows:
        raise AdapterError(
            f"mask embeddings: expected shape [{rows}, D] for {metadata.mask_sharing} mask tokens with "
            f"num_speculative_tokens {metadata.num_speculative_tokens}, "
            f"found {'none' if mask_embeddings is None else list(mask_embeddings.shape)}"
        )
    _check_numbers("mask embeddings", mask_embeddings)


def _check_head(head: dict[str, Tensor] | None, shape: HeadShape | None) -> None:
    if head is None or shape is None:
        if head is not shape:
            found = "weights without the key head in pardec.json" if shape is None else "that key without weights"
            raise AdapterError(f"head: expected weights and the key head in pardec.json, or neither, found {found}")
        return
    if sorted(head) != sorted(HEAD_TENSORS):
        found = short(", ".join(sorted(head)) or "nothing", 150)
        raise AdapterError(f"head: expected {', '.join(HEAD_TENSORS)}, found {found}")
    shapes, W = {name: list(head[name].shape) for name in HEAD_TENSORS}, shape.width
    H, both = shapes["outer.weight"][:1], shapes["inner.weight"][1:]
    expected = {"inner.bias": [W], "inner.weight": [W, *both], "outer.weight": [*H, W]}
    if shapes != expected or not [0] < H < both:
        raise AdapterError(
            f"head: expected inner.bias [{W}], inner.weight [{W}, H + D], outer.weight [H, {W}], found {shapes}"
        )
    for name in HEAD_TENSORS:
        _check_numbers(f"head: {name}", head[name])


def _check_numbers(what: str, tensor: Tensor) -> None:
    try:
        check_numbers(what, tensor)
    except ValueError as error:
        raise AdapterError(str(error)) from None
