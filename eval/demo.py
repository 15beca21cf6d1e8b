"""What do the quickstart's two adapters accept, how fast are they, and are the tokens the model's own?

    python eval/demo.py runs/quickstart_embeddings runs/quickstart [--output runs/demo]

The table of `make demo`. Every prompt of the test split is decoded by all modes in turn, plain decoding among
them, so that a ratio to plain compares neighbours in time. Writes table, JSON and a picture; the last line printed is
one JSON object.
"""

import argparse
import json
import statistics
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from reporting.plots import plot_acceptance_by_position
from reporting.result_files import write_json
from rich.console import Console
from rich.table import Table
from timing.baselines import generated_alone
from tqdm.auto import tqdm
from transformers.utils import logging

import pardec
from pardec.adapters.adapter import Adapter
from pardec.data.corpus import held_out_prompts
from pardec.data.python_sources import TEST
from pardec.decoding.output import GenerationOutput
from pardec.measures.acceptance import Acceptance, measure_acceptance, summarise
from pardec.measures.divergence import TOLERANCE, divergence_from
from pardec.model import SelfSpeculativeModel
from pardec.run import device_name, exit_on_unusable_input, library_versions
from pardec.training.first_embeddings import mean_embedding

TEMPERATURE, TOP_K = 0.8, 10
# two best logits closer than this are a tie that float32 arithmetic decides either way
TIE_GAP = TOLERANCE[torch.float32]


@dataclass
class Run:
    """One row of the table: a way to decode, and what it gave for each prompt."""

    adapter: str
    mode: str
    num_speculative_tokens: int
    model: SelfSpeculativeModel
    prompts: list[list[int]]
    outputs: list[GenerationOutput] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    identical: bool | None = None  # to what `generate` gives

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
    def row(self) -> dict:
        """The figures of the JSON line."""
        figures = {
            "adapter": self.adapter,
            "mode": self.mode,
            "num_speculative_tokens": self.num_speculative_tokens,
            "mean_acceptance_length": round(self.measured.mean_acceptance_length, 4),
            "tokens_per_forward": round(self.measured.stats.tokens_per_forward, 4),
            "tokens_per_second": round(self.measured.stats.tokens_per_second, 2),
            "ratio_to_plain": round(self.ratio, 4),
        }
        return figures if self.identical is None else figures | {"identical": self.identical}


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("embeddings", help="adapter of mask embeddings alone")
    parser.add_argument("lora", help="adapter with a gated LoRA, same base")
    parser.add_argument("--output", default="runs/demo", help="folder for table, JSON and picture")
    parser.add_argument("--num-prompts", type=int, help="default all standard prompts of the test split")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    args = parser.parse_args()
    with exit_on_unusable_input():
        report(args)


