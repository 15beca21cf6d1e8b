"""Times ways of decoding side by side, and turns the calls into rows of figures.

Every way decodes every batch of prompts in turn, so that a ratio compares neighbours in time. Knows no files.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle

import torch
from timing.baselines import Decoded, Way
from timing.clock import quartiles

from pardec.data.benchmarks import Prompt
from pardec.measures.divergence import Divergence

BYTES_PER_MIB = 2**20


@dataclass(frozen=True)
class Call:
    """One timed call: what it gave, and its wall-clock seconds, prefill included."""

    decoded: Decoded
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens of all sequences per second."""
        return self.decoded.num_new_tokens / self.seconds


@dataclass
class Timed:
    """A way and its counted calls, ordered by repetition, then by batch: the same order for every way.

    Attributes:
        way: that was timed.
        calls: without those of the warm-up.
        memory_bytes: on CUDA, most memory that the way had at a time besides the weights, with what it keeps between
            its calls and without what other ways keep; the warm-up counts.
        kept_bytes: what its calls so far have left allocated.
    """

    way: Way
    calls: list[Call] = field(default_factory=list)
    memory_bytes: int = 0
    kept_bytes: int = 0


def time_ways(
    ways: Sequence[Way],
    batches: Sequence[list[list[int]]],
    *,
    repetitions: int,
    device: torch.device,
    num_warm_up: int | None = None,
    on_call: Callable[[], object] = lambda: None,
) -> list[Timed]:
    """Decodes all batches once to warm up, compiling and capturing included, then `repetitions` times.

    From one batch to the next the order of the ways is reversed, so that none always follows the same neighbour.

    Args:
        ways: to time.
        batches: token ids of the prompts of each batch.
        repetitions: counted passes over all batches.
        device: of the model.
        num_warm_up: batches that warm up, the first ones; default all, as each may have a shape of its own.
        on_call: called after every call.
    """
    timed = [Timed(way) for way in ways]
    for repetition in range(repetitions + 1):
        for index, batch in enumerate(batches if repetition else batches[:num_warm_up]):
            seed = repetition * len(batches) + index
            for one in timed[:: -1 if seed % 2 else 1]:
                call = _timed_call(one, batch, seed, device)
                if repetition:
                    one.calls.append(call)
                on_call()
    return timed


def _timed_call(timed: Timed, batch: list[list[int]], seed: int, device: torch.device) -> Call:
    on_cuda = device.type == "cuda"
    allocated = 0
    if on_cuda:
        allocated = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    decoded = timed.way.decode(batch, seed)
    if on_cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    if on_cuda:
        growth = torch.cuda.max_memory_allocated(device) - allocated
        timed.memory_bytes = max(timed.memory_bytes, timed.kept_bytes + growth)
        timed.kept_bytes += torch.cuda.memory_allocated(device) - allocated
    return Call(decoded, seconds)


def rows_of(
    timed: Sequence[Timed],
    batches: Sequence[Sequence[Prompt]],
    compare: Callable[[Prompt, list[int]], Divergence | None] | None,
) -> tuple[list[dict[str, object]], list[str]]:
    """One row of figures per way, and a line for each difference that no tie explains.

    Args:
        timed: with the ways `plain` and `generate` among them.
        batches: that were timed.
        compare: new tokens of a prompt with those of `model.generate`; None when sampled.
    """
    plain, generate = (next(one for one in timed if one.way.name == name) for name in ("plain", "generate"))
    categories = [batch[0].category for batch in batches]
    has_categories = len(batches[0]) == 1 and len(set(categories)) > 1
    rows, problems = [], []
    for one in timed:
        row = figures(one, plain, generate)
        if has_categories:
            row["ratio_to_plain_by_category"] = ratio_by_category(one, plain, categories)
        if compare is not None:
            found = differences(one, batches, compare)
            wrong = [divergence for divergence in found if not divergence.explained]
            row |= {"identical": not wrong, "num_ties": len(found) - len(wrong)}
            problems += [
                f"{one.way.name} {one.way.adapter}: prompt {divergence.prompt}, new token {divergence.index}: "
                f"{divergence.tokens[0]} instead of {divergence.tokens[1]}, {divergence.shortfall:.2g} below the best"
                for divergence in wrong
            ]
        rows.append(row)
    return rows, problems


def differences(
    timed: Timed, batches: Sequence[Sequence[Prompt]], compare: Callable[[Prompt, list[int]], Divergence | None]
) -> list[Divergence]:
    """Every divergence from `model.generate`; one that comes up in several repetitions counts once."""
    found: dict[tuple, Divergence | None] = {}
    for call, batch in zip(timed.calls, cycle(batches), strict=False):
        for prompt, token_ids in zip(batch, call.decoded.token_ids, strict=True):
            key = (tuple(prompt.token_ids), tuple(token_ids))
            if key not in found:
                found[key] = compare(prompt, token_ids)
    return [divergence for divergence in found.values() if divergence is not None]


def figures(timed: Timed, plain: Timed, generate: Timed) -> dict[str, object]:
    """The figures of one way beside those of plain and of `model.generate`, rounded.

    Rates are sums over sums; a ratio is a median over pairs of calls on the same batch and repetition.
    """
    decoded = [call.decoded for call in timed.calls]
    seconds = sum(call.seconds for call in timed.calls)
    steps = sum(one.num_steps for one in decoded)
    drafts = sum(one.num_drafts for one in decoded)
    accepted = sum(one.num_accepted_tokens for one in decoded)
    tokens = sum(one.num_new_tokens for one in decoded)
    memory = timed.way.model_bytes + timed.memory_bytes if timed.memory_bytes else None
    row: dict[str, object] = {
        "way": timed.way.name,
        "adapter": timed.way.adapter,
        "num_speculative_tokens": timed.way.num_speculative_tokens,
        "block_lengths": timed.way.block_lengths and list(timed.way.block_lengths),
        "tree": timed.way.tree and asdict(timed.way.tree),
        "tokens_per_second": round(tokens / seconds, 2),
        "mean_acceptance_length": round(1 + (accepted / drafts if drafts else 0.0), 4),
        "ms_per_step": round(1000 * seconds / steps, 3) if steps else None,
        "rows_per_step": round(sum(one.num_rows for one in decoded) / steps, 2) if steps else None,
        "peak_memory_mib": memory and round(memory / BYTES_PER_MIB, 1),
        "num_new_tokens": tokens,
        "num_steps": steps,
        "seconds": round(seconds, 4),
    }
    for name, reference in (("plain", plain), ("generate", generate)):
        low, median, high = quartiles(ratios(timed.calls, reference.calls))
        row[f"ratio_to_{name}"] = round(median, 4)
        row[f"ratio_to_{name}_quartiles"] = [round(low, 4), round(high, 4)]
    return row


def ratios(calls: Sequence[Call], reference: Sequence[Call]) -> list[float]:
    """Speed of each call over the speed of the reference on the same batch and repetition."""
    pairs = zip(calls, reference, strict=True)
    return [one.tokens_per_second / other.tokens_per_second for one, other in pairs]


def ratio_by_category(timed: Timed, plain: Timed, categories: Sequence[str]) -> dict[str, float]:
    """Median ratio to plain for each category of prompts; `categories` has one entry per batch."""
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for index, ratio in enumerate(ratios(timed.calls, plain.calls)):
        groups[categories[index % len(categories)]].append(ratio)
    return {category: round(quartiles(group)[1], 4) for category, group in groups.items()}
