"""Measures all row counts of one way to run steps behind one context, in turn, and makes rows of figures of them.

Knows no command line and no files. Legend: K num_speculative_tokens.
"""

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from timing.bandwidth import StepBound, flops_per_step
from timing.clock import quartiles
from timing.step_profile import profile_steps
from timing.steps import (
    STOCK,
    Block,
    Runner,
    Subject,
    Variant,
    force_acceptance,
    plain_continuation,
    time_blocks,
    tokens_needed,
)
from torch import Tensor

from pardec.errors import first_line

PROFILED_STEPS = 10
# the context whose steps are profiled, or the nearest to it
PROFILED_CONTEXT = 1024
OUT_OF_MEMORY = "it does not fit into the device's memory beside what is there already"


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        variants: ways to run steps.
        contexts: prompt lengths in tokens.
        drafted: K of every row count, 0 (plain) first; others no smaller than `forced_acceptance`.
        steps_per_block: timed together.
        repetitions: counted blocks of every row count.
        forced_acceptance: drafts that an oracle makes every fused step accept; None for whatever is accepted.
        profile: whether steps at one of the contexts are profiled too.
        seed: of prompts, and of all that is random.
    """

    variants: list[Variant]
    contexts: list[int]
    drafted: list[int]
    steps_per_block: int
    repetitions: int
    forced_acceptance: int | None
    profile: bool
    seed: int

    @property
    def blocks_per_group(self) -> int:
        """Calls of `on_block` by `measure_group`, unless rows are left out."""
        return len(self.drafted) * (self.repetitions + 2)

    def profiles(self, context: int) -> bool:
        """Whether steps behind this context are profiled."""
        return self.profile and context == min(self.contexts, key=lambda one: abs(one - PROFILED_CONTEXT))


def measure_group(
    subject: Subject,
    variant: Variant,
    context: int,
    plan: Plan,
    bound: StepBound,
    on_block: Callable[[], object] = lambda: None,
) -> dict[str, list[dict]]:
    """Runs plain steps and every chain of the plan in turn behind one random prompt.

    Args:
        subject: the base and what drafts for it.
        variant: how steps are run.
        context: tokens of the prompt.
        plan: the rest.
        bound: of the device and the base.
        on_block: called after every prefill and every block.

    Returns:
        ready for JSON: `rows`, one for every row count; `profiles`, the same, where steps were profiled; `left_out`,
            row counts that could not be measured, with the reason.
    """
    place = {"context": context} | asdict(variant)
    reason = _why_not(subject, variant)
    if reason is not None:
        return {"left_out": [place | {"reason": reason}]}
    generator = torch.Generator().manual_seed(plan.seed)
    prompt = torch.randint(subject.target.vocab_size, (context,), generator=generator).tolist()
    clear_device_cache(garbage_collection=True)  # engines of the group before stand in cycles of references
    subject.prepare(variant)
    make = _runner_maker(subject, variant, prompt, plan)
    with ExitStack() as stack:
        runners: dict[int, Runner] = {}
        left_out = []
        for K in plan.drafted:
            try:
                runner = make(K)
                runner.begin()
                runners[K] = stack.enter_context(closing(runner))
            except (ValueError, RuntimeError) as error:
                # a kernel that a device cannot compile or run must not cost the figures of the others
                reason = OUT_OF_MEMORY if isinstance(error, torch.OutOfMemoryError) else first_line(error)
                left_out.append(place | {"rows": (K + 1) ** 2, "reason": reason})
            on_block()
        if 0 not in runners:  # there is nothing to compare with
            return {"left_out": left_out}
        timed = time_blocks(
            list(runners.values()), num_steps=plan.steps_per_block, repetitions=plan.repetitions, on_block=on_block
        )
        blocks = dict(zip(runners, timed, strict=True))
        warned = {K: {"warnings": runner.warnings} for K, runner in runners.items()}
        rows = [place | _figures(subject, K, blocks, context, bound, variant) | warned[K] for K in runners]
        profiles = []
        if plan.profiles(context):
            profiles = [place | _names(K, subject) | _profile(runner) for K, runner in runners.items()]
    return {"rows": rows, "profiles": profiles, "left_out": left_out}


def _why_not(subject: Subject, variant: Variant) -> str | None:
    if variant.lora and subject.lora is None:
        return "the adapter has no LoRA"
    if variant.head and subject.drafter is None:
        return "the adapter has no sampler head"
    if variant.attention != STOCK and subject.facts.query_group is None:
        return f"the model does not take the {variant.attention} route; --attention stock measures its own attention"
    return None


def _runner_maker(subject: Subject, variant: Variant, prompt: list[int], plan: Plan) -> Callable[[int], Runner]:
    """K -> a runner for this prompt; raises ValueError, saying why, if there can be none."""
    forced, trained = plan.forced_acceptance, subject.mask_embeddings.shape[0]
    new_tokens = partial(_new_tokens, subject, plan, len(prompt))
    continuation: list[Tensor] = []  # made at the first need

    def make(K: int) -> Runner:
        if trained < K:
            raise ValueError(f"the adapter has {trained} mask tokens, and these rows take {K}")
        if K == 0 or forced is None:
            return Runner(subject.engine(K, variant, new_tokens(K + 1)), prompt, K + 1)
        num_new = new_tokens(forced + 1)
        if not continuation:
            plain = Variant(compile=False, lora=False, attention=variant.attention)
            continuation.append(plain_continuation(subject, plain, prompt, num_new))
        engine = subject.engine(K, variant, num_new)
        # what stands behind the last token can be drafted, never emitted
        force_acceptance(engine.decoder, torch.nn.functional.pad(continuation[0], (0, K)), forced)
        return Runner(engine, prompt, forced + 1)

    return make


def _new_tokens(subject: Subject, plan: Plan, context: int, max_tokens_per_step: int) -> int:
    """New tokens for all steps of a runner, or as many as the model's positions hold."""
    num_steps = max(plan.steps_per_block, PROFILED_STEPS) if plan.profiles(context) else plan.steps_per_block
    least = tokens_needed(num_steps, 1, max_tokens_per_step)
    wanted = tokens_needed(num_steps, plan.repetitions + 2, max_tokens_per_step)
    limit = subject.target.max_positions
    if limit is not None and context + least > limit:
        raise ValueError(f"the model has {limit} positions, and these steps take {context} + {least}")
    return wanted if limit is None else min(wanted, limit - context)


