"""Chooses the shape of the fused step for one model, adapter and device, and shows what the choice rests on.

The work of `pardec tune`: `measuring` times, `choice` predicts, chooses and keeps the choice.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from tqdm.auto import tqdm

from pardec.adapters.tuned import TunedChoice, check_writable, weights_of, write_tuned
from pardec.data.corpus import held_out_prompts
from pardec.data.python_sources import VALIDATION
from pardec.decoding.prompts import text_ids
from pardec.layout import PLAIN, BlockLengths, full_blocks
from pardec.model import SelfSpeculativeModel
from pardec.run import device_name, library_versions
from pardec.tuning.chain import num_rows
from pardec.tuning.measuring import Call, Effort, Findings, Measured, max_calls, measure

MAX_SPECULATIVE_TOKENS = 16  # the full chain of more has over 300 rows, which no device runs in the time of a few


@dataclass(frozen=True)
class TuneReport:
    """What `tune` did.

    Attributes:
        choice: as it was written.
        findings: what it rests on.
        path: of the file.
        num_prompts: prompts decoded.
        max_new_tokens: for each.
    """

    choice: TunedChoice
    findings: Findings
    path: str
    num_prompts: int
    max_new_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts."""
        costs = self.findings.costs
        return {
            "choice": asdict(self.choice),
            "measured": [_figures(one, self.findings.plain) for one in self.findings.measured],
            "ms_per_step_by_rows": costs.by_rows,
            "plain_ms_per_step": costs.plain,
            "prefill_ms": costs.prefill,
            "drift": self.findings.drift,
            "num_prompts": self.num_prompts,
            "max_new_tokens": self.max_new_tokens,
            "file": self.path,
        }


def _figures(one: Measured, plain: Measured) -> dict[str, Any]:
    predicted = one.candidate
    return {
        "block_lengths": list(predicted.block_lengths),
        "rows": num_rows(predicted.block_lengths),
        "predicted_tokens_per_step": predicted.tokens_per_step,
        "measured_tokens_per_step": one.tokens_per_step,
        "predicted_ms_per_step": predicted.ms_per_step,
        "measured_ms_per_step": one.ms_per_step,
        "predicted_tokens_per_second": predicted.tokens_per_second,
        "measured_tokens_per_second": one.tokens_per_second,
        "measured_to_predicted": one.tokens_per_second / predicted.tokens_per_second,
        "ratio_to_plain": one.tokens_per_second / plain.tokens_per_second,
    }


def tune(
    model: SelfSpeculativeModel,
    directory: str | Path,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 1,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    effort: Effort | None = None,
) -> TuneReport:
    """Measures, chooses, and writes the choice beside the adapter; `pardec.load` then uses it.

    Args:
        model: loaded from `directory`, on the device and in the dtype to tune for.
        directory: of the adapter.
        prompts: token ids, such as the standard prompts of the validation split; what does not fill a batch is left.
        max_new_tokens: for each prompt, at least 2.
        batch_size: prompts decoded together.
        temperature: see `generate`.
        top_k: see `generate`.
        seed: of sampling; the same for every measurement.
        effort: how much is measured.

    Raises:
        ValueError: for input that cannot be tuned with.
        OSError: if the folder cannot be written to; known before anything is measured.
    """
    effort = effort or Effort()
    if model.adapter is None:
        raise ValueError("model: expected one with an adapter, found none")
    if max_new_tokens < 2:
        raise ValueError(f"max_new_tokens: expected at least 2, to time a step, found {max_new_tokens}")
    batches = _full_batches(prompts, batch_size)
    check_writable(directory)
    K = min(model.adapter.metadata.num_speculative_tokens, MAX_SPECULATIVE_TOKENS)
    # steps are captured or compiled for every length that they meet
    warm_up = len(batches) if model.capture or model.compile else 1
    with tqdm(total=max_calls(effort, len(batches), warm_up), unit="call", desc="tuning") as bar:

        def decode(block_lengths: BlockLengths, batch: int, max_new_tokens: int) -> Call:
            out = model.generate(
                batches[batch],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                seed=seed,
                block_lengths=block_lengths,
            )
            bar.update()
            return Call(out.stats.seconds, [len(ids) for ids in out.token_ids], [one.accepted for one in out.counts])

        found = measure(decode, len(batches), K, max_new_tokens, effort, warm_up)
        bar.total = bar.n  # fewer shapes than allowed for may have been worth measuring
    choice = _choice(model, directory, found, batch_size, temperature, top_k)
    path = write_tuned(directory, choice)
    return TuneReport(choice, found, str(path), len(batches) * batch_size, max_new_tokens)


def _choice(
    model: SelfSpeculativeModel,
    directory: str | Path,
    found: Findings,
    batch_size: int,
    temperature: float,
    top_k: int | None,
) -> TunedChoice:
    best = found.chosen
    return TunedChoice(
        device=device_name(model.target.device),
        dtype=str(model.target.dtype).removeprefix("torch."),
        compile=model.compile,
        block_lengths=best.candidate.block_lengths,
        weights=weights_of(directory),
        ms_per_step=best.ms_per_step,
        predicted_tokens_per_second=best.candidate.tokens_per_second,
        measured_tokens_per_second=best.tokens_per_second,
        plain_tokens_per_second=found.plain.tokens_per_second,
        conditional_acceptance=found.conditional_acceptance,
        temperature=temperature,
        top_k=top_k,
        batch_size=batch_size,
        versions=library_versions(),
    )


