"""Shows what serving costs to people: a table on the console and as a page. Knows the keys of the rows alone."""

from collections.abc import Mapping
from typing import Any

from reporting.text_tables import TextTable, markdown_page, number, print_tables

HEADER = (
    "batch", "engine", "way", "adapter", "K", "tokens per CPU second", "x vLLM plain", "x pardec plain",
    "accepted drafts a round", "identical",
)  # fmt: skip
TEXT_COLUMNS = ("engine", "way", "adapter", "identical")
NOTES = (
    "tokens per CPU second: new tokens / CPU seconds of the process that decodes, all its threads and prefill "
    "included, sums over all counted calls",
    "x plain: ratio of two calls on the same prompts in the same pass, median (lower-upper quartile) over batches and "
    "passes",
    "K: drafted tokens of the adapter; vLLM is asked for K + 1, the first of which is the model's own next one",
    "accepted drafts a round: without that exact token and without the bonus token, so that both engines count alike; "
    "a round is one forward in fused mode and two in all others",
    "identical: the tokens are those of model.generate for each prompt alone; a tie is a first difference where "
    "rounding decides between the two tokens",
)


def table_of(result: Mapping[str, Any]) -> TextTable:
    """One line for each row, then what was left out."""
    cells = [
        [
            str(row["batch_size"]),
            row["engine"],
            row["way"],
            row["adapter"] or "-",
            str(row["num_speculative_tokens"] or "-"),
            f"{row['tokens_per_cpu_second']:.1f}",
            _ratio(row, "vllm"),
            _ratio(row, "pardec"),
            number(row["accepted_per_round"], 2),
            ("yes" if row["identical"] else "NO") + f", {row['num_ties']} ties" * (row["num_ties"] > 0),
        ]
        for row in result["rows"]
    ]
    return TextTable("Serving on a CPU, greedy", HEADER, cells, has_sections=True)


def _ratio(row: Mapping[str, Any], engine: str) -> str:
    low, high = row[f"ratio_to_{engine}_plain_quartiles"]
    return f"{row[f'ratio_to_{engine}_plain']:.2f} ({low:.2f}-{high:.2f})"


def _notes(result: Mapping[str, Any]) -> list[str]:
    left_out = [f"left out: vLLM {one['way']}, {one['adapter']}: {one['reason']}" for one in result["left_out"]]
    return [*NOTES, *left_out, *result["problems"]]


def page_of(result: Mapping[str, Any]) -> str:
    """The page of a result."""
    shortest, longest = result["prompt_tokens"]
    facts = (
        f"{result['device']}; {result['base']}, {result['dtype']}; {result['num_prompts']} prompts of {shortest} to "
        f"{longest} tokens from {result['prompts']}, {result['max_new_tokens']} new ones each, greedy, EOS ignored; "
        f"vLLM {'not compiled' if result['enforce_eager'] else 'compiled'}, pardec not compiled"
    )
    return markdown_page(result, "Serving on a CPU", facts, [table_of(result).markdown()], _notes(result))


def print_result(result: Mapping[str, Any]) -> None:
    """The table and its notes on the console."""
    print_tables([table_of(result)], _notes(result), TEXT_COLUMNS)
