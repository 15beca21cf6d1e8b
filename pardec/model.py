"""The public model: a frozen base, its tokenizer and an adapter that drafts for it.

`generate`, `stream` and the door of `transformers.generate(custom_generate=model)` all run the loop of
`pardec.decoding.engine`. Legend: B prompts, S tokens of the longest sequence, K num_speculative_tokens.
"""

import copy
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pardec.adapters.adapter import Adapter
from pardec.adapters.tuned import TunedChoice, nearest_choice
from pardec.arguments import integer
from pardec.decoding.asking.messages import Messages, message_ids
from pardec.decoding.asking.prompts import Prompts, token_ids
from pardec.decoding.engine import Engine
from pardec.decoding.engines import Engines
from pardec.decoding.kept_cache import KeptCache
from pardec.decoding.output import GenerationOutput, StreamChunk, TextStream, counts_of, outputs_of
from pardec.decoding.stats import SequenceCounts, pool
from pardec.decoding.verify import Verification
from pardec.door import generate_for_transformers
from pardec.draft_tree import AnyTree
from pardec.errors import shown
from pardec.target.base import pad_token_id
from pardec.target.forward import embedding_weight

MAX_SEQUENCES = 2**16  # of one prompt; far more than any device decodes together


class SelfSpeculativeModel:
    """A frozen causal language model that drafts for itself with learned mask tokens.

    Attributes:
        base_model: the model, always as if nothing else were here.
        tokenizer: None where the base came without one.
        adapter: mask tokens, and a LoRA and a sampler head where they were trained; None allows plain mode only.
        target: the base as rows are run through it.
        compile: steps run under torch.compile.
        engines: what decodes, kept from call to call.

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
        self.engines = Engines(base_model, adapter, compile=compile)
        self.target = self.engines.target
        self.compile = compile
        self._streamer = None

    @property
    def capture(self) -> bool:
        """Steps run as CUDA graphs; False only to compare."""
        return self.engines.capture

    @capture.setter
    def capture(self, capture: bool) -> None:
        self.engines.capture = capture

    @property
    def tuned(self) -> TunedChoice | None:
        """The choice of `pardec tune` for one greedy sequence on this device, in this dtype; see `tuned_for`."""
        return self.tuned_for(1, is_greedy=True)

    @tuned.setter
    def tuned(self, tuned: TunedChoice | None) -> None:
        self.engines.choices = [] if tuned is None else [tuned]

    def tuned_for(self, num_sequences: int, *, is_greedy: bool) -> TunedChoice | None:
        """The choice that is used where nothing else is asked for than its mode: the nearest one that was tuned."""
        return nearest_choice(self.engines.choices, num_sequences, is_greedy)

    # ------------------------------------------------------------------ generation

    def prompt_ids(
        self,
        prompts: Prompts | None = None,
        *,
        messages: Messages | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> list[list[int]]:
        """Token ids of what would be continued; arguments and errors as in `generate`."""
        num_embeddings = embedding_weight(self.base_model).shape[0]
        if messages is not None:
            if prompts is not None:
                raise ValueError("messages: expected either prompts or messages, found both")
            return token_ids(message_ids(messages, self.tokenizer, template_options), None, num_embeddings)
        if prompts is None:
            raise ValueError("prompts: expected either prompts or messages, found neither")
        if template_options is not None:
            raise ValueError(f"template_options: expected None without messages, found {shown(template_options)}")
        return token_ids(prompts, self.tokenizer, num_embeddings)

    def generate(
        self,
        prompts: Prompts | None = None,
        *,
        messages: Messages | None = None,
        template_options: Mapping[str, Any] | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        num_speculative_tokens: int | None = None,
        mode: str | None = None,
        num_return_sequences: int = 1,
        block_lengths: Sequence[int] | None = None,
        use_head: bool | None = None,
        verification: Verification = "token",
        copy_tokens: int | None = None,
        tree: AnyTree | None = None,
    ) -> GenerationOutput:
        """Continues every prompt exactly as the base model alone would: the same tokens, or the same law.

        Args:
            prompts: text, texts, token ids of one prompt, lists of token ids, or a LongTensor [B, S] without padding.
            messages: instead of prompts, a chat as dicts with `role` and `content` of which the last is the user's, or
                a list of chats; rendered by the tokenizer's chat template.
            template_options: what the template is given beside messages, such as `tools` or `enable_thinking`.
            max_new_tokens: limit per sequence.
            temperature: 0 is greedy, and the next three change nothing then.
            top_k: keep the k likeliest tokens.
            top_p: keep the likeliest tokens that sum to p.
            min_p: keep tokens at least min_p times as likely as the likeliest.
            seed: of the one generator that all rows draw from; None for torch's global one.
            num_speculative_tokens: K; 0 is plain decoding. Default what `pardec tune` chose for this device and dtype
                in this mode, else what the adapter was trained with.
            mode: `plain`, `two_pass` or `fused`; default what `pardec tune` chose, else fused.
            num_return_sequences: continuations per prompt, next to each other; they share its prefill.
            block_lengths: instead of K, how many tokens a fused step drafts behind 0, 1, .. K accepted ones: K + 1
                numbers of which K is the largest, and up to L more, 0 where they are left out. Beside a tree, K + 1
                times its depth K, and behind L copied tokens the L more.
            use_head: draw the drafts one after another with the sampler head; default if the adapter has one and
                `pardec tune` did not choose to leave it out.
            verification: of sampled drafts: `token` judges them one by one, `block` all of a step together, by which
                more of them stand (arXiv:2403.10444); the law is the same.
            copy_tokens: L, tokens that a step verifies behind its drafts: what followed the longest match, of two to
                four tokens, in the text with its drafts or that of another sequence of its prompt; alone, which takes
                no adapter, with num_speculative_tokens=0; beside a tree as one more branch of it, which follows the
                text without drafts. Default what `pardec tune` chose with the drafts, else 0.
            tree: instead of K or block_lengths, many candidates that one forward verifies, a `DraftTree` or a
                `DynamicTree`; default what `pardec tune` chose. Nodes are the likeliest tokens, also when sampling.

        Raises:
            ValueError: for input that cannot be used, naming what was expected and found.
        """
        num_return_sequences = integer("num_return_sequences", num_return_sequences, 1, MAX_SEQUENCES)
        ids = self.prompt_ids(prompts, messages=messages, template_options=template_options)
        law = self.engines.law(temperature, top_k, top_p, min_p, seed)
        asked = (mode, num_speculative_tokens, block_lengths, use_head, verification, copy_tokens, tree)
        rows = [prompt for prompt in ids for _ in range(num_return_sequences)]
        drafting = self.engines.drafting(*asked, num_sequences=len(rows), is_greedy=law.greedy)
        with self.engines.lend(ids, law, max_new_tokens, drafting, num_sequences=len(rows)) as engine:
            start = time.perf_counter()
            for _ in engine.run(ids, repeats=num_return_sequences, between="nothing"):
                pass
            state = engine.state
            assert state is not None
            outputs = outputs_of(state, len(rows))
            seconds = time.perf_counter() - start  # reading the outputs has waited for the device
            return self._result(rows, outputs, counts_of(state, drafting.mode, len(rows)), seconds)

    def stream(
        self,
        prompt: str | Sequence[int] | Tensor | None = None,
        *,
        messages: Messages | None = None,
        template_options: Mapping[str, Any] | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        num_speculative_tokens: int | None = None,
        mode: str | None = None,
        block_lengths: Sequence[int] | None = None,
        use_head: bool | None = None,
        verification: Verification = "token",
        copy_tokens: int | None = None,
        tree: AnyTree | None = None,
        kept: KeptCache | None = None,
    ) -> Generator[StreamChunk, None, GenerationOutput]:
        """Yields what each step emits for one prompt or chat; arguments and errors as in `generate`.

        What the generator returns when it ends is what `generate` would have; its seconds are without the caller's.

        Args:
            kept: from turn to turn of a chat, or of texts that begin alike: what the prompt has in common with what
                stands there is not run again, and what this call has run stands there afterwards.
        """
        if kept is not None and not isinstance(kept, KeptCache):
            raise ValueError(f"kept: expected a KeptCache, found {shown(kept)}")
        ids = self.prompt_ids(prompt, messages=messages, template_options=template_options)
        if len(ids) != 1:
            raise ValueError(f"prompt: expected one prompt to stream, found {len(ids)}")
        law = self.engines.law(temperature, top_k, top_p, min_p, seed)
        asked = (mode, num_speculative_tokens, block_lengths, use_head, verification, copy_tokens, tree)
        drafting = self.engines.drafting(*asked, is_greedy=law.greedy)
        self.engines.check(ids, max_new_tokens, num_sequences=1)
        return self._stream(self.engines.lend(ids, law, max_new_tokens, drafting), ids, kept)

    def _stream(
        self, made: AbstractContextManager[Engine], ids: list[list[int]], kept: KeptCache | None
    ) -> Generator[StreamChunk, None, GenerationOutput]:
        text = TextStream(self.tokenizer)
        made_by, begun, num_kept, has_begun, seconds = None, None, 0, False, 0.0
        if kept is not None:
            made_by = (self.engines, self.engines.circumstances.now())
            begun, num_kept = kept.begin(ids[0], made_by), kept.num_reused
        with made as engine, closing(engine.run(ids, kept=begun, num_kept=num_kept)) as steps:
            try:
                start = time.perf_counter()
                for step in steps:
                    has_begun = True
                    new = step.tokens[0]
                    # the exact token of two_pass stands before the drafts
                    first = 1 if engine.decoder.mode == "two_pass" else 0
                    accepted = min(step.num_accepted[0], max(len(new) - first, 0))
                    copied = min(step.num_copied[0], max(len(new) - first - accepted, 0))
                    chunk = StreamChunk(text.put(new, last=step.done[0]), new, accepted, copied)
                    seconds += time.perf_counter() - start
                    yield chunk
                    start = time.perf_counter()
                assert engine.state is not None
                counts = counts_of(engine.state, engine.decoder.mode, 1)
                return self._result(ids, outputs_of(engine.state, 1), counts, seconds)
            finally:
                # also of a stream that is left early; before the first token the state is of an earlier call
                if kept is not None and has_begun and engine.state is not None:
                    kept.keep(engine.state, ids[0], made_by)

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
        """The same model for `custom_generate=`: emitted ids go to `streamer`.

        A `streamer=` beside `custom_generate=` gets the prompt and nothing else: transformers keeps it to itself.

        Raises:
            ValueError: for what has no `put` and no `end`.
        """
        if not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
            raise ValueError(f"streamer: expected an object with put and end, found {shown(streamer)}")
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
        mode: str | None = None,
        use_head: bool | None = None,
        verification: Verification = "token",
        copy_tokens: int | None = None,
        tree: AnyTree | None = None,
        **model_inputs,
    ):
        """`hf_model.generate(**inputs, custom_generate=model)`: our loop under transformers' own arguments.

        Raises:
            ValueError: for another model than `base_model`, beams, a filled cache, or padding that is not on the left.
        """
        if model is not self.base_model:
            raise ValueError("custom_generate: expected to be called by this model's base_model, found another model")
        # `generate` hands over as its own only what is not named in this signature
        named = ("attention_mask", "position_ids", "past_key_values")
        return generate_for_transformers(
            self.engines,
            input_ids,
            list(logits_processor),
            stopping_criteria,
            generation_config,
            attention_mask=model_inputs.get("attention_mask"),
            position_ids=model_inputs.get("position_ids"),
            past_key_values=model_inputs.get("past_key_values"),
            other_inputs={name: value for name, value in model_inputs.items() if name not in named},
            num_speculative_tokens=num_speculative_tokens,
            mode=mode,
            use_head=use_head,
            verification=verification,
            copy_tokens=copy_tokens,
            tree=tree,
            streamer=self._streamer,
        )