def _full_batches(prompts: Sequence[list[int]], batch_size: int) -> list[list[list[int]]]:
    if not 1 <= batch_size <= len(prompts):
        raise ValueError(f"batch_size: expected 1 to {len(prompts)}, the number of prompts, found {batch_size}")
    starts = range(0, len(prompts) - batch_size + 1, batch_size)
    return [list(prompts[start : start + batch_size]) for start in starts]


def prompts_to_tune_on(
    model: SelfSpeculativeModel, texts: Sequence[str] | None, num_prompts: int | None
) -> list[list[int]]:
    """Token ids of the first `num_prompts` texts, or else of standard prompts of the validation split.

    Raises:
        ValueError: without a tokenizer, or for no prompts.
    """
    if model.tokenizer is None:
        raise ValueError("base: expected a tokenizer beside the model, found none")
    if num_prompts is not None and num_prompts < 1:
        raise ValueError(f"num_prompts: expected an integer >= 1, found {num_prompts}")
    if texts is None:
        return held_out_prompts(model.tokenizer, VALIDATION, num_prompts=num_prompts)
    return [text_ids(text, model.tokenizer) for text in texts[:num_prompts]]


# ---------------------------------------------------------------------- for people


def show_report(report: TuneReport, *, as_json: bool = False, picture: Path | None = None) -> None:
    """Prints the report as a table or as one JSON object, and draws the picture where one is asked for."""
    console = Console(stderr=as_json, markup=False, highlight=False)  # paths may hold brackets
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        print_report(report, console)
    if picture is None:
        return
    try:
        plot_costs(report, picture)
        said = f"picture: {picture}"
    except ImportError as error:
        said = f"no picture: {error}; pip install 'pardec[plots]' brings it"
    console.print(said, soft_wrap=True)


def print_report(report: TuneReport, console: Console) -> None:
    """The table of what was measured, and the choice in a sentence."""
    choice, findings = report.choice, report.findings
    law = "greedy" if choice.temperature == 0 else f"temperature {choice.temperature}, top-k {choice.top_k}"
    measured_on = f"{report.num_prompts} prompts, {report.max_new_tokens} new tokens, batch {choice.batch_size}, {law}"
    table = Table(
        Column("drafts behind\n0, 1 .. K", no_wrap=True),
        "rows",
        "tokens\na step",
        "ms\na step",
        "tokens/s\npredicted",
        "tokens/s\nmeasured",
        "differ-\nence",
        "ratio to\nplain",
        title=f"{measured_on}\n{choice.device}, {choice.dtype}",
        caption="tokens and ms a step: as predicted; tokens/s: whole calls, prefill included",
        box=SIMPLE_HEAD,
        padding=0,  # fits 80 columns
    )
    for one in findings.measured:
        row, shape = _figures(one, findings.plain), one.candidate.block_lengths
        table.add_row(
            "plain" if shape == PLAIN else " ".join(map(str, shape)),
            str(row["rows"]),
            f"{row['predicted_tokens_per_step']:.2f}",
            f"{row['predicted_ms_per_step']:.2f}",
            f"{row['predicted_tokens_per_second']:.1f}",
            f"{row['measured_tokens_per_second']:.1f}",
            "" if shape == PLAIN else f"{100 * (row['measured_to_predicted'] - 1):+.1f} %",
            f"{row['ratio_to_plain']:.2f} x",
            style="bold" if shape == choice.block_lengths else "",
        )
    console.print(table)
    rates = ", ".join(f"{rate:.2f}" for rate in choice.conditional_acceptance)
    K = len(choice.conditional_acceptance)
    lines = (
        f"acceptance by position, given those before: {rates}",
        f"plain decoding ran at {findings.drift:.2f} times its speed of when steps were timed; predictions follow it",
        f"without tuning: {' '.join(map(str, full_blocks(K)))}",
        f"chosen: {describe(choice)}; written to {report.path}",
    )
    console.print("\n".join(lines), soft_wrap=True)


def describe(choice: TunedChoice) -> str:
    """The choice in a few words."""
    if choice.block_lengths == PLAIN:
        return "plain decoding, as nothing measured was faster"
    ratio = choice.measured_tokens_per_second / choice.plain_tokens_per_second
    return (
        f"K = {choice.num_speculative_tokens}, blocks {' '.join(map(str, choice.block_lengths))}, "
        f"{num_rows(choice.block_lengths)} rows, {ratio:.2f} x plain"
    )


def plot_costs(report: TuneReport, path: Path) -> None:
    """Milliseconds per step against rows, with the chosen shape marked; writes one PNG.

    Raises:
        ImportError: without matplotlib, which comes with `pardec[plots]`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    costs, choice = report.findings.costs, report.choice
    figure, axes = pyplot.subplots(figsize=(6.5, 4), dpi=130)
    rows = sorted(costs.by_rows)
    axes.plot(rows, [costs.by_rows[r] for r in rows], "o-", color="#3b6fb6", label="fused steps")
    axes.plot(1, costs.plain, "s", color="#777777", label="plain decoding")
    chosen_ms = choice.ms_per_step * report.findings.drift  # as if measured together with the others
    axes.plot(num_rows(choice.block_lengths), chosen_ms, "*", color="#d9742b", markersize=14, label=describe(choice))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows of a step")
    axes.set_ylabel("ms per step")
    axes.set_title(f"{choice.device}, {choice.dtype}, batch {choice.batch_size}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
