"""What `pardec generate --compare` shows: plain decoding and another mode side by side, and how much faster it was.

Knows panels, colours and tables; who makes the next step, and the clocks, are `pardec.race`.
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pardec.cli.console import STYLES, as_object, options_of, tie_of
from pardec.decoding.output import GenerationOutput, StreamChunk, TextStream, pieces_of
from pardec.decoding.stats import pool
from pardec.errors import short
from pardec.model import SelfSpeculativeModel
from pardec.race import Lane, race

_SECONDS_PER_FRAME = 0.1  # drawn between steps, when no clock runs; more often would only delay both
_FEWEST_COLUMNS = 80  # of two panels next to each other
_WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Pair:
    """What plain decoding and the other mode gave for one prompt.

    Attributes:
        plain: of plain decoding.
        drafted: of the other.
        tie: the first difference of greedy tokens in words, if it is one that the dtype's rounding decides.
    """

    plain: GenerationOutput
    drafted: GenerationOutput
    tie: str | None

    @property
    def identical(self) -> bool:
        """Whether the tokens are the same."""
        return self.plain.token_ids == self.drafted.token_ids

    @property
    def ratio(self) -> float:
        """How many times as fast as plain decoding the other was."""
        return self.drafted.stats.tokens_per_second / self.plain.stats.tokens_per_second


def run_races(
    model: SelfSpeculativeModel,
    texts: Sequence[str],
    prompts: Sequence[str | list[int]],
    mode: str,
    options: dict[str, Any],
    *,
    as_json: bool,
) -> bool:
    """Decodes every prompt plain and in `mode`, and says how fast both were and whether the tokens were the same.

    Args:
        model: to run.
        texts: that were asked, to be shown.
        prompts: the same, or their ids in a chat template.
        mode: beside plain.
        options: of `generate`.
        as_json: one object a prompt instead of text and a table.

    Returns:
        Whether all tokens were the same, ties aside.
    """
    console, pairs = Console(highlight=False), []
    # weights are packed, steps captured, once; code is compiled for lengths and for steps with copies and without
    first, most = (prompts, options["max_new_tokens"]) if model.compile else (prompts[:1], _WARM_UP_TOKENS)
    for prompt in first:
        for way in ("plain", mode):
            model.generate(prompt, mode=way, **{**options, "max_new_tokens": min(most, options["max_new_tokens"])})
    for number, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        lanes = [Lane(model, prompt, way, options_of(number, options)) for way in ("plain", mode)]
        if console.is_terminal and not as_json:
            console.print(Text(f"> {short(text, 2 * console.width)}", style="bold"))
            _watch(console, model, lanes)
        else:
            for _ in race(lanes):
                pass
        pair = _paired(model, prompt, lanes, is_sampled=bool(options["temperature"]))
        pairs.append(pair)
        if as_json:
            both = {"plain": as_object(text, pair.plain, "plain"), mode: as_object(text, pair.drafted, mode)}
            said = {"identical": pair.identical, "is_tie": pair.tie is not None, "ratio_to_plain": pair.ratio}
            print(json.dumps(both | said), flush=True)
        elif not console.is_terminal:
            print(pair.drafted.text[0], flush=True)  # as it is: rich would break lines and draw :names: of emoji
    if not as_json:
        is_sampled, is_tuned = bool(options["temperature"]), model.tuned is not None
        _print_summary(console, pairs, mode, is_sampled=is_sampled, is_tuned=is_tuned)
    return all(pair.identical or pair.tie for pair in pairs)


def _paired(model: SelfSpeculativeModel, prompt: str | list[int], lanes: Sequence[Lane], *, is_sampled: bool) -> Pair:
    plain, drafted = (_ended(lane) for lane in lanes)
    pair = Pair(plain, drafted, None)
    if pair.identical or is_sampled:
        return pair
    return replace(pair, tie=tie_of(model, prompt, drafted.token_ids[0], plain.token_ids[0]))


class _Track:
    """What is shown of one lane: its text so far, accepted drafts in green and copies in cyan, and its speed."""

    def __init__(self, lane: Lane, model: SelfSpeculativeModel):
        self.lane = lane
        self._final = TextStream(model.tokenizer)
        self._text = Text()

    def take(self, chunk: StreamChunk) -> None:
        is_first = self.lane.num_tokens == len(chunk.token_ids)
        for piece, origin in pieces_of(self._final, chunk, self.lane.mode, is_first):
            self._text.append(piece, style=STYLES[origin])

    def end(self) -> None:
        self._text.append(self._final.put([], last=True))

    def lines(self, console: Console, width: int) -> list[Text]:
        return list(self._text.wrap(console, width))

    def speed(self) -> str:
        lane = self.lane
        rate = f", {lane.num_tokens / lane.seconds:.1f} tokens/s" if lane.seconds else ""
        return f"{lane.num_tokens} tokens{rate}" + (f", done in {lane.seconds:.2f} s" if lane.out else "")


def _watch(console: Console, model: SelfSpeculativeModel, lanes: Sequence[Lane]) -> None:
    """Runs the race with both texts growing in panels."""
    tracks = {id(lane): _Track(lane, model) for lane in lanes}
    shown = list(tracks.values())
    with Live(console=console, auto_refresh=False) as live:  # a thread that draws would take time from the steps
        last = 0.0
        for lane, chunk in race(lanes):
            tracks[id(lane)].take(chunk)
            if time.monotonic() - last > _SECONDS_PER_FRAME:
                live.update(_panels(console, shown, is_whole=False), refresh=True)
                last = time.monotonic()
        for track in shown:
            track.end()
        live.update(_panels(console, shown, is_whole=True), refresh=True)


def _panels(console: Console, tracks: Sequence[_Track], *, is_whole: bool) -> RenderableType:
    """The panels next to each other, or one above the other where the terminal is narrow.

    Args:
        console: to fit.
        tracks: two.
        is_whole: all lines, not only the last ones that fit the terminal.
    """
    beside = console.width >= _FEWEST_COLUMNS
    width = console.width // 2 if beside else console.width
    texts = [track.lines(console, width - 4) for track in tracks]
    fitting = console.height - 3 if beside else (console.height - 1) // 2 - 2
    height = max(map(len, texts)) if is_whole else min(max(map(len, texts)), max(fitting, 1))
    panels = [
        Panel(
            Text("\n").join(lines[-height:]),
            title=track.lane.mode,
            subtitle=track.speed(),
            width=width,
            height=height + 2,
        )
        for track, lines in zip(tracks, texts, strict=True)
    ]
    if not beside:
        return Group(*panels)
    row = Table.grid()
    row.add_row(*panels)
    return row


def _print_summary(console: Console, pairs: Sequence[Pair], mode: str, *, is_sampled: bool, is_tuned: bool) -> None:
    """The table over all prompts, the ratio, and whether the tokens were the same."""
    lengths = ("mean acceptance\nlength", "tokens\nper step")
    table = Table("mode", "new\ntokens", "forwards", *lengths, "tokens/s", "ratio to\nplain")
    ratios = [pair.ratio for pair in pairs]
    rows = (
        ("plain", [pair.plain for pair in pairs], 1.0),
        (mode, [pair.drafted for pair in pairs], statistics.median(ratios)),
    )
    for name, outs, factor in rows:
        stats = pool([one for out in outs for one in out.counts], sum(out.stats.seconds for out in outs))
        table.add_row(
            name,
            str(stats.num_new_tokens),
            str(stats.num_forwards),
            f"{stats.mean_acceptance_length:.2f}",
            f"{stats.tokens_per_step:.2f}",
            f"{stats.tokens_per_second:.1f}",
            f"{factor:.2f} x",
        )
    console.print(table)
    if len(pairs) > 1:
        console.print(f"ratio: the median of {len(pairs)} prompts, from {min(ratios):.2f} to {max(ratios):.2f}")
    if not is_tuned and statistics.median(ratios) < 1:
        console.print("slower than plain, and not tuned for this device: see `pardec tune`")
    different = [(number, pair.tie) for number, pair in enumerate(pairs, start=1) if not pair.identical]
    said = []
    for number, tie in different:
        where = f"prompt {number}: " if len(pairs) > 1 else ""
        said.append(where + ("no" if tie is None else f"up to {tie}"))
    same = ", ".join(said) if said else "yes"
    if said and is_sampled:
        same = "no (sampled: the law is the same, not the draw)"
    console.print(f"same tokens as plain: {same}")
    if console.is_terminal:
        copied = any(pair.drafted.stats.num_accepted_copies for pair in pairs)
        also = "; cyan: copied ones" if copied else ""
        console.print(f"green: drafted tokens that were accepted{also}", style="dim")


def _ended(lane: Lane) -> GenerationOutput:
    assert lane.out is not None
    return lane.out
