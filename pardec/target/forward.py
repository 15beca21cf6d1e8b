"""One forward of an unmodified Hugging Face causal model over rows at chosen positions with a chosen visibility.

Training and decoding go through here. Knows how attention masks must look for a model; knows no layout, no adapter.
Legend: B batch, R rows (queries), S keys, D width of an input embedding, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, modeling_utils
from transformers.cache_utils import Cache

from pardec.target.hidden import HiddenTap, rows_of_each

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
SUPPORTED_LAYER_TYPES = (FULL, SLIDING, CHUNKED)
SUPPORTED_ATTENTION = ("sdpa", "eager")
# their frequencies depend on the largest position of a call
_SWITCHING_ROPE = ("dynamic", "longrope")


# older versions of transformers take one `logits_to_keep` for all sequences only
_TAKES_ROWS_OF_EACH = hasattr(modeling_utils, "slice_logits_to_keep")


class UnsupportedModelError(ValueError):
    """The model cannot be decoded or trained exactly; the message says why."""


@dataclass(frozen=True)
class AttentionForm:
    """The form in which a model takes an explicit attention mask.

    Attributes:
        layer_types: the kinds of attention layers that the model mixes.
        window: sliding window in tokens, counted in positions; None without one.
        chunk: chunk of chunked attention in tokens; None without one.
        additive: masks are floats to be added to the scores (eager) instead of booleans (sdpa).
    """

    layer_types: tuple[str, ...]
    window: int | None
    chunk: int | None
    additive: bool

    def render(
        self, visible: Tensor, query_positions: Tensor, key_positions: Tensor, dtype: torch.dtype
    ) -> Tensor | dict[str, Tensor]:
        """The `attention_mask` argument for a visibility, one for each kind of layer where the model mixes them.

        Args:
            visible: shape [B, R, S], bool, causality and structure, no windows.
            query_positions: shape [B, R].
            key_positions: shape [B, S].
            dtype: of the model's activations; what an additive mask is made in.
        """
        masks = {}
        for kind in self.layer_types:
            seen = visible
            if kind == SLIDING:
                assert self.window is not None
                first_seen = query_positions - (self.window - 1)
                seen = visible & (key_positions[:, None, :] >= first_seen[:, :, None])
            elif kind == CHUNKED:
                assert self.chunk is not None
                same = (query_positions // self.chunk)[:, :, None] == (key_positions // self.chunk)[:, None, :]
                seen = visible & same
            if self.additive:
                # eager attention adds the mask to the scores; a boolean one would be wrong without an error
                zeros = torch.zeros((), dtype=dtype, device=seen.device)
                masks[kind] = torch.where(seen, zeros, torch.finfo(dtype).min)[:, None]
            else:
                masks[kind] = seen[:, None]
        return masks if len(masks) > 1 else masks[self.layer_types[0]]


def text_config(base: PreTrainedModel):
    """The configuration of the language model inside `base` (itself, for a text-only model)."""
    return base.config.get_text_config(decoder=True)


def config_value(config, name: str):
    """A value of a configuration, None where it has none, or another one for each layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError, which newer versions have
        return None


def attention_form(base: PreTrainedModel) -> AttentionForm:
    """Reads from the configuration how `base` takes attention masks.

    Raises:
        UnsupportedModelError: for layers that carry state other than keys and values, and attention
            implementations other than sdpa and eager.
    """
    config = text_config(base)
    window = config_value(config, "sliding_window")
    kinds = config_value(config, "layer_types")
    # without layer_types a configured window holds for every layer
    layer_types = tuple(sorted(set(kinds))) if kinds else (SLIDING if window else FULL,)
    unknown = [kind for kind in layer_types if kind not in SUPPORTED_LAYER_TYPES]
    if unknown:
        raise UnsupportedModelError(
            f"layers of kind {', '.join(unknown)} keep state that cannot be rolled back; expected only "
            f"{', '.join(SUPPORTED_LAYER_TYPES)}"
        )
    implementation = config._attn_implementation
    if implementation not in SUPPORTED_ATTENTION:
        raise UnsupportedModelError(
            f"attention implementation {implementation!r} takes no explicit mask; expected one of "
            f"{', '.join(SUPPORTED_ATTENTION)} (attn_implementation=)"
        )
    chunk = config_value(config, "attention_chunk_size")
    return AttentionForm(layer_types, window, chunk, additive=implementation == "eager")


