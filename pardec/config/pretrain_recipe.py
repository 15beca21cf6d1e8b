"""The recipe of `train/pretrain_base.py`: sizes, text and schedule of a base model trained from scratch."""

from pydantic import Field, model_validator

from pardec.config.recipe_files import MixedPrecision, Section
from pardec.errors import shown


class SourcesConfig(Section):
    """What is trained on.

    Attributes:
        path: a folder of Python sources, `python-stdlib` for the running interpreter's library, or
            `python-packages` for the packages installed for it.
        max_length: tokens of a training sequence.
        max_characters: no more training text than this is used, files drawn at random; default all.
    """

    path: str
    max_length: int = Field(default=512, ge=8)
    max_characters: int | None = Field(default=None, ge=1)


class TokenizerConfig(Section):
    """The byte-level BPE.

    Attributes:
        vocab_size: with the 256 bytes and `<|endoftext|>`.
    """

    vocab_size: int = Field(default=4096, ge=257)


class ModelConfig(Section):
    """Sizes, with the keys of the model's own config.json."""

    hidden_size: int = Field(default=256, ge=2)
    num_hidden_layers: int = Field(default=6, ge=1)
    num_attention_heads: int = Field(default=4, ge=1)
    num_key_value_heads: int = Field(default=2, ge=1)
    intermediate_size: int = Field(default=704, ge=1)
    max_position_embeddings: int = Field(default=2048, ge=8)
    tie_word_embeddings: bool = True

    @model_validator(mode="after")
    def _heads_fit(self) -> "ModelConfig":
        size, heads, kv_heads = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        if size % (2 * heads):
            raise ValueError(
                f"model.hidden_size: expected a multiple of 2 x {heads} (num_attention_heads), found {size}"
            )
        if heads % kv_heads:
            raise ValueError(
                f"model.num_attention_heads: expected a multiple of {kv_heads} (num_key_value_heads), found {heads}"
            )
        return self


class ScheduleConfig(Section):
    """How it is trained.

    Attributes:
        steps: optimiser steps.
        batch_size: sequences per process and forward.
        gradient_accumulation_steps: forwards per step.
        muon_learning_rate: of the matrices inside the layers.
        learning_rate: AdamW's, of embeddings and norms.
        decay_share: rates are constant, then fall linearly to 0 over this last share of the steps.
        weight_decay: of the matrices inside the layers.
        max_grad_norm: gradients are clipped to this norm.
        mixed_precision: `auto` is bf16 where the device computes in it, else no.
        seed: of initial weights and data order.
        log_every: steps between logged losses.
        checkpoint_every: steps between resumable checkpoints.
    """

    steps: int = Field(default=2450, ge=1)
    batch_size: int = Field(default=16, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    muon_learning_rate: float = Field(default=0.02, gt=0)
    learning_rate: float = Field(default=4e-3, gt=0)
    decay_share: float = Field(default=0.4, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    mixed_precision: MixedPrecision = "auto"
    seed: int = Field(default=0, ge=0)
    log_every: int = Field(default=10, ge=1)
    checkpoint_every: int = Field(default=250, ge=1)


class HeldOutConfig(Section):
    """How the held-out loss is measured.

    Attributes:
        every: steps between measurements on the validation split; both splits are measured at the end.
        max_tokens: per split, taken evenly.
    """

    every: int = Field(default=250, ge=1)
    max_tokens: int = Field(default=200_000, ge=1)


class PretrainRecipe(Section):
    """Everything that a pretraining run is told.

    Attributes:
        output_dir: where the model is left.
    """

    output_dir: str
    data: SourcesConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    train: ScheduleConfig = ScheduleConfig()
    eval: HeldOutConfig = HeldOutConfig()

    @model_validator(mode="after")
    def _lengths_fit(self) -> "PretrainRecipe":
        limit, length = self.model.max_position_embeddings, self.data.max_length
        if length > limit:
            raise ValueError(
                f"data.max_length: expected at most {limit} (model.max_position_embeddings), found {shown(length)}"
            )
        return self
