"""Which engine a call decodes with: how it drafts, by which law, and an idle engine for that or a new one.

What the public model and the transformers door stand on. Knows token ids; no text and no stopping criteria.
Legend: K num_speculative_tokens.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pardec.adapters.adapter import UNIFORM_NOISE, Adapter, AdapterError
from pardec.adapters.gated_lora import LoraGate
from pardec.adapters.noise import NoiseTokens
from pardec.adapters.tuned import TunedChoice, nearest_choice
from pardec.arguments import flag, integer, one_of, real
from pardec.decoding.asking.asked import Drafting, check_ranks, drafting_for, tree_for
from pardec.decoding.capture import power_of_two
from pardec.decoding.copying import num_sources
from pardec.decoding.drafting import HeadDrafter
from pardec.decoding.engine import Engine
from pardec.decoding.engine_pool import EnginePool, Same, arithmetic, signature
from pardec.decoding.kept_cache import Circumstances
from pardec.decoding.prepack import PackedLinears
from pardec.decoding.probing.probe_step import probe_step
from pardec.decoding.probing.shared_length import shared_length_limit
from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw, make_warpers
from pardec.decoding.step import Decoder
from pardec.decoding.verify import VERIFICATIONS, Verification
from pardec.draft_tree import AnyTree
from pardec.errors import shown
from pardec.target.attention import ROUTE
from pardec.target.base import eos_token_ids
from pardec.target.compiling import compiled, refuse_compiled
from pardec.target.forward import TargetModel, text_config
from pardec.target.placement import is_offloaded, without_autocast
from pardec.target.survey import Survey, survey


class Engines:
    """Lends engines for one base and one adapter.

    Attributes:
        target: the base.
        adapter: None allows plain mode only.
        gate: the adapter's LoRA on the base, or None.
        head: the adapter's sampler head, or None.
        compile: steps run under torch.compile.
        capture: steps run as CUDA graphs.
        circumstances: of the base, on which what is kept from call to call depends.
        choices: of `pardec tune`, for this device and dtype; one of them is used where nothing else is asked for than
            its mode.
    """

    def __init__(self, base: PreTrainedModel, adapter: Adapter | None, *, compile: bool):
        self.target = TargetModel.wrap(base)
        self._attention = text_config(base)._attn_implementation
        self.adapter = adapter
        self.gate = None if adapter is None or adapter.lora is None else LoraGate(base, adapter.lora)
        self.head = None if adapter is None else HeadDrafter.of(adapter, self.target)
        if adapter is not None and adapter.mask_embeddings is not None:
            _check_finite("mask embeddings", adapter.mask_embeddings.to(self.target.dtype))
        if self.head is not None:
            for name, parameter in self.head.head.named_parameters():
                _check_finite(f"head: {name}", parameter)
        self.compile = flag("compile", compile)
        # a captured step would replay the copies of weights that are brought in for it, from wherever they lay then
        self.capture = self.target.device.type == "cuda" and not is_offloaded(base)
        self.choices: list[TunedChoice] = []
        self._survey: Survey | None = None
        self._modules: Hashable = None  # of the base when it was surveyed, and of what kinds its weights were
        self._surveyed: Hashable = None  # its signature when that was last looked at
        self._linears: dict[bool, PackedLinears] = {}
        self._pool = EnginePool()
        self.circumstances = Circumstances(base)

    @cached_property
    def shared_limit(self) -> int | None:
        """Tokens up to which several sequences may share a batch; None for any number."""
        return shared_length_limit(self.target)

    # ------------------------------------------------------------------ what a call asks for

    def law(
        self, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, seed: int | None
    ) -> TokenLaw:
        """The law of a call; arguments and errors as in `generate`."""
        warpers = make_warpers(temperature, top_k, top_p, min_p)
        seed = None if seed is None else integer("seed", seed, 0, 2**63 - 1)
        greedy = real(temperature) == 0
        return TokenLaw(greedy, tuple(warpers), None if greedy else self.generator(seed))

    def generator(self, seed: int | None = None) -> torch.Generator:
        """A generator of its own for each call, so that a captured step can hold it; None: seeded by torch's."""
        chosen = int(torch.randint(2**62, ())) if seed is None else seed
        return torch.Generator(self.target.device).manual_seed(chosen)

    def drafting(
        self,
        mode: str | None,
        asked: int | None,
        block_lengths: Sequence[int] | None,
        use_head: bool | None,
        verification: Verification = "token",
        copy_tokens: int | None = None,
        tree: AnyTree | None = None,
        *,
        num_sequences: int = 1,
        is_greedy: bool = True,
    ) -> Drafting:
        """How to draft where `asked` is num_speculative_tokens; all as in `generate`.

        Of what was tuned that counts which comes nearest to so many sequences at a time, greedy or not.

        Raises:
            ValueError: for what does not exist, or not together.
        """
        one_of("verification", verification, VERIFICATIONS)
        K = None if self.adapter is None else self.adapter.metadata.num_speculative_tokens
        if tree is not None:
            deepest = K if self.adapter is not None and self.adapter.has_distinct_masks else None
            mode, blocks, L = tree_for(mode, asked, block_lengths, copy_tokens, tree, trained=K, deepest=deepest)
        else:
            tuned = nearest_choice(self.choices, num_sequences, is_greedy)
            use_head = None if use_head is False and self.head is None else use_head  # nothing that a choice has not
            mode, blocks, use_head, L, tree = drafting_for(
                mode, asked, block_lengths, use_head, copy_tokens, trained=K, tuned=tuned
            )
        head = self.chosen_head(use_head)
        if tree is not None:
            check_ranks(tree, self.target.vocab_size, None if head is None else head.shortlist)
        if mode == "plain":
            return Drafting(mode, blocks, None)
        return Drafting(mode, blocks, head if max(blocks) else None, verification, L, tree)

    def chosen_head(self, use_head: bool | None) -> HeadDrafter | None:
        """The head that drafts; `use_head` as in `generate`.

        Raises:
            ValueError: if one is asked for and there is none.
        """
        if use_head is not None and flag("use_head", use_head) and self.head is None:
            raise ValueError("use_head: expected an adapter with a sampler head, found none")
        if self.head is not None and self.head.head.inner.weight.dtype != self.target.dtype:
            self.head.head.to(self.target.dtype)  # the base was converted since
        return None if use_head is False else self.head

    def row_forward(
        self,
        num_speculative_tokens: int,
        head: HeadDrafter | None,
        linears: PackedLinears | None = None,
        query_group: int | None = None,
    ) -> RowForward:
        """Rows of the base with K mask tokens of the adapter behind real ones; K = 0 takes nothing of it.

        Args:
            num_speculative_tokens: K.
            head: whose tap is to see what the output head reads.
            linears: packed weights; default none.
            query_group: of the attention route; default the model's own attention.
        """
        K, target = num_speculative_tokens, self.target
        masks = noise = None
        if K:
            assert self.adapter is not None
            if self.adapter.metadata.draft_input == UNIFORM_NOISE:
                noise = NoiseTokens.of(target.vocab_size, target.device)
            else:
                masks = self.adapter.embeddings_for(K).to(target.device, target.dtype)
        gate, tap = self.gate if K else None, None if head is None else head.tap
        compile_step = compiled if self.compile else None
        return RowForward(target, masks, gate, linears, query_group, compile_step, noise, tap)

    def check(self, prompts: list[list[int]], max_new_tokens: int, num_sequences: int) -> None:
        """Refuses what the model has no positions for, or cannot do for several sequences at once, or no longer.

        Raises:
            ValueError: naming what was expected and found.
        """
        base = self.target.base
        # training with checkpoints drops the cache
        if base.training and any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
            raise ValueError(
                "base: expected no gradient checkpointing in training mode, found both; base.eval() ends that"
            )
        found = text_config(self.target.base)._attn_implementation
        if found not in (self._attention, ROUTE):  # where other threads' steps run it is theirs
            raise ValueError(
                f"base: expected attention {self._attention!r}, as when it was loaded, found {found!r}, which takes "
                "other masks; load it again with attn_implementation="
            )
        if integer("max_new_tokens", max_new_tokens, 1) >= 2**31:
            raise ValueError(f"max_new_tokens: expected less than 2^31, found {shown(max_new_tokens)}")
        limit, longest = self.target.max_positions, max(map(len, prompts))
        if limit is not None and longest + max_new_tokens > limit:
            raise ValueError(
                f"prompt and new tokens: expected at most {limit} positions of the model, found "
                f"{longest} + {max_new_tokens} = {longest + max_new_tokens}"
            )
        shared = self.shared_limit if num_sequences > 1 else None
        if shared is not None and longest + max_new_tokens > shared:
            raise ValueError(
                f"prompt and new tokens: expected at most {shared} for several sequences at once, as this base "
                f"computes with the length of one, found {longest + max_new_tokens} for {num_sequences} sequences; "
                "give them one by one"
            )

    # ------------------------------------------------------------------ engines

    def room_for(self, num_engines: int) -> AbstractContextManager[None]:
        """Inside of it so many are kept for the next call: see `EnginePool.room_for`."""
        return self._pool.room_for(num_engines)

    @contextmanager
    def lend(
        self,
        prompts: list[list[int]],
        law: TokenLaw,
        max_new_tokens: int,
        drafting: Drafting,
        *,
        num_sequences: int | None = None,
        eos: list[int] | None = None,
    ) -> Iterator[Engine]:
        """An engine for these prompts, after every check that needs no forward; nobody else has it meanwhile.

        Args:
            prompts: lists of token ids.
            law: how tokens are chosen.
            max_new_tokens: limit per sequence.
            drafting: from `drafting`.
            num_sequences: that continue the prompts; default one for each.
            eos: ids that end a text; default the base's own.
        """
        num_sequences = num_sequences or len(prompts)
        self.check(prompts, max_new_tokens, num_sequences)
        eos_ids = eos_token_ids(self.target.base) if eos is None else eos
        with torch.inference_mode(False):  # as steps run, for which tensors are made here
            key, engine = self._engine_for(prompts, law, drafting, num_sequences, len(eos_ids))
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

    def _engine_for(
        self, prompts: list[list[int]], law: TokenLaw, drafting: Drafting, num_sequences: int, num_eos: int
    ) -> tuple[Hashable | None, Engine]:
        """An idle engine or a new one, and the key that it is kept by; None where it is not."""
        target, K = self.target, drafting.num_speculative_tokens
        if K and (self.gate is not None or drafting.head is not None):
            refuse_compiled(target.base)
        now = signature(target.base) if self.capture or self.compile else None  # which takes milliseconds
        facts = self._facts(now)
        # on a CPU what a LoRA adds to a packed weight costs plain steps something
        with_lora = self.gate is not None and (K > 0 or target.device.type != "cpu")
        linears = self._packed(facts, with_lora=with_lora)
        # graphs hold on to addresses, compiled code to modules
        key = None
        if law.key is not None and (self.capture or self.compile):
            way = (drafting.mode, drafting.block_lengths, drafting.copy_tokens, drafting.tree)
            shape = (*way, drafting.head is not None, drafting.verification, law.key, num_eos)
            sequences = power_of_two(num_sequences)
            repeats = num_sequences // len(prompts)
            sources = num_sources(prompts, repeats) if drafting.copy_tokens else 1
            on = (sources, self.capture, self.compile, sequences, now, arithmetic(target.device), linears.num_packed)
            key = (shape, on)
        engine = None if key is None else self._pool.take(key)
        if engine is None:
            engine = self._new_engine(facts, law, drafting, linears)
        elif law.generator is not None:
            assert engine.decoder.law.generator is not None
            engine.decoder.law.generator.manual_seed(law.generator.initial_seed())
        return key, engine

    def _facts(self, now: Hashable) -> Survey:
        """What a forward of the base shows, looked at again once it has other modules or weights of another kind.

        Args:
            now: the signature of the base; None where nothing goes by it.

        Raises:
            UnsupportedModelError: if it cannot be decoded exactly any more, saying what was seen.
        """
        facts = self._survey
        if facts is not None and now is not None and now == self._surveyed:
            return facts
        found = list(self.target.base.modules())
        # weights that are quantised in place are of another class, in the same modules
        modules = Same(found), frozenset(type(one) for module in found for one in module._parameters.values())
        has_others = self._modules not in (None, modules)
        if has_others:
            self._make_room()  # of graphs and packed weights that nobody asks for again
        if facts is None or has_others or self.compile:  # code that is traced goes by what was seen of inputs
            facts = survey(self.target)
            if has_others:
                # what is tolerated goes by the base's own dtype
                with without_autocast(self.target.device):
                    probe_step(self.target)
            self._survey, self._linears = facts, {}
        self._modules, self._surveyed = modules, now
        return facts

    def _new_engine(self, facts: Survey, law: TokenLaw, drafting: Drafting, linears: PackedLinears) -> Engine:
        K, no_eos = drafting.num_speculative_tokens, torch.empty(0, dtype=torch.long)
        forward = self.row_forward(K, drafting.head, linears, facts.query_group)
        max_new_tokens = 1  # set for each call, as are the EOS ids
        decoder = Decoder(
            forward,
            drafting.mode,
            K,
            law,
            max_new_tokens,
            no_eos,
            drafting.block_lengths,
            drafting.head,
            drafting.verification,
            drafting.copy_tokens,
            drafting.tree,
        )
        captured = self.capture and law.is_capturable
        # code is compiled for buffers of their own
        kinds = facts.kinds if drafting.tree is not None and not self.compile else None
        return Engine(decoder, facts.bytes_per_slot, captured=captured, make_room=self._make_room, kinds=kinds)

    def _make_room(self) -> None:
        self._pool.clear()
        self.circumstances.free()
        for linears in self._linears.values():
            linears.free()

    def _packed(self, facts: Survey, with_lora: bool) -> PackedLinears:
        """Packed weights, up to date; empty where packing brings nothing."""
        if with_lora not in self._linears:
            self._linears[with_lora] = PackedLinears(facts.siblings, self.gate if with_lora else None)
        linears = self._linears[with_lora]
        before = linears.num_packed
        linears.refresh()
        if before not in (0, linears.num_packed):
            self._pool.clear()  # graphs hold on to what was packed before
        return linears


def _check_finite(what: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise AdapterError(f"{what}: expected numbers that are finite in {tensor.dtype}, found some that are not")
