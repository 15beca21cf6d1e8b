"""The public model: a frozen base, its tokenizer and an adapter that drafts for it.

`generate`, `stream` and the door of `transformers.generate(custom_generate=model)` all run the loop of
`pardec.decoding.engine`. Legend: B prompts, S tokens of the longest sequence, K num_speculative_tokens.
"""

import copy
import operator
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pardec.adapters.adapter import UNIFORM_NOISE, Adapter
from pardec.adapters.gated_lora import LoraGate
from pardec.adapters.noise import NoiseTokens
from pardec.decoding.drafting import HeadDrafter
from pardec.decoding.engine import Engine, power_of_two
from pardec.decoding.engine_pool import EnginePool, arithmetic, signature
from pardec.decoding.output import GenerationOutput, StreamChunk, TextStream, counts_of, outputs_of
from pardec.decoding.prepack import PackedLinears
from pardec.decoding.prompts import Prompts, token_ids
from pardec.decoding.sampling import TokenLaw, make_warpers
from pardec.decoding.stats import SequenceCounts, pool
from pardec.decoding.step import MODES, Decoder
from pardec.layout import full_blocks
from pardec.target.base import eos_token_ids, pad_token_id
from pardec.target.compiling import compiled
from pardec.target.forward import TargetModel, embedding_weight
from pardec.target.survey import Survey, survey
from pardec.tuning.choice import TunedChoice

MAX_SPECULATIVE_TOKENS = 64  # a fused step has (K + 1)^2 rows


