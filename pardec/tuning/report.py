"""What tuning found, for people and machines: a table, JSON and a picture.

Knows findings and choices; measures nothing.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from pardec.adapters.tuned import TunedChoice
from pardec.layout import full_blocks
from pardec.output_console import OutputConsole
from pardec.tuning.choice import TREES, Way
from pardec.tuning.measuring import Findings
from pardec.tuning.timing import Measured


@dataclass(frozen=True)
class TuneReport:
    """What `tune` did.

    Attributes:
        choice: as it was written.
        findings: what it rests on.
        path: of the file.
        num_prompts: prompts decoded.
        max_new_tokens: for each.
        untried_dtype: in which the device may be faster; None for none.
    """

    choice: TunedChoice
    findings: Findings
    path: str
    num_prompts: int
    max_new_tokens: int
    untried_dtype: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts."""
        costs = self.findings.costs
        return {
            "choice": asdict(self.choice),
            "measured": [_figures(one, self.findings.plain) for one in self.findings.measured],
            "ms_per_step_by_rows": costs.by_rows,
            "ms_per_step_by_rows_without_head": costs.by_rows_without_head,
            "ms_per_step_by_rows_of_trees": costs.fused(True, "tree"),
            "ms_per_step_by_rows_of_trees_without_head": costs.fused(False, "tree"),
            "ms_per_step_by_rows_of_dynamic_trees": costs.fused(True, "dynamic tree"),
            "ms_per_step_by_rows_of_dynamic_trees_without_head": costs.fused(False, "dynamic tree"),
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
        "mode": predicted.way.mode,
        "block_lengths": list(predicted.way.block_lengths),
        "tree": None if predicted.way.tree is None else asdict(predicted.way.tree),
        "use_head": predicted.way.use_head,
        "copy_tokens": predicted.way.copy_tokens,
        "rows": predicted.way.num_rows,
        "predicted_tokens_per_step": predicted.tokens_per_step,
        "measured_tokens_per_step": one.tokens_per_step,
        "predicted_ms_per_step": predicted.ms_per_step,
        "measured_ms_per_step": one.ms_per_step,
        "predicted_tokens_per_second": predicted.tokens_per_second,
        "measured_tokens_per_second": one.tokens_per_second,
        "measured_to_predicted": one.tokens_per_second / predicted.tokens_per_second,
        "ratio_to_plain": one.tokens_per_second / plain.tokens_per_second,
    }


def show_reports(
    reports: Sequence[TuneReport], by_dtype: Mapping[str, float], *, as_json: bool = False, picture: Path | None = None
) -> None:
    """Prints the reports as tables or as one JSON object, and draws the picture of the last where one is asked for.

    Args:
        reports: one for each dtype.
        by_dtype: tokens/s of what was chosen in each, measured in turn; empty for a single one.
        as_json: one object: the report of a single dtype, else `reports` and `by_dtype`.
        picture: PNG to be written.
    """
    console = OutputConsole(stderr=as_json, markup=False, highlight=False)  # paths may hold brackets
    if as_json:
        objects = [report.to_dict() for report in reports]
        print(json.dumps({"reports": objects, "by_dtype": by_dtype} if by_dtype else objects[0]))
    else:
        for report in reports:
            print_report(report, console)
        if len(reports) == 1 and reports[0].untried_dtype is not None:
            untried = f"not tuned: {reports[0].untried_dtype}, which this device has instructions for; "
            both = f"--dtype {reports[0].choice.dtype},{reports[0].untried_dtype}"
            console.print(f"{untried}{both} finds the fastest, and --dtype tuned uses it then", soft_wrap=True)
        if by_dtype:
            fastest, *slower = sorted(by_dtype, key=lambda dtype: -by_dtype[dtype])
            others = ", ".join(f"{by_dtype[dtype]:.1f} in {dtype}" for dtype in slower)
            said = f"fastest dtype: {fastest}, {by_dtype[fastest]:.1f} tokens/s against {others}, measured in turn"
            console.print(f"{said}; --dtype tuned uses it", soft_wrap=True)
    if picture is None:
        return
    try:
        plot_costs(reports[-1], picture)
        said = f"picture: {picture}"
    except ImportError as error:
        said = f"no picture: {error}; pip install 'pardec[plots]' brings it"
    console.print(said, soft_wrap=True)


