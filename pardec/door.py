"""The body of `hf_model.generate(custom_generate=model)`: transformers' arguments in, transformers' result out.

Maps processors, stopping criteria and left padding onto the step loop. Legend: B batch, S prompt length.
"""

from collections.abc import Mapping
from contextlib import closing

import torch
from torch import Tensor
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from pardec.decoding.engine import Engine
from pardec.decoding.engines import Engines
from pardec.decoding.sampling import TokenLaw
from pardec.decoding.state import DecodeState
from pardec.decoding.verify import Verification
from pardec.draft_tree import AnyTree
from pardec.errors import shown
from pardec.target.base import pad_token_id

# these compare the length of a row with one that counts the batch's padding
_LENGTH_COUNTING = (
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
)
# these keep state from step to step, so they cannot be asked about drafts that may fall
_ORDERED = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)
# these tell rows apart by their index in the batch
_BY_INDEX = (
    PrefixConstrainedLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EncoderNoRepeatNGramLogitsProcessor,
)
# these make `generate` decode in another way than the loop does, which knows greedy search and sampling
_OF_THE_MODE = (
    "num_beams",
    "num_beam_groups",
    "constraints",
    "force_words_ids",
    "penalty_alpha",
    "dola_layers",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
)
# with any other value of these `generate` would return more, draw by another law, or keep its cache elsewhere
_USUAL = {
    "output_scores": (False,),
    "output_logits": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "is_assistant": (False,),
    "assistant_ensemble_weight": (),
    "cache_implementation": ("dynamic", "static", "hybrid", "hybrid_chunked", "sliding_window"),
}
# what `generate` hands on for a forward and the loop makes itself, beside what it is told of
_OWN_INPUTS = ("use_cache", "logits_to_keep", "cache_position", "return_dict")