def report(args: argparse.Namespace) -> None:
    """The whole measurement."""
    logging.disable_progress_bar()
    lora = pardec.load(args.lora)
    models = {"embeddings": pardec.load(args.embeddings, base=lora.base_model), "lora": lora}
    assert lora.tokenizer is not None
    assert lora.adapter is not None
    prompts = held_out_prompts(lora.tokenizer, TEST, num_prompts=args.num_prompts)
    K = lora.adapter.metadata.num_speculative_tokens
    console = Console(width=120)
    console.print(f"{len(prompts)} prompts of the test split, {args.max_new_tokens} new tokens, batch 1")

    untrained = measure_untrained(models["embeddings"], prompts, args.max_new_tokens)
    fused = {"embeddings": sorted({1, K}), "lora": list(range(1, K + 1))}
    greedy = timed_runs(models, prompts, args.max_new_tokens, fused, K, temperature=0.0)
    best = max((run for run in greedy if run.adapter == "lora" and run.mode == "fused"), key=lambda run: run.ratio)
    fused = {"embeddings": [K], "lora": sorted({best.num_speculative_tokens, K})}
    sampled = timed_runs(models, prompts, args.max_new_tokens, fused, K, temperature=TEMPERATURE)

    references = generated_alone(lora.base_model, prompts, args.max_new_tokens)
    for run in greedy:
        run.identical = is_same(run, references)
    setting = f"temperature {TEMPERATURE}, top-k {TOP_K}"
    print_table(console, "greedy", greedy)
    print_table(console, setting, sampled)
    console.print(
        f"untrained mask embeddings (mean input embedding), {setting}: mean acceptance length "
        f"{untrained.mean_acceptance_length:.3f}\n"
        f"best K for speed on this device: {best.num_speculative_tokens} ({best.ratio:.2f} x plain, greedy, gated LoRA)"
    )
    accepted = {"untrained": untrained}
    accepted |= {run.adapter: run.measured for run in sampled if (run.mode, run.num_speculative_tokens) == ("fused", K)}
    rates = {name: one.stats.acceptance_rate_per_position["unconditional"] for name, one in accepted.items()}
    picture = Path(args.output) / "acceptance_by_position.png"
    plot_acceptance_by_position(rates, f"acceptance by position, {setting}, test split", picture)
    console.print(f"picture: {picture}\n")
    show_sample(console, lora, prompts[len(prompts) // 2])
    result = {
        "rows": [run.row for run in greedy],
        "sampled_rows": [run.row for run in sampled],
        "untrained_sampled_mean_acceptance_length": round(untrained.mean_acceptance_length, 4),
        "num_prompts": len(prompts),
        "max_new_tokens": args.max_new_tokens,
        "device": device_name(lora.target.device),
        "versions": library_versions(),
    }
    write_json(result, Path(args.output) / "demo.json")
    print(json.dumps(result))


def measure_untrained(model: SelfSpeculativeModel, prompts: list[list[int]], max_new_tokens: int) -> Acceptance:
    """What is accepted of mask tokens that learned nothing, sampled."""
    assert model.adapter is not None
    facts = model.adapter.metadata
    num_masks = 1 if facts.mask_sharing == "shared" else facts.num_speculative_tokens
    masks = mean_embedding(model.target).cpu().repeat(num_masks, 1)
    adapter = Adapter(masks, facts.model_copy(update={"head": None}))
    untrained = SelfSpeculativeModel(model.base_model, model.tokenizer, adapter)
    return measure_acceptance(untrained, prompts, max_new_tokens=max_new_tokens, temperature=TEMPERATURE, top_k=TOP_K)


def timed_runs(
    models: dict[str, SelfSpeculativeModel],
    prompts: list[list[int]],
    max_new_tokens: int,
    fused: dict[str, list[int]],
    K: int,
    temperature: float,
) -> list[Run]:
    """Every way of decoding on every prompt, in turn; the first prompt warms up and is decoded again."""
    plain = Run("", "plain", 0, models["lora"], prompts)
    runs = []
    for name, model in models.items():
        runs.append(Run(name, "two_pass", K, model, prompts))
        runs += [Run(name, "fused", k, model, prompts) for k in fused[name]]
    top_k = TOP_K if temperature else None
    bar = tqdm(total=len(prompts), unit="prompt", desc="sampled" if temperature else "greedy")
    for index, prompt in enumerate([prompts[0], *prompts]):
        for run in (plain, *runs):
            out = run.model.generate(
                prompt,
                max_new_tokens=max_new_tokens if index else 16,
                temperature=temperature,
                top_k=top_k,
                seed=index,
                mode=run.mode,
                num_speculative_tokens=run.num_speculative_tokens or None,
            )
            if index:
                run.outputs.append(out)
                run.ratios.append(out.stats.tokens_per_second / plain.outputs[-1].stats.tokens_per_second)
        bar.update(index > 0)
    bar.close()
    by_adapter = []
    for name in models:
        by_adapter.append(Run(name, "plain", 0, plain.model, prompts, plain.outputs, plain.ratios))
        by_adapter += [run for run in runs if run.adapter == name]
    return by_adapter


def is_same(run: Run, references: list[list[int]]) -> bool:
    """Whether the greedy tokens are those of `model.generate` of the untouched base, ties of float32 aside."""
    for prompt, out, reference in zip(run.prompts, run.outputs, references, strict=True):
        one = divergence_from(run.model.base_model, run.mode, prompt, out.token_ids[0], reference)
        if one is not None:
            print(f"{run.mode}: differs at token {one.index}, where the two best logits are {one.top2_gap:.1e} apart")
            if one.top2_gap > TIE_GAP:
                return False
    return True


def print_table(console: Console, title: str, runs: list[Run]) -> None:
    """One line per way of decoding."""
    table = Table(
        "adapter", "mode", "K", "mean acceptance length (95 % interval)", "outside repetition",
        "tokens per forward", "tokens/s", "ratio to plain", title=title,
    )  # fmt: skip
    if runs[0].identical is not None:
        table.add_column("identical to generate")
    for run in runs:
        row, drafted, outside = run.row, run.mode != "plain", run.measured.outside_repetition
        low, high = run.measured.interval
        table.add_row(
            run.adapter,
            run.mode,
            str(run.num_speculative_tokens) if drafted else "-",
            f"{row['mean_acceptance_length']:.2f}" + (f" ({low:.2f} to {high:.2f})" if drafted else ""),
            f"{outside:.2f}" if outside else "-",
            f"{row['tokens_per_forward']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['ratio_to_plain']:.2f} x",
            *([] if run.identical is None else ["yes" if run.identical else "NO"]),
        )
    console.print(table)


def show_sample(console: Console, model: SelfSpeculativeModel, prompt: list[int]) -> None:
    """One sampled continuation, accepted drafts in colour."""
    assert model.tokenizer is not None
    console.print("a sampled continuation; accepted drafted tokens are green:", style="bold")
    console.print(model.tokenizer.decode(prompt[-48:]), style="dim", end="", markup=False, highlight=False)
    for chunk in model.stream(prompt, max_new_tokens=96, temperature=TEMPERATURE, top_k=TOP_K, seed=0):
        for index, token in enumerate(chunk.token_ids):
            style = "bold green" if index < chunk.num_accepted_tokens else None
            text = model.tokenizer.decode([token])
            console.print(text, style=style, end="", markup=False, highlight=False)
    console.print("\n")


if __name__ == "__main__":
    main()