def print_report(report: TuneReport, console: Console) -> None:
    """The table of what was measured, and the choice in a sentence."""
    choice, findings = report.choice, report.findings
    has_head = bool(findings.costs.by_rows_without_head)
    law = "greedy" if choice.temperature == 0 else f"temperature {choice.temperature}, top-k {choice.top_k}"
    measured_on = f"{report.num_prompts} prompts, {report.max_new_tokens} new tokens, batch {choice.batch_size}, {law}"
    table = Table(
        Column("drafts behind\n0, 1 .. K", no_wrap=True),
        "rows",
        "tokens\na step",
        "ms\na step",
        "tokens/s\npredicted",
        "tokens/s\nmeasured",
        "x\nplain",
        title=f"{measured_on}\n{choice.device}, {choice.dtype}",
        caption="tokens and ms a step: as predicted; tokens/s: whole calls, prefill included",
        box=SIMPLE_HEAD,
        padding=0,  # fits 80 columns
    )
    for one in findings.measured:
        row, way = _figures(one, findings.plain), one.candidate.way
        table.add_row(
            _name(way, has_head),
            str(row["rows"]),
            f"{row['predicted_tokens_per_step']:.2f}",
            f"{row['predicted_ms_per_step']:.2f}",
            f"{row['predicted_tokens_per_second']:.1f}",
            f"{row['measured_tokens_per_second']:.1f}",
            f"{row['ratio_to_plain']:.2f}",
            style="bold" if one is findings.chosen else "",
        )
    console.print(table)
    rates = ", ".join(f"{rate:.2f}" for rate in choice.conditional_acceptance)
    K = len(choice.conditional_acceptance)
    lines = (
        f"acceptance by position, given those before: {rates}",
        f"plain decoding ran at {findings.drift:.2f} times its speed of when steps were timed; predictions follow it",
        f"without tuning: {' '.join(map(str, full_blocks(K)))}",
        f"chosen: {describe(choice, has_head)}; written to {report.path}",
    )
    console.print("\n".join(lines), soft_wrap=True)


def _name(way: Way, has_head: bool) -> str:
    """In a cell: the shape, or the mode and K; and that the head is left out where there is one."""
    blocks, L, K = way.block_lengths, way.copy_tokens, way.num_speculative_tokens
    if way.mode == "fused" and not K:
        return f"{L} copies"
    names = {"plain": "plain", "two_pass": f"two_pass, K {K}", "fused": " ".join(map(str, blocks[: K + 1]))}
    if way.tree is not None:
        tree = f"{way.kind} of {way.tree.num_nodes}, K {K}"
        names = {"two_pass": f"two_pass, {tree}", "fused": tree}
    copies = f" + {L} copies" if L else ""
    copies += f" of {blocks[-1]}" if len(blocks) > K + 1 and blocks[-1] else ""
    return names[way.mode] + copies + (", no head" if has_head and not way.use_head else "")


def describe(choice: TunedChoice, has_head: bool = False) -> str:
    """The choice in a few words; with `has_head` also whether the head drafts."""
    if choice.mode == "plain":
        return "plain decoding, as nothing measured was faster"
    way = Way(choice.mode, choice.block_lengths, choice.use_head, choice.copy_tokens, choice.tree)
    ratio = choice.measured_tokens_per_second / choice.plain_tokens_per_second
    words, shape = [f"K = {choice.num_speculative_tokens}"], " ".join(map(str, choice.block_lengths))
    if not choice.num_speculative_tokens:
        words = ["no drafts, as the adapter's do not pay here"]
    if choice.mode == "two_pass":
        words.append("two_pass")
    elif choice.tree is None and choice.num_speculative_tokens:
        words.append(f"blocks {shape}")
    if choice.tree is not None:
        words.append(f"a {way.kind} of {choice.tree.num_nodes} nodes")
    if choice.copy_tokens:
        behind = choice.block_lengths[choice.num_speculative_tokens + 1 :]
        drafted = f", {max(behind)} drafts behind each" if choice.tree is not None and any(behind) else ""
        words.append(f"{choice.copy_tokens} copied tokens{drafted}")
    if has_head and choice.num_speculative_tokens:
        words.append("with the head" if choice.use_head else "without the head")
    return ", ".join([*words, f"{way.num_rows} rows", f"{ratio:.2f} x plain"])


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
    for kind, color in zip(TREES, ("#3f8f5f", "#8f6f3f"), strict=True):
        trees = costs.fused(choice.use_head, kind)
        if trees:
            axes.plot(sorted(trees), [trees[r] for r in sorted(trees)], "o--", color=color, label=f"fused, {kind}s")
    place = Way(choice.mode, choice.block_lengths, choice.use_head, choice.copy_tokens, choice.tree).num_rows
    axes.plot(place, chosen_ms, "*", color="#d9742b", markersize=14, label=describe(choice))
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
