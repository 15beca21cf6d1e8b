"""The public model: a frozen base, its tokenizer and an adapter that drafts for it.

`generate`, `stream` and the door of `transformers.generate(custom_generate=model)` all run the loop of
`pardec.decode`. Legend: B prompts, S tokens of the longest sequence, K num_speculative_tokens.
"""

import copy
import operator
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pardec.adapter import Adapter, AdapterError, load_adapter
from pardec.base import eos_token_ids, load_base, load_tokenizer, pad_token_id, refuse_by_config
from pardec.decode import MODES, Decoder, DecodeState
from pardec.fingerprint import differences, fingerprint
from pardec.forward import TargetModel, embedding_weight
from pardec.gated_lora import LoraGate
from pardec.prepack import PackedLinears
from pardec.probe import probe
from pardec.sampling import TokenLaw, make_warpers
from pardec.stats import DecodeStats, SequenceCounts, pool

MAX_SPECULATIVE_TOKENS = 64  # a fused step has (K + 1)^2 rows
Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor


@dataclass(frozen=True)
class GenerationOutput:
    """What `generate` returns; always lists, one entry per sequence.

    Attributes:
        text: continuations without special tokens; empty if the base came without a tokenizer.
        token_ids: continuations, EOS included where it was met.
        sequences: prompts and continuations, right-padded, shape [B, S], int64.
        prompt_lengths: shape [B].
        stats: figures, pooled and per sequence.
        counts: the raw counts behind them.
    """

    text: list[str]
    token_ids: list[list[int]]
    sequences: Tensor
    prompt_lengths: Tensor
    stats: DecodeStats
    counts: list[SequenceCounts]


@dataclass(frozen=True)
class StreamChunk:
    """What one step emitted.

    Attributes:
        text: text that became final with this step.
        token_ids: emitted ids; the accepted drafts come before the bonus token.
        num_accepted_tokens: how many of them were accepted drafts.
    """

    text: str
    token_ids: list[int]
    num_accepted_tokens: int


