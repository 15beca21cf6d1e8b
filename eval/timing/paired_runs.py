"""Ways of decoding that take turns on every prompt, so that a ratio to plain compares neighbours in time.

Knows the public model and counts; no table and no files.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from tqdm.auto import tqdm

from pardec.decoding.output import GenerationOutput
from pardec.draft_tree import AnyTree
from pardec.layout import BlockLengths
from pardec.measures.acceptance import Acceptance, summarise
from pardec.measures.divergence import TOLERANCE, divergence_from
from pardec.model import SelfSpeculativeModel

# two best logits closer than this are a tie that float32 arithmetic decides either way
TIE_GAP = TOLERANCE[torch.float32]
_WARM_UP_TOKENS = 16


@dataclass
class Run:
    """A way to decode, and what it gave for each prompt.

    Attributes:
        adapter: what tables call it.
        mode: as tables print it; of decoding, where nothing was tuned.
        num_speculative_tokens: K, 0 in plain mode.
        model: with the adapter.
        prompts: token ids.
        block_lengths: of the tuned choice, which `generate` makes by itself where nothing is asked for.
        tree: likewise.
        outputs: one for each prompt.
        ratios: of speed to plain decoding of the same prompt.
        identical: whether greedy tokens are those of `generate`; None where nobody looked.
    """

    adapter: str
    mode: str
    num_speculative_tokens: int
    model: SelfSpeculativeModel
    prompts: list[list[int]]
    block_lengths: BlockLengths | None = None
    tree: AnyTree | None = None
    outputs: list[GenerationOutput] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    identical: bool | None = None

    @property
    def ratio(self) -> float:
        """Median ratio to plain."""
        return statistics.median(self.ratios)

    @cached_property
    def measured(self) -> Acceptance:
        """What was accepted behind the prompts, and how fast."""
        counts = [one for out in self.outputs for one in out.counts]
        tokens = [ids for out in self.outputs for ids in out.token_ids]
        return summarise(self.prompts, tokens, counts, sum(out.stats.seconds for out in self.outputs))

    @property
    def seconds_per_step(self) -> float:
        """Of whole calls, prefill included."""
        stats = self.measured.stats
        return stats.seconds / max(stats.num_steps, 1)

    @property
    def row(self) -> dict[str, Any]:
        """Its figures, rounded."""
        stats = self.measured.stats
        figures: dict[str, Any] = {
            "adapter": self.adapter,
            "mode": self.mode,
            "num_speculative_tokens": self.num_speculative_tokens,
            "mean_acceptance_length": round(self.measured.mean_acceptance_length, 4),
            "tokens_per_step": round(stats.tokens_per_step, 4),
            "tokens_per_forward": round(stats.tokens_per_forward, 4),
            "tokens_per_second": round(stats.tokens_per_second, 2),
            "ratio_to_plain": round(self.ratio, 4),
        }
        if self.block_lengths is not None:
            figures["block_lengths"] = list(self.block_lengths)
        if self.tree is not None:
            figures["tree"] = asdict(self.tree)
        return figures if self.identical is None else figures | {"identical": self.identical}


def decode_in_turn(
    plain: Run, runs: Sequence[Run], max_new_tokens: int, temperature: float, top_k: int | None, label: str
) -> None:
    """Decodes the prompts of `plain` with all runs, which take the outputs; the first one warms up before it counts.

    Args:
        plain: plain decoding, which ratios are to.
        runs: the others.
        max_new_tokens: for each prompt.
        temperature: 0 is greedy.
        top_k: see `generate`.
        label: of the progress bar.
    """
    with tqdm(total=len(plain.prompts), unit="prompt", desc=label) as bar:
        for index, prompt in enumerate([plain.prompts[0], *plain.prompts]):
            for run in (plain, *runs):
                asked: dict[str, Any] = {}
                if run.block_lengths is None:
                    asked = {"mode": run.mode, "num_speculative_tokens": run.num_speculative_tokens}
                out = run.model.generate(
                    prompt,
                    max_new_tokens=max_new_tokens if index else _WARM_UP_TOKENS,
                    temperature=temperature,
                    top_k=top_k,
                    seed=index,
                    **asked,
                )
                if index:
                    run.outputs.append(out)
                    run.ratios.append(out.stats.tokens_per_second / plain.outputs[-1].stats.tokens_per_second)
            bar.update(index > 0)


def is_same(run: Run, references: Sequence[list[int]]) -> bool:
    """Whether the greedy tokens are those of `model.generate` of the untouched base, ties of float32 aside."""
    for prompt, out, reference in zip(run.prompts, run.outputs, references, strict=True):
        one = divergence_from(run.model.base_model, run.mode, prompt, out.token_ids[0], reference)
        if one is not None:
            print(f"{run.mode}: differs at token {one.index}, where the two best logits are {one.top2_gap:.1e} apart")
            if one.top2_gap > TIE_GAP:
                return False
    return True
