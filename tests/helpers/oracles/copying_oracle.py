"""Which tokens are copied, in plain Python."""

from collections.abc import Sequence

from pardec.decoding.copying import LONGEST, SHORTEST


def copied(text: list[int], count: int, others: Sequence[list[int]] = ()) -> list[int]:
    """What followed the longest match of the end of `text`, in itself or in others.

    Of matches of one length the one in the text named first counts, and of these the last.
    """
    best: tuple[int, int, int] = (0, 0, 0)
    texts = [text, *others]
    for number, one in enumerate(texts):
        for end in range(1, len(one)):  # of a match, exclusive
            length = next((n for n in range(LONGEST) if _before(one, end, n) != _before(text, len(text), n)), LONGEST)
            best = max(best, (length, -number, end))
    length, number, end = best
    if length < SHORTEST:
        return []
    behind = texts[-number][end:]
    return [behind[i % len(behind)] for i in range(count)]


def _before(text: list[int], end: int, count: int) -> int | None:
    """The token that stands so many before the last one; where a text has none, its beginning counts as one."""
    return text[end - 1 - count] if count < end else None