class SelfSpeculativeModel:
    """A frozen causal language model that drafts for itself with learned mask tokens.

    Source: PaSS, arXiv:2311.13581; verification of arXiv:2302.01318.
    """

    def __init__(self, base_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, adapter: Adapter | None):
        """Takes a loaded base as it is; `adapter` None allows plain mode only. Use `pardec.load` for checks."""
        self.base_model = base_model
        self.tokenizer = tokenizer
        self.adapter = adapter
        self.target = TargetModel.wrap(base_model)
        self._streamer = None
        self._linears = PackedLinears(base_model)
        self._gate = None
        if adapter is not None and adapter.lora is not None:
            self._gate = LoraGate(base_model, adapter.lora)

    # ------------------------------------------------------------------ generation

    def generate(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        num_speculative_tokens: int | None = None,
        mode: str = "fused",
        num_return_sequences: int = 1,
    ) -> GenerationOutput:
        """Continues every prompt exactly as the base model alone would: the same tokens, or the same law.

        Args:
            prompts: text, texts, token ids of one prompt, lists of token ids, or a LongTensor [B, S] without padding.
            max_new_tokens: limit per sequence.
            temperature: 0 is greedy.
            top_k: keep the k likeliest tokens.
            top_p: keep the likeliest tokens that sum to p.
            min_p: keep tokens at least min_p times as likely as the likeliest.
            seed: of the one generator that all rows draw from; None for torch's global one.
            num_speculative_tokens: K; default what the adapter was trained with; 0 is plain decoding.
            mode: `plain`, `two_pass` or `fused`.
            num_return_sequences: continuations per prompt, next to each other.

        Raises:
            ValueError: for input that cannot be used, naming what was expected and found.
        """
        if num_return_sequences < 1:
            raise ValueError(f"num_return_sequences: expected an integer >= 1, found {num_return_sequences}")
        ids = [row for row in self._token_ids(prompts) for _ in range(num_return_sequences)]
        law = self._law(temperature, top_k, top_p, min_p, seed)
        decoder = self._decoder(ids, law, max_new_tokens, num_speculative_tokens, mode)
        start = time.perf_counter()
        state = deque(decoder.generate(ids), maxlen=1).pop()  # the last one
        outputs = _outputs(state)
        seconds = time.perf_counter() - start  # reading the outputs has waited for the device
        return self._result(ids, outputs, counts_of(state, decoder.mode), seconds)

    def stream(
        self,
        prompt: str | Sequence[int] | Tensor,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        num_speculative_tokens: int | None = None,
        mode: str = "fused",
    ) -> Iterator[StreamChunk]:
        """Yields what each step emits for one prompt; arguments and errors as in `generate`."""
        ids = self._token_ids(prompt)
        if len(ids) != 1:
            raise ValueError(f"prompt: expected one prompt to stream, found {len(ids)}")
        law = self._law(temperature, top_k, top_p, min_p, seed)
        decoder = self._decoder(ids, law, max_new_tokens, num_speculative_tokens, mode)
        return self._stream(decoder, ids)

    def _stream(self, decoder: Decoder, ids: list[list[int]]) -> Iterator[StreamChunk]:
        text = _TextStream(self.tokenizer)
        emitted = 0
        with closing(decoder.generate(ids)) as states:
            for state in states:
                new = state.output[0, emitted : int(state.num_new[0])].tolist()
                steps = int(state.num_steps[0])
                accepted = int(state.accepted[0, steps - 1]) if steps else 0
                first = 1 if decoder.mode == "two_pass" else 0  # its exact token stands before the drafts
                emitted += len(new)
                yield StreamChunk(text.put(new, last=bool(state.done[0])), new, min(accepted, max(len(new) - first, 0)))

    def _law(
        self, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, seed: int | None
    ) -> TokenLaw:
        warpers = make_warpers(temperature, top_k, top_p, min_p)
        generator = None
        if seed is not None:
            if not 0 <= seed < 2**63:
                raise ValueError(f"seed: expected an integer from 0 to 2^63 - 1, found {seed}")
            generator = torch.Generator(self.target.device).manual_seed(seed)
        return TokenLaw(temperature == 0, tuple(warpers), generator)

    def _decoder(
        self,
        prompts: list[list[int]],
        law: TokenLaw,
        max_new_tokens: int,
        num_speculative_tokens: int | None,
        mode: str,
        eos: list[int] | None = None,
    ) -> Decoder:
        """A decoder for these prompts, after every check that needs no forward."""
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, found {mode!r}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected an integer >= 1, found {max_new_tokens}")
        self._check_positions(max(map(len, prompts)), max_new_tokens)
        K = self._resolve_num_speculative_tokens(num_speculative_tokens, mode)
        device = self.target.device
        eos_ids = torch.tensor(eos_token_ids(self.base_model) if eos is None else eos, device=device).long()
        self._linears.refresh()
        if K == 0:
            return Decoder(self.target, "plain", 0, law, max_new_tokens, eos_ids, linears=self._linears)
        assert self.adapter is not None
        masks = self.adapter.embeddings_for(K).to(device, self.target.dtype)
        return Decoder(self.target, mode, K, law, max_new_tokens, eos_ids, masks, self._gate, self._linears)

    def _resolve_num_speculative_tokens(self, asked: int | None, mode: str) -> int:
        if asked is not None and asked < 0:
            raise ValueError(f"num_speculative_tokens: expected an integer >= 0, found {asked}")
        if asked is not None and asked > MAX_SPECULATIVE_TOKENS:
            raise ValueError(f"num_speculative_tokens: expected at most {MAX_SPECULATIVE_TOKENS}, found {asked}")
        if mode == "plain":
            return 0
        if self.adapter is None:
            raise ValueError(f"mode: expected plain, the only one without an adapter, found {mode!r}")
        return self.adapter.metadata.num_speculative_tokens if asked is None else asked

    def _check_positions(self, prompt_tokens: int, max_new_tokens: int) -> None:
        limit = self.target.max_positions
        if limit is not None and prompt_tokens + max_new_tokens > limit:
            raise ValueError(
                f"prompt and new tokens: expected at most {limit} positions of the model, found "
                f"{prompt_tokens} + {max_new_tokens} = {prompt_tokens + max_new_tokens}"
            )

    def _token_ids(self, prompts: Prompts) -> list[list[int]]:
        """Prompts of any accepted form as lists of token ids."""
        if isinstance(prompts, Mapping):
            raise ValueError(
                f"prompts: expected texts or token ids, found {type(prompts).__name__}; pass its input_ids"
            )
        if isinstance(prompts, str):
            prompts = [prompts]
        if isinstance(prompts, Tensor):
            prompts = prompts.tolist() if prompts.dim() != 1 else [prompts.tolist()]
        rows = list(prompts)  # type: ignore[arg-type]
        if rows and isinstance(rows[0], int):
            rows = [rows]
        if not rows:
            raise ValueError("prompts: expected at least one prompt, found none")
        return [self._checked_ids(row, index) for index, row in enumerate(rows)]

    def _checked_ids(self, row: object, index: int) -> list[int]:
        if isinstance(row, str):
            if self.tokenizer is None:
                raise ValueError("prompts: expected token ids, as the base has no tokenizer, found text")
            try:
                row.encode()
            except UnicodeEncodeError:
                raise ValueError(f"prompt {index}: expected Unicode text, found half of a surrogate pair") from None
            row = self.tokenizer(row).input_ids if row else []
        try:
            tokens = list(row)  # type: ignore[call-overload]
            ids = [operator.index(token) for token in tokens if not isinstance(token, bool)]
        except TypeError:
            tokens, ids = [], [0]
        if len(ids) != len(tokens):
            raise ValueError(f"prompt {index}: expected text or a list of token ids, found {str(row)[:60]!r}")
        if not ids:
            raise ValueError(f"prompt {index}: expected at least one token, found an empty prompt")
        rows = embedding_weight(self.base_model).shape[0]
        if min(ids) < 0 or max(ids) >= rows:
            raise ValueError(f"prompt {index}: expected token ids in 0..{rows - 1}, found {min(ids)}..{max(ids)}")
        return ids

    def _result(
        self, prompts: list[list[int]], outputs: list[list[int]], counts: list[SequenceCounts], seconds: float
    ) -> GenerationOutput:
        rows = [torch.tensor(prompt + output) for prompt, output in zip(prompts, outputs, strict=True)]
        sequences = torch.nn.utils.rnn.pad_sequence(rows, True, pad_token_id(self.base_model))
        text = []
        if self.tokenizer is not None:
            text = [cast(str, self.tokenizer.decode(output, skip_special_tokens=True)) for output in outputs]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        return GenerationOutput(text, outputs, sequences, lengths, pool(counts, seconds), counts)

    # ------------------------------------------------------------------ the transformers door

    def with_streamer(self, streamer) -> "SelfSpeculativeModel":
        """The same model for `custom_generate=`, which hands no streamer on: emitted ids go to `streamer`."""
        door = copy.copy(self)
        door._streamer = streamer
        return door

    def __call__(
        self,
        model,
        input_ids: Tensor,
        logits_processor,
        stopping_criteria,
        generation_config,
        num_speculative_tokens: int | None = None,
        mode: str = "fused",
        **model_inputs,
    ):
        """`hf_model.generate(**inputs, custom_generate=model)`: our loop under transformers' own arguments.

        Raises:
            ValueError: for another model than `base_model`, beams, a filled cache, or padding that is not on the left.
        """
        from pardec.door import generate_for_transformers

        if model is not self.base_model:
            raise ValueError("custom_generate: expected to be called by this model's base_model, found another model")
        # `generate` hands over as its own only what is not named in this signature
        if model_inputs.get("token_type_ids") is not None:
            raise ValueError("custom_generate: expected no token_type_ids, found some")
        if model_inputs.get("inputs_embeds") is not None:
            raise ValueError("custom_generate: expected input_ids, found inputs_embeds")
        return generate_for_transformers(
            self,
            input_ids,
            list(logits_processor),
            stopping_criteria,
            generation_config,
            attention_mask=model_inputs.get("attention_mask"),
            position_ids=model_inputs.get("position_ids"),
            past_key_values=model_inputs.get("past_key_values"),
            num_speculative_tokens=num_speculative_tokens,
            mode=mode,
            streamer=self._streamer,
        )


