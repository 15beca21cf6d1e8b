"""How an adapter is learned: the section `train` of its recipe."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pardec.config.recipe_files import MixedPrecision, Section
from pardec.errors import shown
from pardec.training.loss import WEIGHT_RULES


def _number_or_rule(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) and value not in WEIGHT_RULES else value
    except ValueError:
        rules = ", ".join(WEIGHT_RULES)
        raise ValueError(
            f"train.position_weights: expected a number, numbers or {rules}, found {shown(value)}"
        ) from None


# YAML leaves 3e-1 a string
PositionWeights = Annotated[
    float | list[float] | Literal["expected_length", "prefix_product"], BeforeValidator(_number_or_rule)
]


class KeepSection(Section):
    """Nested token dropping: at depth j only max(floor, ratio^(j-1)) of the blocks keep their mask token.

    Attributes:
        ratio: 1 keeps everything.
        floor: see above.
    """

    ratio: float = Field(default=1.0, gt=0, le=1)
    floor: float = Field(default=0.2, ge=0, le=1)


def default_anchors(max_length: int) -> int:
    """Anchors of a sequence where a recipe names no number.

    Args:
        max_length: tokens of a sequence.
    """
    return max(1, max_length // 2)


class TrainConfig(Section):
    """How it is learned.

    Attributes:
        steps: optimiser steps.
        batch_size: sequences per process and forward.
        gradient_accumulation_steps: forwards per step.
        anchors_per_sequence: blocks of mask tokens per sequence; default by data.max_length, see `default_anchors`.
        anchors_per_forward: run so many of them at a time against the same prefix, to save memory.
        gradient_checkpointing: so large a share of the layers, 0 to 1 or true for all, keep no activations of mask rows
            and make them again for the gradient: less memory, more time, the same gradients.
        learning_rate: of the mask embeddings.
        lora_learning_rate: of the LoRA.
        frozen: parts that stay as `adapter.start_from` has them.
        warmup_steps: linear warm-up before the cosine decay.
        max_grad_norm: gradients are clipped to this norm.
        head_learning_rate: of the sampler head.
        objective: `kl` to the model's own distribution, `cross_entropy` on data tokens, `cross_entropy_argmax` on
            the model's likeliest token; `tv`, `cross_entropy_tv`, `lk` or `lk_hybrid`, which aim at acceptance when
            sampling; `accepted_length`, which aims at how many drafts of a block are accepted, for the model's own
            samples.
        position_weights: weight of each position; or one number d for weights d^0, d^1, ...; or weights that follow
            how far drafts are accepted, `expected_length` or `prefix_product`.
        temperature: at which draft and model are compared.
        top_k: so many of the model's likeliest tokens are what drafts learn to follow; default all.
        keep: nested token dropping, which makes deep blocks cheap.
        grow_speculative_tokens: how many mask tokens of each block are trained at first, then, .., and at last, which
            is K; an equal share of the steps each. Default K from the first step.
        mixed_precision: `auto` is bf16 where the device computes in it, else no.
        seed: of data order and anchors.
        log_every: steps between logged losses.
        shard_base: the frozen base's layers are shared out over all processes (true), or over those of each `machine`,
            instead of lying whole in each; for bases that are too large for one device.
        checkpoint_every: steps between resumable checkpoints.
        checkpoint_keep: so many of the newest stay.
        trackers: besides the JSONL file, e.g. tensorboard.
    """

    steps: int = Field(default=300, ge=1)
    batch_size: int = Field(default=4, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    anchors_per_sequence: int | None = Field(default=None, ge=1)
    anchors_per_forward: int | None = Field(default=None, ge=1)
    gradient_checkpointing: float = Field(default=0.0, ge=0, le=1)
    learning_rate: float = Field(default=1e-2, gt=0)
    lora_learning_rate: float = Field(default=3e-3, gt=0)
    head_learning_rate: float = Field(default=3e-3, gt=0)
    frozen: list[Literal["mask_embeddings", "lora", "head"]] = Field(default=[])
    warmup_steps: int = Field(default=20, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    objective: Literal[
        "kl", "cross_entropy", "cross_entropy_argmax", "tv", "cross_entropy_tv", "lk", "lk_hybrid", "accepted_length"
    ] = "kl"
    position_weights: PositionWeights = 1.0
    temperature: float = Field(default=1.0, gt=0)
    top_k: int | None = Field(default=None, ge=1)
    keep: KeepSection = KeepSection()
    grow_speculative_tokens: list[Annotated[int, Field(strict=True, ge=1)]] | None = Field(default=None, min_length=1)
    mixed_precision: MixedPrecision = "auto"
    seed: int = Field(default=0, ge=0, lt=2**32)
    log_every: int = Field(default=10, ge=1)
    shard_base: bool | Literal["machine"] = False
    checkpoint_every: int = Field(default=100, ge=1)
    checkpoint_keep: int = Field(default=1, ge=1)
    trackers: list[str] = Field(default=[])
