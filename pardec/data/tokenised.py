"""Rows as training sequences on the disk, tokenised by all cores when a run comes to them, and by no run twice.

Knows rows and a tokenizer, no model and no order of examples.
Legend: T tokens of a sequence.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pardec.all_cores import num_cores, on_all_cores
from pardec.data.fitting import RowCounts, pack
from pardec.data.row_checks import DataError
from pardec.data.rows import Rows
from pardec.data.shards import Shard, ShardFolder, pieces_of, write_shard
from pardec.data.tokenising import Document, check_token_ids, tokenise

# of rows in a shard: seconds of one core, and what training holds in memory at a time
SHARD_BYTES = 8 << 20
# change with what sequences are made of rows; the second where rows may be conversations
_FORM, _CHAT_FORM = 1, 2


@dataclass(frozen=True)
class Tokenising:
    """How rows become sequences.

    Attributes:
        tokenizer: of the base.
        max_length: T.
        num_embeddings: of the base; token ids of rows must be below.
        where: named in errors about rows that do not name their own place.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    num_embeddings: int | None
    where: str

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that sequences depend on beside the rows."""
        tokenizer: Any = self.tokenizer  # fast ones have a backend, of which the common class says nothing
        tells: Any = sorted(tokenizer.get_vocab().items())
        if tokenizer.is_fast:
            tells = json.loads(tokenizer.backend_tokenizer.to_str())
            del tells["padding"], tells["truncation"]  # of the last call
        form = _FORM if tokenizer.chat_template is None else _CHAT_FORM
        parts = [
            type(tokenizer).__name__,
            json.dumps(tells),
            json.dumps(tokenizer.chat_template, sort_keys=True),
            repr((tokenizer.bos_token_id, tokenizer.eos_token_id, self.max_length, self.num_embeddings, form)),
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def sequences(
        self, row_of: Callable[[int], dict[str, Any]], numbers: Iterable[int]
    ) -> tuple[list[Document], RowCounts, list[str]]:
        """Sequences of rows, what became of the rows, and what is wrong with those that had to be left out."""
        counts, faults, documents = RowCounts(), [], []
        for number in numbers:
            try:
                row = row_of(number)
                of_row = tokenise(row, self.tokenizer, self.where)
                if self.num_embeddings is not None:
                    largest = max(int(one.input_ids.max(initial=0)) for one in of_row)
                    check_token_ids(largest, self.num_embeddings, "the base", row.get("where", self.where))
            except DataError as error:
                faults.append(str(error))
                counts.read += 1
                counts.unusable += 1
                continue
            documents += counts.add(of_row, self.max_length)
        return pack(documents, self.max_length), counts, faults

    def folder(self, data: str, cache: Path) -> Path:
        """Where sequences are kept that are made so of data with this digest, by these versions of libraries."""
        made_by = f"{version('tokenizers')} {version('transformers')}"
        return cache / hashlib.sha256(f"{data} {self.digest} {made_by}".encode()).hexdigest()[:32]


@dataclass
class TokenisedRows:
    """The training sequences of rows, as `ExampleOrder` and people ask for them.

    Rows are put in an order of their own, the same for every seed, and cut into shards, so that each shard is a sample
    of all. A shard that is asked for is tokenised, and with it as many of those that come behind as there are cores;
    one process does that, the others wait for it.

    Attributes:
        rows: to train on.
        tokenising: how.
        kept: the shards.
    """

    rows: Rows
    tokenising: Tokenising
    kept: ShardFolder
    _order: list[int] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """SHA-256 of all that the sequences depend on."""
        return hashlib.sha256(f"{self.rows.digest} {self.tokenising.digest}".encode()).hexdigest()

    @cached_property
    def pieces(self) -> list[np.ndarray]:
        """Row numbers of each shard."""
        order = np.random.default_rng(0).permutation(len(self.rows))
        return [order[piece] for piece in pieces_of(self.rows.sizes[order], SHARD_BYTES)]

    @property
    def counts(self) -> RowCounts:
        """Of the rows of all shards that have been asked for."""
        return self.kept.counts(len(self.rows))

    def shards(self, seed: int, epoch: int) -> Sequence[int]:
        """Shards in the order of an epoch."""
        self._order = np.random.default_rng((seed, epoch)).permutation(len(self.pieces)).tolist()
        return self._order

    def lengths(self, shard: int) -> np.ndarray:
        """Tokens of each sequence of a shard."""
        return self.opened(shard).lengths

    def sequence(self, shard: int, place: int) -> Document:
        """One of them."""
        return self.opened(shard).sequence(place)

    def __len__(self) -> int:
        return sum(len(self.opened(shard)) for shard in range(len(self.pieces)))

    def __iter__(self) -> Iterator[Document]:
        for shard in range(len(self.pieces)):
            opened = self.opened(shard)
            yield from map(opened.sequence, range(len(opened)))

    def opened(self, shard: int) -> Shard:
        """A shard, tokenised now if it has not been."""
        return self.kept.opened(shard, self._tokenise_from)

    def _tokenise_from(self, shard: int) -> None:
        place = self._order.index(shard) if shard in self._order else len(self._order)
        coming = [shard, *self._order[place + 1 :]][: num_cores()]
        work = {one: (self.pieces[one], self.kept.file(one)) for one in coming if not self.kept.is_there(one)}
        write = partial(_write, self.rows, self.tokenising, work)
        on_all_cores(write, list(work), title="tokenising", show_progress=self.kept.show_progress)


def _write(rows: Rows, tokenising: Tokenising, work: Mapping[int, tuple[np.ndarray, Path]], shard: int) -> None:
    numbers, file = work[shard]
    write_shard(file, *tokenising.sequences(rows.__getitem__, map(int, numbers)))


def tokenised(rows: Rows, tokenising: Tokenising, cache: Path, *, show_progress: bool = False) -> TokenisedRows:
    """Rows with the folder in which their sequences are kept: one for these data, this tokenizer and this length."""
    return TokenisedRows(rows, tokenising, ShardFolder(tokenising.folder(rows.digest, cache), show_progress))
