"""The JSONL file of a model's responses: planned in batches, appended to, continued.

Knows neither models nor tokenizers. A file grows batch by batch; a run that was killed goes on behind the last
whole batch. Beside it stands `<file>.json`, which tells what the rows were made by.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pardec.run import held_alone, written_aside

# responses with fewer tokens of the model's own give training next to nothing
SHORT_TOKENS = 3
# what is told beside the rows of the order of prompts; files from before there was one are in the order of drawing
BY_LENGTH = "by length"
_BATCHES_OF_A_STRETCH = 8


@dataclass(frozen=True)
class Prompt:
    """What a response is written behind.

    Attributes:
        input_ids: its tokens.
        kind: of the source that it was drawn from, as the row names it; None in rows of a single source.
        turns: of the chat that the tokens render; empty for a piece of text.
        follow_up: what the user says behind the first answer; None ends the chat with it.
    """

    input_ids: list[int]
    kind: str | None = None
    turns: Sequence[dict[str, Any]] = ()
    follow_up: str | None = None


@dataclass(frozen=True)
class Answer:
    """A model's own tokens behind a prompt, and what stands between them where there are two turns of them.

    Attributes:
        ids: everything behind the prompt.
        mask: 1 for the model's own tokens, 0 for those between its turns.
    """

    ids: list[int]
    mask: list[int]


@dataclass(frozen=True)
class Batch:
    """Responses that are generated together.

    Attributes:
        first: index of the first one.
        size: how many.
        greedy: or sampled.
    """

    first: int
    size: int
    greedy: bool


def by_length(prompts: Sequence[Prompt], batch_size: int) -> list[Prompt]:
    """The prompts in an order in which those of a batch are of similar length, as each pays for the longest of them.

    Only inside of stretches of several batches, so that a file which was cut off has short and long ones.
    """
    size, ordered = batch_size * _BATCHES_OF_A_STRETCH, []
    for start in range(0, len(prompts), size):
        ordered += sorted(prompts[start : start + size], key=lambda prompt: len(prompt.input_ids))
    return ordered


def plan_batches(num_responses: int, batch_size: int, greedy_fraction: float) -> list[Batch]:
    """Batches in the order of the file; greedy ones stand evenly between sampled ones, at most one of each is short."""
    num_greedy = round(num_responses * greedy_fraction)
    placed = []
    for greedy, count in ((True, num_greedy), (False, num_responses - num_greedy)):
        sizes = [min(batch_size, count - done) for done in range(0, count, batch_size)]
        placed += [((n + 0.5) / len(sizes), greedy, n, size) for n, size in enumerate(sizes)]
    batches, first = [], 0
    for _, greedy, _, size in sorted(placed):
        batches.append(Batch(first, size, greedy))
        first += size
    return batches


def one_turn(response: list[int]) -> Answer:
    """The answer that is a response alone."""
    return Answer(response, [1] * len(response))


def two_turns(response: list[int], between: list[int], second: list[int]) -> Answer:
    """The answer of a response, what the user says then, and the response to it."""
    mask = [1] * len(response) + [0] * len(between) + [1] * len(second)
    return Answer([*response, *between, *second], mask)


def response_row(index: int, greedy: bool, prompt: Prompt, answer: Answer) -> dict[str, Any]:
    """A row as training reads it: only the model's own tokens are to be learned."""
    return {
        "index": index,
        "greedy": greedy,
        **({} if prompt.kind is None else {"kind": prompt.kind}),
        "input_ids": [*prompt.input_ids, *answer.ids],
        "loss_mask": [0] * len(prompt.input_ids) + answer.mask,
    }


def count_rows(rows: Iterable[dict[str, Any]]) -> Counter[str]:
    """Sums over rows: `responses`, those of them `greedy`, those `short`, `prompt_tokens` and `response_tokens`.

    Where rows name their kinds also how many there are of each, and where some have a second answer, `follow_ups`.
    """
    counts: Counter[str] = Counter()
    for row in rows:
        own = sum(row["loss_mask"])
        counts["responses"] += 1
        counts["greedy"] += row["greedy"]
        counts["short"] += own < SHORT_TOKENS
        counts["prompt_tokens"] += len(row["input_ids"]) - own
        counts["response_tokens"] += own
        if "kind" in row:
            counts[row["kind"]] += 1
        if _has_follow_up(row["loss_mask"]):
            counts["follow_ups"] += 1
    return counts


def _has_follow_up(mask: list[int]) -> bool:
    return 0 in mask[mask.index(1) :]


def longest_row(file: Path) -> int:
    """Tokens of the longest row of a file of responses."""
    with file.open() as lines:
        return max(len(json.loads(line)["input_ids"]) for line in lines)