@dataclass(frozen=True)
class TargetModel:
    """A frozen base model and what is needed to run rows through it.

    Outside of pardec `base` stays exactly what it was.
    """

    base: PreTrainedModel
    attention: AttentionForm

    @classmethod
    def wrap(cls, base: PreTrainedModel) -> "TargetModel":
        """`base` with its attention form read from its configuration."""
        return cls(base, attention_form(base))

    @property
    def device(self) -> torch.device:
        """Where input embeddings live."""
        return embedding_weight(self.base).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the input embeddings and so of the activations."""
        return embedding_weight(self.base).dtype

    @property
    def num_layers(self) -> int:
        """Attention layers, each with a slot in the cache."""
        return text_config(self.base).num_hidden_layers

    @property
    def vocab_size(self) -> int:
        """V, width of the logits."""
        return text_config(self.base).vocab_size

    @property
    def embedding_dim(self) -> int:
        """D, width of an input embedding; where it is projected this is not the hidden size."""
        return embedding_weight(self.base).shape[1]

    @property
    def max_positions(self) -> int | None:
        """Positions that any row may take; see `position_limit`."""
        return position_limit(self.base)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Input embeddings of real tokens, in the space of the embedding module's output (scaled, where it scales)."""
        return self.base.get_input_embeddings()(token_ids)

    def clamp_positions(self, positions: Tensor) -> Tensor:
        """Rows that can no longer be emitted may lie beyond the model's positions; they must stay computable."""
        limit = self.max_positions
        return positions if limit is None else positions.clamp_max(limit - 1)

    def run(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | Mapping[str, Tensor] | None,
        cache: Cache,
        logits_to_keep: Tensor | int = 0,
    ) -> Tensor:
        """Logits of the rows.

        Args:
            inputs_embeds: shape [B, R, D].
            position_ids: shape [B, R], int64.
            attention_mask: from `AttentionForm.render`; None for a causal prefill.
            cache: takes the rows' keys and values.
            logits_to_keep: rows whose logits are wanted, shape [n], or [B, n] by `run_at`; 0 for all.

        Returns:
            shape [B, n, V].
        """
        # lm_head is never called directly: some models scale around it
        return self.base(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        ).logits

    def run_at(
        self,
        rows: Tensor,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | Mapping[str, Tensor] | None,
        cache: Cache,
        tap: HiddenTap | None = None,
        *,
        rising: bool = False,
    ) -> Tensor:
        """Logits of rows that differ between sequences, shape [B, n, V]; `rows`, shape [B, n], the rest as in `run`.

        A `tap` that is attached keeps the hidden states of the same rows. With `rising`, where the rows of a sequence
        rise, none of them twice, nothing waits for the device to tell which they are.
        """
        where = None
        if rows.shape[0] > 1 and _TAKES_ROWS_OF_EACH:
            asked = rows
        elif rows.shape[0] == 1 and rising:
            asked = rows[0]
        else:  # one set of rows for all sequences, out of which each takes its own
            asked = rows.unique()
            where = torch.searchsorted(asked, rows)
        logits = self.run(inputs_embeds, position_ids, attention_mask, cache, logits_to_keep=asked)
        if logits.shape[1] != asked.shape[-1]:  # models that know no logits_to_keep give the logits of all rows
            where = rows
        if where is None:
            return logits
        if tap is not None:
            tap.keep(where)
        return rows_of_each(logits, where)


def position_limit(base: PreTrainedModel) -> int | None:
    """Number of positions that prompt and new tokens may take together; None if the model names no limit.

    Rope types whose frequencies depend on the largest position of a call are held below the point of change.
    """
    config = text_config(base)
    limit = config_value(config, "max_position_embeddings")
    rope = config_value(config, "rope_parameters") or {}
    nested = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    for parameters in nested:
        if parameters.get("rope_type") in _SWITCHING_ROPE:
            original = parameters.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            limit = min(filter(None, (limit, original)), default=None)
    return limit if limit is None or limit > 0 else None  # some say -1 where there is none


def embedding_weight(base: PreTrainedModel) -> Tensor:
    """The table of input embeddings, one row per token id."""
    return cast(Tensor, base.get_input_embeddings().weight)
