"""Texts decoded again on paper: by one shape throughout, or by shapes that follow what steps have brought of late.

Knows numbers only: no model, no clock. A shape is (K drafted tokens, L copied tokens), (0, 0) plain decoding.
Legend: n tokens of a text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Shape = tuple[int, int]
# milliseconds of a step of a shape; False where no copy was found, whose rows are then left out
Cost = Callable[[Shape, bool], float]


@dataclass(frozen=True)
class PlayedText:
    """What drafts and copies would bring at every place of a text.

    Attributes:
        category: of the prompt.
        drafts: behind s + 1 emitted tokens, how many of K drafts in a row are the text's own, n numbers.
        copies: likewise of copied tokens, -1 where none are found, n numbers.
    """

    category: str
    drafts: Sequence[int]
    copies: Sequence[int]

    @property
    def num_tokens(self) -> int:
        """n."""
        return len(self.drafts)


def emitted(text: PlayedText, done: int, shape: Shape, draft_length: int) -> tuple[int, bool, int]:
    """Tokens of a step behind `done` emitted ones, whether copies were found, and drafts of the next step.

    Behind drafts that are wrong copies are taken to be found where they are found behind none.
    """
    K, L = shape
    drafted = min(K, draft_length)
    accepted = min(text.drafts[done - 1], drafted)
    place = done + accepted - 1
    found = text.copies[min(place, text.num_tokens - 1)] if L else -1
    if accepted == drafted:
        accepted += min(max(found, 0), K + L - drafted)
    return min(accepted + 1, text.num_tokens - done), found >= 0, K if accepted <= K else 0


def fixed(text: PlayedText, shape: Shape, cost: Cost) -> float:
    """Milliseconds of a text behind prefill."""
    done, draft_length, ms = 1, shape[0], 0.0
    while done < text.num_tokens:
        count, found, draft_length = emitted(text, done, shape, draft_length)
        ms, done = ms + cost(shape, found), done + count
    return ms


def following(text: PlayedText, shapes: Sequence[Shape], cost: Cost, decay: float) -> float:
    """The same with the shape that would have been fastest of late, as the host knows it: one step behind.

    Every shape is judged by what it would have brought wherever a step began, also those that were not used, which is
    more than a decoder can know.

    Args:
        text: that is decoded.
        shapes: to be chosen from; the first begins.
        cost: of their steps.
        decay: share that one step's figures have in the running ones.
    """
    done, ms, shape = 1, 0.0, shapes[0]
    running: dict[Shape, tuple[float, float]] = {}
    while done < text.num_tokens:
        best = max(running, key=lambda one: running[one][0] / running[one][1]) if running else shape
        count, found, _ = emitted(text, done, shape, shape[0])
        for one in shapes:
            tokens, seen, _ = emitted(text, done, one, one[0])
            new = (tokens, cost(one, seen))
            old = running.get(one, new)
            running[one] = ((1 - decay) * old[0] + decay * new[0], (1 - decay) * old[1] + decay * new[1])
        ms, done, shape = ms + cost(shape, found), done + count, best
    return ms


def cost_of_rows(plain: float, drafting: Mapping[int, float], real: Mapping[int, float]) -> Cost:
    """The cost of shapes by measured milliseconds of steps by their rows, linear between them.

    Args:
        plain: of a plain step.
        drafting: of fused steps with mask rows.
        real: of steps without.
    """

    def cost(shape: Shape, copies_found: bool) -> float:
        K, L = shape
        rows = (K + 1) ** 2 + (L if copies_found else 0)
        return _between({1: plain, **(drafting if K else real)}, rows)

    return cost


def _between(measured: Mapping[int, float], rows: int) -> float:
    """Linear between measured numbers of rows, and on beyond the last two."""
    places = sorted(measured)
    if rows in measured:
        return measured[rows]
    after = next((index for index, place in enumerate(places) if place > rows), len(places) - 1)
    low, high = places[after - 1], places[after]
    return measured[low] + (measured[high] - measured[low]) * (rows - low) / (high - low)