def generate_for_transformers(
    engines: Engines,
    input_ids: Tensor,
    processors: list[LogitsProcessor],
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values,
    other_inputs: Mapping[str, object],
    num_speculative_tokens: int | None,
    mode: str | None,
    use_head: bool | None,
    verification: Verification,
    copy_tokens: int | None,
    tree: AnyTree | None,
    streamer,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Ids as `generate` returns them: prompt and continuation, [B, S + new], padded on the right.

    Processors and stopping criteria are called row by row; processors see a row without its padding.

    Raises:
        ValueError: for every mode but greedy search and sampling, inputs of another kind, a filled cache, padding
            that is not on the left, a streamer with several rows, or a processor that counts padding in a padded batch.
    """
    _refuse_config(generation_config)
    _refuse_inputs(input_ids, past_key_values, other_inputs, streamer)
    prompts = _unpadded(input_ids, attention_mask)
    _refuse_positions(input_ids, attention_mask, position_ids)
    _refuse_processors(processors, [len(prompt) for prompt in prompts], input_ids.shape[1])
    max_new_tokens, eos, others = _limits(stopping_criteria, input_ids.shape[1])
    generator = engines.generator() if generation_config.do_sample else None
    law = TokenLaw(not generation_config.do_sample, tuple(_without_padding(p) for p in processors), generator)
    asked = (mode, num_speculative_tokens, None, use_head, verification, copy_tokens, tree)
    drafting = engines.drafting(*asked, num_sequences=len(prompts), is_greedy=law.greedy)
    ends = RowEnds(others, input_ids, pads=any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria))
    with engines.lend(prompts, law, max_new_tokens, drafting, eos=eos) as engine:
        new, num_new = _decode(engine, prompts, input_ids, ends, streamer)
    width = int(num_new.max())
    pad = generation_config._pad_token_tensor  # type: ignore[attr-defined]
    fill = pad_token_id(engines.target.base) if pad is None else int(pad)
    new = new[:, :width].masked_fill(torch.arange(width) >= num_new[:, None], fill)
    sequences = torch.cat([input_ids, new.to(input_ids.device)], dim=1)
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
    return sequences


def _decode(
    engine: Engine, prompts: list[list[int]], input_ids: Tensor, ends: "RowEnds", streamer
) -> tuple[Tensor, Tensor]:
    """New ids, shape [B, n], and how many of each row count, shape [B]; `ends` may end rows at any of them."""
    B, checked = len(prompts), [0] * len(prompts)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    between = "writes" if ends.criteria else "nothing" if streamer is None else "reads"
    with closing(engine.run(prompts, between=between)) as steps:
        for step in steps:
            num_new = step.num_new
            assert engine.state is not None
            if ends.criteria:
                ends.apply(engine.state, checked)
                num_new = engine.state.num_new.tolist()[:B]
            if streamer is not None:
                for token in step.tokens[0][: num_new[0] - checked[0]]:
                    streamer.put(torch.tensor([token]))
            checked = num_new
            if ends.criteria and bool(engine.state.done[:B].all()):
                break
    assert engine.state is not None
    if streamer is not None:
        streamer.end()
    return engine.state.output[:B].cpu(), engine.state.num_new[:B].cpu()


def _refuse_config(generation_config: GenerationConfig) -> None:
    """What `generate` would do otherwise than greedily or by sampling, or would return besides the ids."""
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        values = {name: getattr(generation_config, name, None) for name in _OF_THE_MODE}
        found = ", ".join(
            f"{name}={shown(value)}" for name, value in values.items() if value is True or (value or 1) != 1
        )
        raise ValueError(
            f"custom_generate: expected greedy search or sampling, found {mode.value} by {found or 'default'}"
        )
    for name, usual in _USUAL.items():
        value = getattr(generation_config, name, None)
        if value is not None and value not in usual:
            expected = " or ".join(map(str, usual)) or "None"
            raise ValueError(f"custom_generate: expected {name}={expected}, found {shown(value)}")


def _refuse_inputs(input_ids: Tensor, past_key_values, other_inputs: Mapping[str, object], streamer) -> None:
    for name, value in other_inputs.items():
        if value is not None and name not in _OWN_INPUTS:
            raise ValueError(f"custom_generate: expected input_ids and their attention_mask alone, found {name}")
    if past_key_values is not None and past_key_values.get_seq_length() > 0:
        raise ValueError(
            f"custom_generate: expected an empty cache, found one of {past_key_values.get_seq_length()} tokens"
        )
    if streamer is not None and input_ids.shape[0] != 1:
        raise ValueError(f"streamer: expected one prompt, found {input_ids.shape[0]}")


def _refuse_positions(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
    """Positions other than those that follow from the padding would be ignored by the loop."""
    if position_ids is None:
        return
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    if not torch.equal((position_ids * mask), (mask.cumsum(dim=1) - 1) * mask):
        raise ValueError("custom_generate: expected position_ids that count each row's tokens from 0, found others")


def _refuse_processors(processors: list[LogitsProcessor], lengths: list[int], width: int) -> None:
    """Processors that must see every step once and in order, that know rows by their index, or count padding.

    `lengths` are of the prompts without the padding that brings them to `width`.
    """
    for processor in processors:
        name = type(processor).__name__
        if isinstance(processor, _ORDERED):
            raise ValueError(f"custom_generate: expected processors without state, found {name}")
        if isinstance(processor, _BY_INDEX) and len(lengths) > 1:
            raise ValueError(f"custom_generate: expected one row with {name}, found {len(lengths)}")
    counting = [type(p).__name__ for p in processors if isinstance(p, _LENGTH_COUNTING)]
    if counting and min(lengths) < width:
        raise ValueError(
            f"custom_generate: expected prompts of one length with {counting[0]}, which counts padding, "
            f"found lengths {min(lengths)} to {max(lengths)}"
        )


def _unpadded(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    if not input_ids.shape[1]:
        raise ValueError(f"input_ids: expected at least one token in each row, found shape {list(input_ids.shape)}")
    if attention_mask is None:
        return input_ids.tolist()
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected shape {list(input_ids.shape)}, that of input_ids, found "
            f"{list(attention_mask.shape)}"
        )
    mask = attention_mask.bool()
    if not bool(mask.any(dim=1).all()):
        raise ValueError("attention_mask: expected at least one token in each row, found a row of zeros")
    if not bool((mask[:, 1:] >= mask[:, :-1]).all() and mask[:, -1].all()):
        raise ValueError("attention_mask: expected padding on the left only, found zeros behind ones")
    return [row[keep].tolist() for row, keep in zip(input_ids, mask, strict=True)]


def _without_padding(processor: LogitsProcessor) -> LogitsProcessor:
    """The processor for rows without padding, where transformers made one that skips each row's padding."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    if isinstance(processor, RepetitionPenaltyLogitsProcessor) and isinstance(ignored, Tensor):
        return RepetitionPenaltyLogitsProcessor(processor.penalty)
    return processor


def _limits(criteria: StoppingCriteriaList, prompt_length: int) -> tuple[int, list[int], StoppingCriteriaList]:
    """(max_new_tokens, EOS ids, every other criterion)."""
    max_length, eos, others = None, [], StoppingCriteriaList()
    for criterion in criteria:
        if isinstance(criterion, MaxLengthCriteria):
            max_length = min(filter(None, (max_length, criterion.max_length)))
        elif isinstance(criterion, EosTokenCriteria):
            eos += criterion.eos_token_id.flatten().tolist()
        else:
            others.append(criterion)
    if max_length is None:
        raise ValueError("custom_generate: expected max_new_tokens or max_length, found neither")
    return max_length - prompt_length, eos, others


class RowEnds:
    """Where a user's own stopping criteria end rows, called row by row.

    Attributes:
        criteria: others than the end of a text and the length; may look at the last token.
    """

    def __init__(self, criteria: StoppingCriteriaList, input_ids: Tensor, *, pads: bool):
        """Takes what `generate` would go by.

        Args:
            criteria: as above.
            input_ids: prompts, shape [B, S].
            pads: rows that have ended are padded; where no id ends a text `generate` lets them go on until all have.
        """
        self.criteria, self._input_ids, self._pads = criteria, input_ids, pads
        self._met: list[int | None] = [None] * input_ids.shape[0]

    def apply(self, state: DecodeState, checked: list[int]) -> None:
        """Ends a row at the first of its new tokens at which a criterion is met, of which `checked` were looked at."""
        S = self._input_ids.shape[1]
        for b, done_before in enumerate(checked):
            if self._met[b] is not None:
                continue
            row = torch.cat([self._input_ids[b], state.output[b].to(self._input_ids.device)])[None]
            for n in range(done_before + 1, int(state.num_new[b]) + 1):
                if bool(self.criteria(row[:, : S + n], None).all()):  # type: ignore[arg-type]
                    self._met[b] = n
                    if self._pads:
                        _end(state, b, n)
                    break
        met = [n for n in self._met if n is not None]
        if not self._pads and len(met) == len(checked) and int(state.num_new[: len(checked)].min()) >= max(met):
            for b in range(len(checked)):
                _end(state, b, max(met))


def _end(state: DecodeState, b: int, num_new: int) -> None:
    state.num_new[b] = num_new
    state.done[b], state.room[b] = True, 0