def _names(K: int, subject: Subject) -> dict:
    rank = None if subject.lora is None else subject.lora.rank
    return {"rows": (K + 1) ** 2, "num_speculative_tokens": K, "lora_rank": rank}


def _figures(
    subject: Subject, K: int, blocks: dict[int, list[Block]], context: int, bound: StepBound, variant: Variant
) -> dict:
    """The figures of one row count beside plain steps, rounded."""
    mine, plain = blocks[K], blocks[0]
    ms = float(np.median([block.ms_per_step for block in mine]))
    low, ratio, high = quartiles([a.ms_per_step / b.ms_per_step for a, b in zip(mine, plain, strict=True)])
    rates = [1000 * block.tokens_per_step / block.ms_per_step for block in mine]
    plain_rates = [1000 * block.tokens_per_step / block.ms_per_step for block in plain]
    # the newest token is not in the cache
    committed = context + float(np.mean([block.num_new for block in mine])) - 1
    bound_ms = bound.ms(committed, with_lora=variant.lora and K > 0)
    flops = flops_per_step(subject.target.base, (K + 1) ** 2, committed)
    return _names(K, subject) | {
        "ms_per_step": round(ms, 4),
        "ms_per_step_quartiles": [round(q, 4) for q in quartiles([block.ms_per_step for block in mine])[::2]],
        "ratio_to_plain": round(ratio, 4),
        "ratio_to_plain_quartiles": [round(low, 4), round(high, 4)],
        "bound_ms": round(bound_ms, 4),
        "share_of_bound": round(bound_ms / ms, 4),
        "tflops": round(flops / ms / 1e9, 6),
        "committed_tokens": round(committed, 1),
        "slots_attended": round(float(np.mean([block.num_slots for block in mine])), 1),
        "tokens_per_step": round(float(np.mean([block.tokens_per_step for block in mine])), 4),
        "tokens_per_second": round(float(np.median(rates)), 2),
        "tokens_per_second_to_plain": round(float(np.median(np.divide(rates, plain_rates))), 4),
    }


def _profile(runner: Runner) -> dict:
    runner.reserve(PROFILED_STEPS)
    return profile_steps(runner.advance, PROFILED_STEPS)
