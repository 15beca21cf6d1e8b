"""The ways of decoding that a table of serving compares: vLLM and pardec, each plain and with every adapter.

Knows how each is asked, and the CPU time of a call; no table and no files but those of the exports.
Legend: K num_speculative_tokens of an adapter; vLLM's is K + 1.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from timing.clock import quartiles
from timing.vllm_process import Served, VllmProcess

from pardec.exports.export import export_adapter
from pardec.model import SelfSpeculativeModel
from pardec.target.base import resolve_base

PLAIN = "plain"
_DOORS = {"vllm": "plugin", "vllm-stock": "stock draft"}


@dataclass
class Way:
    """A way to decode, and what it gave.

    Attributes:
        engine: `vLLM` or `pardec`.
        name: of the way, in that engine.
        decode: token ids of prompts, to so many new tokens each.
        adapter: what tables call it; None for plain decoding.
        num_speculative_tokens: K; 0 for plain decoding.
        exact_tokens: of a round, that its counts of accepted tokens hold.
        calls: counted ones.
    """

    engine: str
    name: str
    decode: Callable[[list[list[int]], int], Served]
    adapter: str | None = None
    num_speculative_tokens: int = 0
    exact_tokens: int = 0
    calls: list[Served] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The way in words."""
        drafting = f", {self.adapter}, K = {self.num_speculative_tokens}" if self.adapter else ""
        return f"{self.engine} {self.name}{drafting}"

    @property
    def accepted_per_round(self) -> float | None:
        """Drafted tokens that were accepted in a round, exact ones and the bonus token not counted; None if plain."""
        rounds = sum(call.num_drafts for call in self.calls)
        accepted = sum(sum(call.accepted_by_position) for call in self.calls)
        return accepted / rounds - self.exact_tokens if rounds else None


@dataclass(frozen=True)
class Engines:
    """How vLLM is started.

    Attributes:
        python: of its environment.
        base: name of the base.
        settings: of the first line that vllm_engine.py reads, but for the model and the draft.
        threads: of every engine.
        folder: for exported adapters.
        running: ends the engines.
    """

    python: str
    base: str
    settings: Mapping[str, Any]
    threads: int
    folder: Path
    running: ExitStack

    def start(self, **draft: Any) -> VllmProcess:
        """An engine that runs."""
        asked = {"model": resolve_base(self.base), **self.settings, **draft}
        return self.running.enter_context(VllmProcess(self.python, asked, threads=self.threads))


def ways_of(
    models: Mapping[str, SelfSpeculativeModel], directories: Mapping[str, str], asked_k: list[int] | None, vllm: Engines
) -> tuple[list[Way], list[dict[str, str]], str]:
    """All ways, plain ones first; those that a door refuses, with the reason; the version of vLLM.

    Args:
        models: by what tables call their adapters, all on one base.
        directories: of the adapters, by the same names.
        asked_k: numbers of drafted tokens; default 1 and what an adapter was trained with.
        vllm: how it is started.
    """
    engine = vllm.start()
    ways = [
        Way("vLLM", PLAIN, engine.decode),
        Way("pardec", PLAIN, partial(by_pardec, next(iter(models.values())), PLAIN, 0)),
    ]
    left_out = []
    for label, model in models.items():
        assert model.adapter is not None
        trained = model.adapter.metadata.num_speculative_tokens
        ks = [K for K in asked_k or sorted({1, trained}) if trained >= K]
        ways += [
            Way("pardec", mode, partial(by_pardec, model, mode, K), label, K)
            for mode in ("fused", "two_pass")
            for K in ks
        ]
        for door, name in _DOORS.items():
            out = vllm.folder / f"{len(ways)}-{door}"
            try:
                export_adapter(directories[label], door, out, base=vllm.base)
            except ValueError as error:
                left_out.append({"way": name, "adapter": label, "reason": str(error)})
                continue
            options = {"use_local_argmax_reduction": True} if model.adapter.head is not None else {}
            for K in ks:
                served = vllm.start(draft=str(out), num_speculative_tokens=K + 1, options=options)
                ways.append(Way("vLLM", name, served.decode, label, K, exact_tokens=1))
    return ways, left_out, engine.version


def by_pardec(
    model: SelfSpeculativeModel, mode: str, num_speculative_tokens: int, prompts: list[list[int]], max_new_tokens: int
) -> Served:
    """Greedy continuations by pardec itself, and what they cost this process."""
    K = num_speculative_tokens or None
    start = time.process_time()
    out = model.generate(prompts, max_new_tokens=max_new_tokens, mode=mode, num_speculative_tokens=K)
    seconds = time.process_time() - start
    rates = out.stats.acceptance_rate_per_position["unconditional"]
    accepted = [round(rate * out.stats.num_drafts) for rate in rates]
    return Served(out.token_ids, seconds, out.stats.num_drafts, accepted)


def decode_in_turn(
    ways: Sequence[Way],
    batches: Sequence[list[list[int]]],
    *,
    max_new_tokens: int,
    repetitions: int,
    on_call: Callable[[], object] = lambda: None,
) -> None:
    """Decodes all batches once to warm up, compiling included, then `repetitions` times; ways take turns on a batch.

    Args:
        ways: get the counted calls, ordered by repetition, then by batch.
        batches: token ids of the prompts of each.
        max_new_tokens: of each prompt.
        repetitions: counted passes.
        on_call: called after every call.
    """
    for way in ways:
        way.calls.clear()
    for repetition in range(repetitions + 1):
        for index, batch in enumerate(batches):
            for way in ways[:: -1 if (repetition + index) % 2 else 1]:
                call = way.decode(batch, max_new_tokens)
                if repetition:
                    way.calls.append(call)
                on_call()


def row_of(way: Way, ways: Sequence[Way]) -> dict[str, Any]:
    """Figures of a way's calls, with ratios to both engines' plain decoding of the same batches in the same passes."""
    seconds, accepted = sum(call.cpu_seconds for call in way.calls), way.accepted_per_round
    row: dict[str, Any] = {
        "engine": way.engine,
        "way": way.name,
        "adapter": way.adapter,
        "num_speculative_tokens": way.num_speculative_tokens,
        "tokens_per_cpu_second": round(sum(call.num_new_tokens for call in way.calls) / seconds, 2),
        "accepted_per_round": None if accepted is None else round(accepted, 4),
    }
    for engine in ("vLLM", "pardec"):
        plain = next(one for one in ways if (one.engine, one.name) == (engine, PLAIN))
        ratios = [
            a.tokens_per_cpu_second / b.tokens_per_cpu_second for a, b in zip(way.calls, plain.calls, strict=True)
        ]
        low, median, high = (round(value, 4) for value in quartiles(ratios))
        row |= {f"ratio_to_{engine}_plain".lower(): median, f"ratio_to_{engine}_plain_quartiles".lower(): [low, high]}
    return row
