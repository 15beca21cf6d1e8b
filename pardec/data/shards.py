"""Tokenised sequences on the disk, a file for each shard: written whole or not at all, read through a memory map.

Knows neither rows nor tokenizers, nor who makes a shard.
"""

import fcntl
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from pardec.data.fitting import RowCounts
from pardec.data.tokenising import Document
from pardec.run import cache_folder, save_tensors, written_aside

_PREFIX = ".writing-"
_FAULTS_TOLD = 3


@dataclass(frozen=True)
class Shard:
    """A file of sequences.

    Attributes:
        file: open, read where it is asked for.
        ends: behind the last token of each sequence.
        has_mask: of each; without one every token counts.
        counts: of the rows that the sequences are made of.
        faults: what is wrong with rows that were left out.
        position: of a stream, behind the last row of the shard; None where rows have numbers.
    """

    file: Any
    ends: np.ndarray
    has_mask: np.ndarray
    counts: RowCounts
    faults: list[str]
    position: dict[str, Any] | None

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence."""
        return np.diff(self.ends, prepend=0)

    def sequence(self, place: int) -> Document:
        """One of them."""
        part = slice(int(self.ends[place - 1]) if place else 0, int(self.ends[place]))
        mask = self.file.get_slice("loss_mask")[part] if self.has_mask[place] else None
        return Document(self.file.get_slice("input_ids")[part], mask)


def pieces_of(sizes: np.ndarray, num_bytes: int) -> list[np.ndarray]:
    """Numbers of rows in pieces of one size, at most so many bytes or one row more, in their order."""
    total = int(sizes.sum())
    num_pieces = max(1, -(-total // num_bytes))
    piece = (np.cumsum(sizes) - sizes) * num_pieces // max(1, total)
    return np.split(np.arange(len(sizes)), np.flatnonzero(np.diff(piece)) + 1)


def shards_folder() -> Path:
    """Where tokenised data are kept unless another folder is asked for; to be emptied at any time."""
    return cache_folder() / "tokenised"


def write_shard(
    path: Path,
    sequences: Sequence[Document],
    counts: RowCounts,
    faults: Sequence[str] = (),
    position: dict[str, Any] | None = None,
) -> None:
    """Writes a shard aside and renames it, so that a kill at any moment leaves it whole or not there.

    Raises:
        OSError: naming the file, if there is no room for it.
    """
    masks = [np.ones(len(s.input_ids), dtype=bool) if s.loss_mask is None else s.loss_mask for s in sequences]
    arrays = {
        "input_ids": np.concatenate([s.input_ids for s in sequences] or [np.empty(0, dtype=np.int32)]),
        "loss_mask": np.concatenate(masks or [np.empty(0, dtype=bool)]),
        "ends": np.cumsum([len(s.input_ids) for s in sequences], dtype=np.int64),
        "has_mask": np.array([s.loss_mask is not None for s in sequences], dtype=bool),
    }
    about = {"counts": asdict(counts), "faults": list(faults), "position": position}
    with written_aside(path) as aside:
        save_tensors({name: torch.from_numpy(a) for name, a in arrays.items()}, aside, {"about": json.dumps(about)})


def open_shard(path: Path) -> Shard | None:
    """A shard, None if there is none that is whole."""
    try:
        file = safe_open(path, framework="np")
        about = json.loads(file.metadata()["about"])
        ends, has_mask = file.get_tensor("ends"), file.get_tensor("has_mask")
        return Shard(file, ends, has_mask, RowCounts(**about["counts"]), about["faults"], about["position"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def made_folder(folder: Path) -> Path:
    """The folder, made if it is not there.

    Raises:
        OSError: if nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise OSError(
            f"data.cache: expected a folder that can be written to at {folder}, found {error.strerror}"
        ) from None


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Held by the only process that writes to a folder of shards; what a killed one left half-written is removed.

    Raises:
        OSError: if nothing can be written there.
    """
    with (made_folder(folder) / "lock").open("a") as lock:
        # a lock of POSIX is this process's own: helpers that outlive it, where it is killed, do not keep it
        fcntl.lockf(lock, fcntl.LOCK_EX)
        for left in folder.glob(f"{_PREFIX}*"):
            left.unlink(missing_ok=True)
        yield


@dataclass
class ShardFolder:
    """The shards of a corpus, one of them open.

    Attributes:
        folder: of the files.
        show_progress: rows that are left out during a run are named.
    """

    folder: Path
    show_progress: bool = False
    _opened: tuple[int, Shard] | None = None
    _counted: dict[int, RowCounts] = field(default_factory=dict)

    def file(self, shard: int) -> Path:
        """Where a shard is, or will be."""
        return self.folder / f"shard-{shard:06d}.safetensors"

    def is_there(self, shard: int) -> bool:
        """Whether it is, and whole."""
        return open_shard(self.file(shard)) is not None

    def opened(self, shard: int, make: Callable[[int], object]) -> Shard:
        """A shard; where it is not there, `make` is called with its number, by one process at a time.

        Raises:
            OSError: naming the file, if there is no room for it.
        """
        if self._opened is not None and self._opened[0] == shard:
            return self._opened[1]
        found = open_shard(self.file(shard))
        if found is None:
            with one_writer(self.folder):
                if not self.is_there(shard):
                    make(shard)
            found = open_shard(self.file(shard))
            if found is None:
                raise OSError(f"{self.file(shard)}: expected the shard that was just written, found none")
        self._opened = (shard, found)
        is_new = shard not in self._counted
        self._counted[shard] = found.counts
        if is_new and self.show_progress and len(self._counted) > 1:
            for fault in found.faults[:_FAULTS_TOLD]:
                tqdm.write(f"left out: {fault}")
        return found

    def counts(self, available: int) -> RowCounts:
        """Sums over the shards that were opened; `available` are the rows that could be read."""
        sums = {one.name: sum(getattr(c, one.name) for c in self._counted.values()) for one in fields(RowCounts)}
        return RowCounts(**{**sums, "available": available})