def load(
    directory: str | Path,
    base: str | PreTrainedModel | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> SelfSpeculativeModel:
    """Loads an adapter and its base, and refuses pairs that do not belong together or cannot be exact.

    Args:
        directory: of the adapter.
        base: folder, hub name or loaded model; default the base that the adapter names.
        device: default CUDA where there is one, else the CPU.
        dtype: default float32 on a CPU, the checkpoint's own on CUDA.
        attn_implementation: `sdpa` or `eager`; default what transformers chooses.
        trust_remote_code: run code that comes with the base.

    Raises:
        AdapterError: for an unusable adapter or another base than it was trained for, naming what differs.
        UnsupportedModelError: for a base that cannot be decoded exactly.
    """
    adapter = load_adapter(directory)
    reference = adapter.metadata.base
    if base is None or isinstance(base, str):
        name = base or reference.name
        revision = reference.revision if base is None else None
        loaded = load_base(
            name,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
    else:
        given = {"device": device, "dtype": dtype, "attn_implementation": attn_implementation}
        for option, value in given.items():
            if value is not None:
                raise ValueError(f"{option}: expected None for a base that is already loaded, found {value}")
        if base.training:
            raise ValueError("base: expected a model in eval mode (base.eval()), found it in training mode")
        loaded = base
        refuse_by_config(loaded.config)
        tokenizer = load_tokenizer(loaded.config._name_or_path or reference.name)
    found = fingerprint(loaded, tokenizer)
    wrong = differences(adapter.metadata.fingerprint, found, embedding_weight(loaded).dtype)
    if wrong:
        raise AdapterError(f"{directory}: the adapter belongs to another base ({reference.name}): {'; '.join(wrong)}")
    model = SelfSpeculativeModel(loaded, tokenizer, adapter)
    if adapter.mask_embeddings.shape[1] != model.target.embedding_dim:
        raise AdapterError(
            f"{directory}: mask embeddings: expected width {model.target.embedding_dim}, "
            f"found {adapter.mask_embeddings.shape[1]}"
        )
    probe(model.target)
    return model


def counts_of(state: DecodeState, mode: str) -> list[SequenceCounts]:
    """The counts of every row of a decoding state."""
    per_step = 2 if mode == "two_pass" else 1
    rows = zip(
        state.num_steps.tolist(),
        state.accepted.tolist(),
        state.drafted.tolist(),
        state.num_new.tolist(),
        strict=True,
    )
    return [
        SequenceCounts(accepted[:steps], drafted[:steps], new, per_step, per_step)
        for steps, accepted, drafted, new in rows
    ]


def _outputs(state: DecodeState) -> list[list[int]]:
    rows = zip(state.output.tolist(), state.num_new.tolist(), strict=True)
    return [output[:n] for output, n in rows]


class _TextStream:
    """Turns token ids into text as it becomes final; holds back characters whose bytes are not all there."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.sent = 0

    def put(self, ids: list[int], last: bool) -> str:
        if self.tokenizer is None:
            return ""
        self.ids += ids
        text = cast(str, self.tokenizer.decode(self.ids, skip_special_tokens=True))
        if not last:
            text = text.rstrip("�")
        new = text[self.sent :]
        self.sent = max(self.sent, len(text))
        return new