class SelfSpeculativeModel:
    """A frozen causal language model that drafts for itself with learned mask tokens.

    Attributes:
        base_model: the model, always as if nothing else were here.
        tokenizer: None where the base came without one.
        adapter: mask tokens, and a LoRA and a sampler head where they were trained; None allows plain mode only.
        capture: steps run as CUDA graphs; False only to compare.
        tuned: the choice of `pardec tune` for this device, used where no num_speculative_tokens is asked for.

    Source: PaSS, arXiv:2311.13581; verification of arXiv:2302.01318.
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        adapter: Adapter | None,
        *,
        compile: bool = False,
    ):
        """Takes a loaded base as it is. Use `pardec.load` for checks."""
        self.base_model = base_model
        self.tokenizer = tokenizer
        self.adapter = adapter
        self.target = TargetModel.wrap(base_model)
        self.compile = compile
        self.capture = self.target.device.type == "cuda"
        self.tuned: TunedChoice | None = None
        self._streamer = None
        self._survey: Survey | None = None
        self._linears: dict[bool, PackedLinears] = {}
        self._pool = EnginePool()
        self._gate = None
        if adapter is not None and adapter.lora is not None:
            self._gate = LoraGate(base_model, adapter.lora)
        self._head = None if adapter is None else HeadDrafter.of(adapter, self.target)

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
        block_lengths: Sequence[int] | None = None,
        use_head: bool | None = None,
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
            num_speculative_tokens: K; 0 is plain decoding. Default what `pardec tune` chose for this device, else
                what the adapter was trained with.
            mode: `plain`, `two_pass` or `fused`.
            num_return_sequences: continuations per prompt, next to each other; they share its prefill.
            block_lengths: instead of K, how many tokens a fused step drafts behind 0, 1, .. K accepted ones: K + 1
                numbers of which K is the largest.
            use_head: draw the drafts one after another with the sampler head; default if the adapter has one.

        Raises:
            ValueError: for input that cannot be used, naming what was expected and found.
        """
        if num_return_sequences < 1:
            raise ValueError(f"num_return_sequences: expected an integer >= 1, found {num_return_sequences}")
        ids = self._ids_of(prompts)
        law = self._law(temperature, top_k, top_p, min_p, seed)
        shape = self._draft_shape(num_speculative_tokens, block_lengths, mode)
        num_sequences = len(ids) * num_return_sequences
        head = self._chosen_head(use_head)
        with self._engine(ids, law, max_new_tokens, shape, mode, head=head, num_sequences=num_sequences) as engine:
            start = time.perf_counter()
            for _ in engine.run(ids, repeats=num_return_sequences, alone=True):
                pass
            state = engine.state
            assert state is not None
            rows = [prompt for prompt in ids for _ in range(num_return_sequences)]
            outputs = outputs_of(state, len(rows))
            seconds = time.perf_counter() - start  # reading the outputs has waited for the device
            return self._result(rows, outputs, counts_of(state, mode, len(rows)), seconds)

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
        block_lengths: Sequence[int] | None = None,
        use_head: bool | None = None,
    ) -> Iterator[StreamChunk]:
        """Yields what each step emits for one prompt; arguments and errors as in `generate`."""
        ids = self._ids_of(prompt)
        if len(ids) != 1:
            raise ValueError(f"prompt: expected one prompt to stream, found {len(ids)}")
        law = self._law(temperature, top_k, top_p, min_p, seed)
        shape = self._draft_shape(num_speculative_tokens, block_lengths, mode)
        self._check(ids, max_new_tokens, mode)
        return self._stream(self._engine(ids, law, max_new_tokens, shape, mode, head=self._chosen_head(use_head)), ids)

    def _stream(self, made: AbstractContextManager[Engine], ids: list[list[int]]) -> Iterator[StreamChunk]:
        text = TextStream(self.tokenizer)
        with made as engine, closing(engine.run(ids)) as steps:
            for step in steps:
                new = step.tokens[0]
                # the exact token of two_pass stands before the drafts
                first = 1 if engine.decoder.mode == "two_pass" else 0
                accepted = min(step.num_accepted[0], max(len(new) - first, 0))
                yield StreamChunk(text.put(new, last=step.done[0]), new, accepted)

    def _law(
        self, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, seed: int | None
    ) -> TokenLaw:
        warpers = make_warpers(temperature, top_k, top_p, min_p)
        if seed is not None and not 0 <= seed < 2**63:
            raise ValueError(f"seed: expected an integer from 0 to 2^63 - 1, found {seed}")
        return TokenLaw(temperature == 0, tuple(warpers), self._generator(seed) if temperature else None)

    def _generator(self, seed: int | None) -> torch.Generator:
        """A generator of its own for each call, so that a captured step can hold it; None: seeded by torch's."""
        chosen = int(torch.randint(2**62, ())) if seed is None else seed
        return torch.Generator(self.target.device).manual_seed(chosen)

    def _check(self, prompts: list[list[int]], max_new_tokens: int, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, found {mode!r}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected an integer >= 1, found {max_new_tokens}")
        self._check_positions(max(map(len, prompts)), max_new_tokens)

    @contextmanager
    def _engine(
        self,
        prompts: list[list[int]],
        law: TokenLaw,
        max_new_tokens: int,
        shape: tuple[int, ...],
        mode: str,
        *,
        head: HeadDrafter | None = None,
        eos: list[int] | None = None,
        num_sequences: int | None = None,
    ) -> Iterator[Engine]:
        """An engine for these prompts, after every check that needs no forward; nobody else has it meanwhile."""
        self._check(prompts, max_new_tokens, mode)
        if shape == (0,):
            mode = "plain"
        if mode == "plain":
            head = None
        eos_ids = eos_token_ids(self.base_model) if eos is None else eos
        if self._survey is None:
            self._survey = survey(self.target)
        linears = self._packed(with_lora=mode != "plain" and self._gate is not None)
        # graphs hold on to addresses, compiled code to modules
        key = None
        if law.key is not None and (self.capture or self.compile):
            key = (
                (mode, shape, head is not None, law.key, len(eos_ids), self.capture, self.compile),
                power_of_two(num_sequences or len(prompts)),
                signature(self.base_model),
                arithmetic(self.target.device),
            )
        engine = None if key is None else self._pool.take(key)
        if engine is None:
            engine = self._new_engine(law, shape, mode, linears, head)
        elif law.generator is not None:
            assert engine.decoder.law.generator is not None
            engine.decoder.law.generator.manual_seed(law.generator.initial_seed())
        engine.decoder.max_new_tokens = max_new_tokens
        engine.decoder.eos_token_ids = torch.tensor(eos_ids, device=self.target.device).long()
        usable = False
        try:
            yield engine
            usable = True
        except GeneratorExit:  # a stream that is not read to its end
            usable = True
            raise
        finally:
            if key is not None and usable:
                self._pool.give_back(key, engine)

    def _new_engine(
        self, law: TokenLaw, shape: tuple[int, ...], mode: str, linears: PackedLinears, head: HeadDrafter | None
    ) -> Engine:
        assert self._survey is not None
        K, masks, noise, gate = len(shape) - 1, None, None, None
        if K:
            assert self.adapter is not None
            gate = self._gate
            if self.adapter.metadata.draft_input == UNIFORM_NOISE:
                noise = NoiseTokens.of(self.target.vocab_size, self.target.device)
            else:
                masks = self.adapter.embeddings_for(K).to(self.target.device, self.target.dtype)
        decoder = Decoder(
            self.target,
            mode,
            K,
            law,
            max_new_tokens=1,  # set for each call, as are the EOS ids
            eos_token_ids=torch.empty(0, dtype=torch.long),
            mask_embeddings=masks,
            gate=gate,
            linears=linears,
            block_lengths=shape,
            query_group=self._survey.query_group,
            compile_step=compiled if self.compile else None,
            noise=noise,
            head=head,
        )
        captured = self.capture and law.is_capturable
        return Engine(decoder, self._survey.bytes_per_slot, captured=captured, make_room=self._pool.clear)

    def _packed(self, with_lora: bool) -> PackedLinears:
        """Packed weights, up to date; empty on other devices than a CPU."""
        assert self._survey is not None
        if with_lora not in self._linears:
            self._linears[with_lora] = PackedLinears(self._survey.siblings, self._gate if with_lora else None)
        if not self.compile:
            self._linears[with_lora].refresh()
        return self._linears[with_lora]

    def _draft_shape(self, asked: int | None, block_lengths: Sequence[int] | None, mode: str) -> tuple[int, ...]:
        """Block lengths of the fused chain; for two_pass only their number counts; (0,) for plain decoding."""
        if block_lengths is not None:
            return self._checked_blocks(asked, block_lengths, mode)
        if asked is not None and asked < 0:
            raise ValueError(f"num_speculative_tokens: expected an integer >= 0, found {asked}")
        if asked is not None and asked > MAX_SPECULATIVE_TOKENS:
            raise ValueError(f"num_speculative_tokens: expected at most {MAX_SPECULATIVE_TOKENS}, found {asked}")
        if mode == "plain":
            return (0,)
        if self.adapter is None:
            raise ValueError(f"mode: expected plain, the only one without an adapter, found {mode!r}")
        if asked is None and mode == "fused" and self.tuned is not None:
            return tuple(self.tuned.block_lengths)
        return full_blocks(self.adapter.metadata.num_speculative_tokens if asked is None else asked)

    def _checked_blocks(self, asked: int | None, block_lengths: Sequence[int], mode: str) -> tuple[int, ...]:
        blocks = tuple(operator.index(length) for length in block_lengths)
        K = len(blocks) - 1
        if mode != "fused" or asked is not None:
            raise ValueError("block_lengths: expected mode fused and no num_speculative_tokens beside it")
        if not 0 <= K <= MAX_SPECULATIVE_TOKENS or min(blocks) < 0 or max(blocks) != K:
            raise ValueError(
                f"block_lengths: expected K + 1 numbers from 0 to K of which K is the largest, found {blocks}"
            )
        if K and self.adapter is None:
            raise ValueError(f"mode: expected plain, the only one without an adapter, found {mode!r}")
        return blocks

    def _chosen_head(self, use_head: bool | None) -> HeadDrafter | None:
        if use_head and self._head is None:
            raise ValueError("use_head: expected an adapter with a sampler head, found none")
        return None if use_head is False else self._head

    def _check_positions(self, prompt_tokens: int, max_new_tokens: int) -> None:
        limit = self.target.max_positions
        if limit is not None and prompt_tokens + max_new_tokens > limit:
            raise ValueError(
                f"prompt and new tokens: expected at most {limit} positions of the model, found "
                f"{prompt_tokens} + {max_new_tokens} = {prompt_tokens + max_new_tokens}"
            )

    def _ids_of(self, prompts: Prompts) -> list[list[int]]:
        return token_ids(prompts, self.tokenizer, embedding_weight(self.base_model).shape[0])

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
        use_head: bool | None = None,
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
            use_head=use_head,
            streamer=self._streamer,
        )