def append_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Appends whole rows, down to the disk, or none.

    Raises:
        OSError: naming the file, if there is no room or no permission; it is then as it was before.
    """
    data = memoryview("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows).encode())
    with file.open("ab", buffering=0) as out:
        before = out.tell()
        try:
            while data:
                data = data[out.write(data) :]
            os.fsync(out.fileno())
        except OSError as error:
            out.truncate(before)
            raise OSError(
                f"{file}: expected room for {len(rows)} more responses, found: {error.strerror}; what was written "
                "before is whole, and the same command continues it"
            ) from None


def keep_whole_batches(file: Path, batches: Sequence[Batch], prompts: Sequence[Prompt]) -> tuple[int, Counter[str]]:
    """Cuts off what stands behind the last whole batch, if anything does, and tells how many there are.

    Args:
        file: of an earlier run; need not exist.
        batches: all of the plan.
        prompts: all of them.

    Returns:
        whole batches in the file, and their counts.

    Raises:
        ValueError: if a row in one of them is not the response to its prompt, naming file and line.
    """
    kept, counts, num_bytes = 0, Counter[str](), 0
    if not file.exists():
        return kept, counts
    with file.open("rb") as lines:
        for batch in batches:
            found = list(islice(lines, batch.size))
            if len(found) < batch.size or not found[-1].endswith(b"\n"):
                break
            rows = [_own_row(line, batch.first + n, batch.greedy, prompts, file) for n, line in enumerate(found)]
            counts.update(count_rows(rows))
            kept, num_bytes = kept + 1, num_bytes + sum(map(len, found))
        if kept == len(batches) and lines.readline():
            raise ValueError(f"{file}: expected the {len(prompts)} responses of this recipe, found more lines")
    if file.stat().st_size > num_bytes:
        os.truncate(file, num_bytes)
    return kept, counts


def _own_row(line: bytes, index: int, greedy: bool, prompts: Sequence[Prompt], file: Path) -> dict[str, Any]:
    prompt = prompts[index]
    length = len(prompt.input_ids)
    try:
        row = json.loads(line)
        answer = Answer(row["input_ids"][length:], row["loss_mask"][length:])
        is_own = row == response_row(index, greedy, prompt, answer) and _is_answer(answer, prompt)
    except (ValueError, KeyError, TypeError):
        row, is_own = {}, False
    if not is_own:
        kind = "greedy" if greedy else "sampled"
        raise ValueError(
            f"{file}:{index + 1}: expected the {kind} response {index} to its prompt, found {line[:60]!r}; "
            "choose another output or remove it"
        )
    return row


def _is_answer(answer: Answer, prompt: Prompt) -> bool:
    """Whether it begins and ends with the model's own tokens, and has others only where a follow-up was asked."""
    if not answer.ids or len(answer.ids) != len(answer.mask) or not answer.mask[0] == answer.mask[-1] == 1:
        return False
    return all(one == 1 or (one == 0 and prompt.follow_up is not None) for one in answer.mask)


@contextmanager
def only_writer(file: Path) -> Iterator[None]:
    """Makes the file and keeps other runs from it: two that append to it would leave rows twice.

    Raises:
        ValueError: if another run is there.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as held:
        if not held_alone(held.fileno()):
            raise ValueError(
                f"output {file}: expected no other run that writes there, found one; choose another output or wait for "
                "its end"
            )
        yield


# ---------------------------------------------------------------------- what is known of it


def about_file(file: Path) -> Path:
    """Where it is told what the rows of `file` were made by."""
    return file.with_name(file.name + ".json")


def write_about(file: Path, about: dict[str, Any]) -> None:
    """Written aside and renamed, so that it is whole at any moment."""
    with written_aside(about_file(file)) as aside:
        aside.write_text(json.dumps(about, indent=1) + "\n")


def read_about(file: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """What was written by the run that began `file`; None if there is nothing in it to continue.

    Args:
        file: of responses.
        recipe: of this run.

    Raises:
        ValueError: if the file is no file of responses, or one of another recipe, naming the key.
    """
    if not file.exists() or (file.is_file() and not file.stat().st_size):
        return None
    beside = about_file(file)
    if not file.is_file() or not beside.is_file():
        found = "a folder" if file.is_dir() else f"one without {beside.name}"
        raise ValueError(f"output {file}: expected no file or responses to continue, found {found}")
    try:
        about = json.loads(beside.read_text())
        then = about["recipe"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{beside}: expected JSON with the recipe, found {error}; remove {file}") from None
    for key in recipe:
        if key != "output" and then.get(key) != recipe[key]:
            raise ValueError(
                f"output {file}: expected {key} = {recipe[key]} as in this recipe, found responses with {key} = "
                f"{then.get(key)}; choose another output or remove it"
            )
    return about
