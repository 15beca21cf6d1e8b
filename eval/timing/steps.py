"""Makes engines as `SelfSpeculativeModel` makes them, and times their steps side by side, a block of steps at a time.

What is timed is the loop that users run: on CUDA captured steps, read one behind; on a CPU packed weights. Knows no
files and no tables. Legend: K num_speculative_tokens, D width of an input embedding, T tokens.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from timing.clock import seconds_of
from timing.whole_route import WholeForward
from torch import Tensor

from pardec.adapters.gated_lora import LoraGate, LoraWeights
from pardec.decoding.drafting import HeadDrafter
from pardec.decoding.engine import Engine, Progress
from pardec.decoding.prepack import PackedLinears
from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw
from pardec.decoding.state import DecodeState
from pardec.decoding.step import Decoder
from pardec.target.compiling import compiled
from pardec.target.forward import TargetModel
from pardec.target.survey import Survey, survey

# the first step of an engine compiles and captures; the next ones settle caches and clocks
WARM_UP_STEPS = 4
LEAD_IN_STEPS = 1
# a block in which the engine moves on to another cache bucket is timed again
MAX_TRIES = 3
GROUPED, WHOLE, STOCK = "grouped", "whole", "stock"


@dataclass(frozen=True)
class Variant:
    """How steps are run.

    Attributes:
        compile: under torch.compile.
        lora: added at mask rows; plain steps have none.
        attention: `grouped`, the engine's own route, which splits keys on CUDA, `whole`, the same without that, or
            `stock`, the model's.
        head: draws the drafts; plain steps have none.
    """

    compile: bool
    lora: bool
    attention: str
    head: bool = False


@dataclass
class Subject:
    """A base with what drafts for it.

    Attributes:
        target: the base.
        mask_embeddings: shape [K, D] for the largest K, in the target's dtype and device.
        lora: for every linear layer, or None.
        drafter: the sampler head, or None.
    """

    target: TargetModel
    mask_embeddings: Tensor
    lora: LoraWeights | None
    drafter: HeadDrafter | None = None
    _packed: dict[bool, PackedLinears] = field(default_factory=dict)

    @cached_property
    def facts(self) -> Survey:
        """What the engine reads from one forward."""
        return survey(self.target)

    @cached_property
    def gate(self) -> LoraGate | None:
        """The LoRA on its layers."""
        return None if self.lora is None else LoraGate(self.target.base, self.lora)

    def engine(self, num_speculative_tokens: int, variant: Variant, max_new_tokens: int) -> Engine:
        """A greedy engine that never meets EOS; K = 0 is plain decoding, which has no adapter."""
        K = num_speculative_tokens
        gate = self.gate if K and variant.lora else None
        head = self.drafter if K and variant.head else None
        device = self.target.device
        forward = (WholeForward if variant.attention == WHOLE else RowForward)(
            self.target,
            self.mask_embeddings[:K] if K else None,
            gate,
            linears=self._linears(gate),
            query_group=None if variant.attention == STOCK else self.facts.query_group,
            compile_step=compiled if variant.compile else None,
            tap=None if head is None else head.tap,
        )
        no_eos = torch.empty(0, dtype=torch.long, device=device)
        mode = "fused" if K else "plain"
        decoder = Decoder(forward, mode, K, TokenLaw(greedy=True), max_new_tokens, no_eos, head=head)
        return Engine(decoder, self.facts.bytes_per_slot, captured=device.type == "cuda")

    def prepare(self, variant: Variant) -> None:
        """Packs weights; to be called while no engine is between two steps, which keeps layers from it."""
        for gate in (None, self.gate) if variant.lora else (None,):
            self._linears(gate)

    def _linears(self, gate: LoraGate | None) -> PackedLinears:
        """Packed weights, for all engines that can share them."""
        with_lora = gate is not None
        if with_lora not in self._packed:
            self._packed[with_lora] = PackedLinears(self.facts.siblings, gate)
            self._packed[with_lora].refresh()
        return self._packed[with_lora]


def force_acceptance(decoder: Decoder, continuation: Tensor, num_accepted_tokens: int) -> None:
    """Lets every step of `decoder` accept exactly so many drafts, by what an oracle writes over them before it.

    The oracle's few small kernels become part of the step, of a captured one too.

    Args:
        decoder: of the fused mode.
        continuation: what the base alone emits behind the prompt, shape [T]; T is at least the new tokens that the
            decoder may emit, and K more.
        num_accepted_tokens: 0..K.
    """
    K = decoder.num_speculative_tokens
    if not 0 <= num_accepted_tokens <= K:
        raise ValueError(f"forced_acceptance: expected 0 to {K} accepted drafts, found {num_accepted_tokens}")
    step, vocab_size = decoder.step, decoder.target.vocab_size
    index = torch.arange(K, device=continuation.device)
    is_wrong = (index == num_accepted_tokens).long()

    def step_with_oracle(state: DecodeState) -> None:
        right = continuation[state.num_new[:, None] + index]
        state.drafts = (right + is_wrong) % vocab_size
        step(state)

    decoder.step = step_with_oracle


@dataclass(frozen=True)
class Block:
    """Some steps in a row.

    Attributes:
        ms_per_step: on CUDA by the device's clock, on a CPU by the wall's.
        num_new: tokens emitted before and after it.
        num_steps: in it.
        num_slots: that attention saw.
    """

    ms_per_step: float
    num_new: tuple[int, int]
    num_steps: int
    num_slots: int

    @property
    def tokens_per_step(self) -> float:
        """Emitted tokens per step."""
        return (self.num_new[1] - self.num_new[0]) / self.num_steps


class Runner:
    """One engine on one prompt, whose steps are run in blocks; begins anew where its new tokens would run out."""

    def __init__(self, engine: Engine, prompt: list[int], max_tokens_per_step: int):
        """Args: engine; prompt; max_tokens_per_step: that a step may emit here."""
        self.engine = engine
        self.prompt = prompt
        self.max_tokens_per_step = max_tokens_per_step
        self.warnings: list[str] = []  # of prefill and warm-up: capturing or compiling may have failed
        self._steps: Iterator[Progress] | None = None
        self._last: Progress | None = None

    def begin(self) -> None:
        """Prefill and warm-up, compiling and capturing included.

        Raises:
            ValueError: if its cache does not fit.
        """
        self.close()
        self._steps = self.engine.run([self.prompt])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.advance(1 + WARM_UP_STEPS)
        self.warnings += [str(one.message) for one in caught]

    def close(self) -> None:
        """Ends the loop, which takes hooks off the base."""
        if self._steps is not None:
            self._steps.close()  # type: ignore[attr-defined]
        self._steps = self._last = None

    def advance(self, num_steps: int) -> None:
        """Runs steps; the first of a fresh loop is prefill."""
        assert self._steps is not None
        for _ in range(num_steps):
            self._last = next(self._steps)

    def reserve(self, num_steps: int) -> None:
        """Begins anew if so many steps might not be left."""
        # the loop may be two steps ahead of what was read
        if self._num_new() + (num_steps + 2) * self.max_tokens_per_step >= self.engine.decoder.max_new_tokens:
            self.begin()

    def block(self, num_steps: int) -> Block:
        """Times steps that see one cache bucket."""
        for _ in range(MAX_TRIES):
            self.reserve(LEAD_IN_STEPS + num_steps)
            slots = self._num_slots()
            block = self._timed(num_steps)
            if slots == self._num_slots():
                break
        return block

    def _timed(self, num_steps: int) -> Block:
        device = self.engine.decoder.target.device
        if device.type == "cuda":
            # while this runs the host gets ahead, so that the first timed step does not wait to be launched
            self.advance(LEAD_IN_STEPS)
        before = self._num_new()
        seconds = seconds_of(partial(self.advance, num_steps), device)
        return Block(1000 * seconds / num_steps, (before, self._num_new()), num_steps, self._num_slots())

    def _num_new(self) -> int:
        assert self._last is not None
        return self._last.num_new[0]

    def _num_slots(self) -> int:
        assert self.engine.state is not None
        return self.engine.state.cache.num_used


def tokens_needed(num_steps: int, num_blocks: int, max_tokens_per_step: int) -> int:
    """New tokens that a runner needs for so many blocks of so many steps without beginning anew, with some to spare."""
    return (WARM_UP_STEPS + num_blocks * (LEAD_IN_STEPS + num_steps) + 4) * max_tokens_per_step


def time_blocks(
    runners: Sequence[Runner], *, num_steps: int, repetitions: int, on_block: Callable[[], object] = lambda: None
) -> list[list[Block]]:
    """Blocks of each runner, after one that is not counted; in every repetition all runners take their turn.

    The order is reversed from one repetition to the next, so that drift cancels in ratios of neighbours.
    """
    blocks: list[list[Block]] = [[] for _ in runners]
    for repetition in range(repetitions + 1):
        turn = list(zip(runners, blocks, strict=True))
        for runner, mine in turn[:: -1 if repetition % 2 else 1]:
            block = runner.block(num_steps)
            if repetition:
                mine.append(block)
            on_block()
    return blocks


def plain_continuation(subject: Subject, variant: Variant, prompt: list[int], num_tokens: int) -> Tensor:
    """What the base alone emits behind `prompt`, by plain steps, shape [num_tokens]."""
    engine = subject.engine(0, variant, num_tokens)
    for _ in engine.run([prompt]):
        pass
    assert engine.state is not None
    return engine.state.output[0, :num_tokens].clone()
