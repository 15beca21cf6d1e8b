"""What do the quickstart's two adapters accept, how fast are they, and are the tokens the model's own?

    python eval/demo.py runs/quickstart_embeddings runs/quickstart [--output runs/demo]

The tables of `make demo`. Every prompt of the test split is decoded by all modes in turn, plain decoding among them,
so that a ratio to plain compares neighbours in time. Then `pardec tune` chooses for each adapter on the validation
split, and the last table has what it chose, on the test split again. Writes JSON and a picture; the last line printed
is one JSON object.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from reporting.plots import plot_acceptance_by_position
from reporting.result_files import provenance, write_json
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from timing.baselines import generated_alone
from timing.paired_runs import Run, decode_in_turn, is_same
from transformers.utils import logging

import pardec
from pardec.adapters.adapter import Adapter
from pardec.adapters.tuned import TunedChoice, check_writable
from pardec.data.corpus import held_out_prompts
from pardec.data.python_sources import TEST, VALIDATION
from pardec.layout import PLAIN
from pardec.measures.acceptance import Acceptance, measure_acceptance
from pardec.model import SelfSpeculativeModel
from pardec.run import exit_on_unusable_input
from pardec.training.first_embeddings import mean_embedding
from pardec.tuning.measuring import Effort
from pardec.tuning.tune import tune

TEMPERATURE, TOP_K = 0.8, 10
SAMPLED = f"temperature {TEMPERATURE}, top-k {TOP_K}"
# for each adapter: half a minute on two cores
TUNING_PROMPTS, TUNING_TOKENS = 8, 64
TUNING_EFFORT = Effort(num_shapes=3, num_batches=2, num_finalists=2, repetitions=3, copies_beside_tree=False)


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("embeddings", help="adapter of mask embeddings alone")
    parser.add_argument("lora", help="adapter with a gated LoRA, same base")
    parser.add_argument("--output", default="runs/demo", help="folder for JSON and picture")
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
    directories = {"embeddings": args.embeddings, "lora": args.lora}
    for directory in directories.values():  # where the choices are kept
        check_writable(directory)
    assert lora.tokenizer is not None
    assert lora.adapter is not None
    prompts = held_out_prompts(lora.tokenizer, TEST, num_prompts=args.num_prompts)
    K = lora.adapter.metadata.num_speculative_tokens
    console = Console(width=120)
    console.print(f"{len(prompts)} prompts of the test split, {args.max_new_tokens} new tokens, batch 1")

    untrained = measure_untrained(models["embeddings"], prompts, args.max_new_tokens)
    fused = {"embeddings": sorted({1, K}), "lora": sorted({1, min(2, K), K})}
    greedy = timed_runs(models, prompts, args.max_new_tokens, fused, K, temperature=0.0)
    fused = {name: [K] for name in models}
    sampled = timed_runs(models, prompts, args.max_new_tokens, fused, K, temperature=TEMPERATURE)
    references = generated_alone(lora.base_model, prompts, args.max_new_tokens)
    for run in greedy:
        run.identical = is_same(run, references)
    print_table(console, "greedy", greedy)
    print_table(console, SAMPLED, sampled)
    console.print(
        f"untrained mask embeddings (mean input embedding), {SAMPLED}: mean acceptance length "
        f"{untrained.mean_acceptance_length:.3f}"
    )
    draw(console, args.output, untrained, sampled, K)
    show_sample(console, lora, prompts[len(prompts) // 2], K)

    choices = {name: tuned(model, directories[name]) for name, model in models.items()}
    tuned_sampled = tuned_runs(models, choices, prompts, args.max_new_tokens, temperature=TEMPERATURE)
    tuned_greedy = tuned_runs(models, choices, prompts, args.max_new_tokens, temperature=0.0)
    for run in tuned_greedy:
        run.identical = is_same(run, references)
    chosen = "chosen by tuning on the validation split, measured on the test split"
    print_table(console, f"{chosen}, {SAMPLED}", tuned_sampled)
    print_table(console, f"{chosen}, greedy", tuned_greedy)
    fastest = max(tuned_greedy, key=lambda run: run.ratio)
    console.print(f"fastest here, greedy: {fastest.mode} ({fastest.adapter}), {fastest.ratio:.2f} x plain")
    console.print(why_not_more(greedy, K))
    result = {
        "rows": [run.row for run in greedy],
        "sampled_rows": [run.row for run in sampled],
        "tuned_rows": [run.row for run in tuned_greedy],
        "tuned_sampled_rows": [run.row for run in tuned_sampled],
        "choices": {name: asdict(choice) for name, choice in choices.items()},
        "untrained_sampled_mean_acceptance_length": round(untrained.mean_acceptance_length, 4),
        "num_prompts": len(prompts),
        "max_new_tokens": args.max_new_tokens,
        **provenance(lora.target.device),
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
    """Plain, two_pass with K and fused mode with these K of every adapter, on every prompt in turn."""
    plain = Run("", "plain", 0, models["lora"], prompts)
    runs = []
    for name, model in models.items():
        runs.append(Run(name, "two_pass", K, model, prompts))
        runs += [Run(name, "fused", k, model, prompts) for k in fused[name]]
    measure(plain, runs, max_new_tokens, temperature)
    by_adapter = []
    for name in models:
        by_adapter.append(plain_of(name, plain))
        by_adapter += [run for run in runs if run.adapter == name]
    return by_adapter


def measure(plain: Run, runs: list[Run], max_new_tokens: int, temperature: float) -> None:
    """All runs on every prompt, greedily or sampled."""
    label, top_k = ("sampled", TOP_K) if temperature else ("greedy", None)
    decode_in_turn(plain, runs, max_new_tokens, temperature, top_k, label)


def plain_of(name: str, plain: Run) -> Run:
    """Plain decoding as a row of an adapter."""
    return Run(name, "plain", 0, plain.model, plain.prompts, outputs=plain.outputs, ratios=plain.ratios)


def tuned(model: SelfSpeculativeModel, directory: str) -> TunedChoice:
    """What `pardec tune` chooses with little effort and keeps beside the adapter; the model goes by it from now on."""
    assert model.tokenizer is not None
    prompts = held_out_prompts(model.tokenizer, VALIDATION, num_prompts=TUNING_PROMPTS)
    choice = tune(model, directory, prompts, max_new_tokens=TUNING_TOKENS, effort=TUNING_EFFORT).choice
    model.tuned = choice
    return choice


def tuned_runs(
    models: dict[str, SelfSpeculativeModel],
    choices: dict[str, TunedChoice],
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
) -> list[Run]:
    """Plain decoding and what was chosen for each adapter, on every prompt in turn."""
    plain = Run("none", "plain", 0, models["lora"], prompts)
    drafting = {name: choice for name, choice in choices.items() if choice.block_lengths != PLAIN}
    runs = [
        Run(
            name,
            way_of(choice, models[name]),
            choice.num_speculative_tokens,
            models[name],
            prompts,
            choice.block_lengths,
            choice.tree,
        )
        for name, choice in drafting.items()
    ]
    measure(plain, runs, max_new_tokens, temperature)
    # where plain decoding was chosen, it has been measured
    return [plain, *(plain_of(name, plain) for name in choices if name not in drafting), *runs]


def way_of(choice: TunedChoice, model: SelfSpeculativeModel) -> str:
    """What was chosen, in words."""
    has_head = model.engines.head is not None
    copies = f" + {choice.copy_tokens} copies" if choice.copy_tokens else ""
    return f"tuned: {choice.mode}{copies}" + ("" if choice.use_head or not has_head else ", no head")


def why_not_more(greedy: list[Run], K: int) -> str:
    """One sentence about what all K drafts cost and bring."""
    plain, full = (
        next(run for run in greedy if run.adapter == "lora" and (run.mode, run.num_speculative_tokens) == way)
        for way in (("plain", 0), ("fused", K))
    )
    cost, tokens = full.seconds_per_step / plain.seconds_per_step, full.measured.stats.tokens_per_step
    found = f"a step of K = {K} has {(K + 1) ** 2} rows, took {cost:.1f} times as long as a plain one"
    found += f" and emitted {tokens:.2f} tokens"
    if cost <= tokens:
        return f"the LoRA's drafts, all of them: {found}"
    if full.model.target.device.type == "cpu":
        found += ": on a few cores every row costs time, and further drafts are too rarely accepted to pay for theirs"
    return f"why a larger K is not faster here: {found}"


def draw(console: Console, output: str, untrained: Acceptance, sampled: list[Run], K: int) -> None:
    """The picture of acceptance by position."""
    accepted: dict[str, Acceptance] = {"untrained": untrained}
    accepted |= {run.adapter: run.measured for run in sampled if (run.mode, run.num_speculative_tokens) == ("fused", K)}
    rates = {name: one.stats.acceptance_rate_per_position["unconditional"] for name, one in accepted.items()}
    picture = Path(output) / "acceptance_by_position.png"
    plot_acceptance_by_position(rates, f"acceptance by position, {SAMPLED}, test split", picture)
    console.print(f"picture: {picture}\n")


def print_table(console: Console, title: str, runs: list[Run]) -> None:
    """One line per way of decoding, the fastest in bold; a tuned shape beside its K."""
    fastest = max(runs, key=lambda run: run.ratio)
    table = Table(
        "adapter", "mode", "K", "mean\nacceptance\nlength", "95 % interval", "outside\nrepetition", "tokens\nper step",
        "tokens\nper forward", "tokens/s", "ratio to\nplain", title=title, box=SIMPLE_HEAD, padding=0,
    )  # fmt: skip
    if runs[0].identical is not None:
        table.add_column("identical\nto generate")
    for run in runs:
        shape = "" if run.block_lengths is None else f" ({' '.join(map(str, run.block_lengths))})"
        if run.tree is not None:
            shape = f" (tree of {run.tree.num_nodes})"
        row, drafted, outside = run.row, run.mode != "plain", run.measured.outside_repetition
        low, high = run.measured.interval
        table.add_row(
            run.adapter,
            run.mode,
            f"{run.num_speculative_tokens}{shape}" if drafted else "-",
            f"{row['mean_acceptance_length']:.2f}",
            f"{low:.2f} to {high:.2f}" if drafted else "-",
            f"{outside:.2f}" if outside else "-",
            f"{row['tokens_per_step']:.2f}",
            f"{row['tokens_per_forward']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['ratio_to_plain']:.2f} x",
            *([] if run.identical is None else ["yes" if run.identical else "NO"]),
            style="bold" if run is fastest else "",
        )
    console.print(table)


def show_sample(console: Console, model: SelfSpeculativeModel, prompt: list[int], K: int) -> None:
    """One sampled continuation, accepted drafts in colour."""
    assert model.tokenizer is not None
    console.print("a sampled continuation; accepted drafted tokens are green:", style="bold")
    console.print(model.tokenizer.decode(prompt[-48:]), style="dim", end="", markup=False, highlight=False)
    chunks = model.stream(
        prompt, max_new_tokens=96, temperature=TEMPERATURE, top_k=TOP_K, seed=0, num_speculative_tokens=K
    )
    for chunk in chunks:
        for index, token in enumerate(chunk.token_ids):
            style = "bold green" if index < chunk.num_accepted_tokens else None
            text = model.tokenizer.decode([token])
            console.print(text, style=style, end="", markup=False, highlight=False)
    console.print("\n")


if __name__ == "__main__":
    main()
