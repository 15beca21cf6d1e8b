"""Hub datasets that are read as training comes to them, tokenised, and kept from then on.

Knows streams of `datasets` and a tokenizer, no model and no order of examples.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pardec.all_cores import num_cores, on_all_cores
from pardec.data.fitting import RowCounts
from pardec.data.reading import hub_dataset
from pardec.data.row_checks import DataError, check_row
from pardec.data.shards import Shard, ShardFolder, open_shard, write_shard
from pardec.data.tokenised import SHARD_BYTES, Tokenising
from pardec.data.tokenising import Document

_END_BYTES = 1 << 20
_BEGINNING = {"state": None, "rows": 0, "is_end": False}


@dataclass
class TokenisedStream:
    """The training sequences of a stream, as `ExampleOrder` asks for them.

    Shards hold rows as they come, every epoch has them in that order, and each remembers where in the stream it ends:
    a run that goes on, in another process or years later, reads on from the last shard that is there.

    Attributes:
        open: the stream from its beginning, an `IterableDataset` or what iterates and has `state_dict` as one.
        name: of the data, in errors about rows.
        digest: SHA-256 of what the data are called, of the ends of files on this disk and of all else that the
            sequences depend on.
        tokenising: how.
        kept: the shards.
    """

    open: Callable[[], Any]
    name: str
    digest: str
    tokenising: Tokenising
    kept: ShardFolder

    @property
    def counts(self) -> RowCounts:
        """Of the rows of all shards that have been asked for; how many there are at all is not known."""
        return self.kept.counts(self.kept.counts(0).read)

    def shards(self, seed: int, epoch: int) -> Iterator[int]:
        """Shards in the order of the stream, until it ends."""
        shard = 0
        yield shard
        while not self._position(shard)["is_end"]:
            shard += 1
            yield shard

    def lengths(self, shard: int) -> Any:
        """Tokens of each sequence of a shard."""
        return self.opened(shard).lengths

    def sequence(self, shard: int, place: int) -> Document:
        """One of them."""
        return self.opened(shard).sequence(place)

    def opened(self, shard: int) -> Shard:
        """A shard, read and tokenised now if it has not been, and those before it."""
        return self.kept.opened(shard, self._read_on)

    def _position(self, shard: int) -> dict[str, Any]:
        position = self.opened(shard).position
        assert position is not None
        return position

    def _read_on(self, shard: int) -> None:
        """Makes a shard, those missing before it, and where there are several cores some behind it."""
        last = shard - 1
        while last >= 0 and not self.kept.is_there(last):
            last -= 1
        while last < shard:
            last = self._read_behind(last)

    def _read_behind(self, last: int) -> int:
        """Makes as many shards as there are cores behind shard `last`; returns the number of the last of them."""
        before = open_shard(self.kept.file(last)) if last >= 0 else None
        at = dict(_BEGINNING) if before is None or before.position is None else before.position
        if at["is_end"]:
            raise DataError(
                f"{self.name}: expected more rows than {at['rows']:,}, as there were before, found their end"
            )
        stream, pieces = self.open(), []
        if at["state"] is not None:
            stream.load_state_dict(at["state"])
        rows = iter(stream)
        while len(pieces) < num_cores() and not at["is_end"]:
            piece, at = _next_piece(rows, stream, at)
            last += 1
            pieces.append(json.dumps([last, piece, at], default=str))
        write = partial(_write_piece, self.tokenising, self.name, self.kept.folder)
        on_all_cores(write, pieces, title="tokenising", show_progress=self.kept.show_progress)
        return last


def _next_piece(rows: Iterator[Any], stream: Any, at: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Rows of a shard, and where in the stream they end."""
    piece, size = [], 0
    while size < SHARD_BYTES:
        row = next(rows, None)
        if row is None:
            return piece, {"state": None, "rows": at["rows"] + len(piece), "is_end": True}
        piece.append(row)
        size += len(json.dumps(row, default=str))
    return piece, {"state": stream.state_dict(), "rows": at["rows"] + len(piece), "is_end": False}


def _write_piece(tokenising: Tokenising, name: str, folder: Path, piece: str) -> None:
    shard, rows, at = json.loads(piece)
    first = at["rows"] - len(rows) + 1

    def row_of(number: int) -> dict[str, Any]:
        return check_row(rows[number], f"{name}:{first + number}")

    made = tokenising.sequences(row_of, range(len(rows)))
    write_shard(ShardFolder(folder).file(shard), *made, position=at)


def streamed_rows(
    path: str, subset: str | None, split: str, tokenising: Tokenising, cache: Path, *, show_progress: bool = False
) -> TokenisedStream:
    """A split of a hub dataset, of which nothing is read yet but what it is called.

    Raises:
        DataError: if `datasets` is missing or loads nothing.
    """
    hub_dataset(path, split, subset, streaming=True)
    called = ["stream", path, subset, split, *_on_this_disk(Path(path))]
    data = hashlib.sha256(json.dumps(called).encode()).hexdigest()
    digest = hashlib.sha256(f"{data} {tokenising.digest}".encode()).hexdigest()
    kept = ShardFolder(tokenising.folder(data, cache), show_progress)
    opening = partial(hub_dataset, path, split, subset, streaming=True)
    return TokenisedStream(opening, f"{path}:{split}", digest, tokenising, kept)


def _on_this_disk(folder: Path) -> list[tuple[str, int, str]]:
    """Name, size and a digest of the last bytes of each file of a folder that is streamed; of the hub nothing.

    Parquet has its index at the end, with the sizes and bounds of what is before. Whole files are not read: they may
    be more than a run comes to.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    return [(one.relative_to(folder).as_posix(), one.stat().st_size, _digest_of_end(one)) for one in files]


def _digest_of_end(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _END_BYTES))
        return hashlib.sha256(file.read()).hexdigest()
