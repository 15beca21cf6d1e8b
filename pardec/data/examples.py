"""Training examples in the order that every run of the same seed has: which sequence, and its anchors.

Knows sequences by shard, place and length; no files and no tokenizer.
Legend: T tokens of a sequence, N anchors, G examples of an optimiser step.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pardec.data.fitting import useful_anchors
from pardec.data.row_checks import DataError
from pardec.data.tokenising import Document

# among so many steps' examples those of similar length are brought together: few tokens of a step are padding then, and
# its examples still come from all over the pool
_STEPS_OF_A_POOL = 64


class Sequences(Protocol):
    """Training sequences in shards, each of which fits into memory and may come to be only when it is asked for."""

    def shards(self, seed: int, epoch: int) -> Iterable[int]:
        """Shards in the order of an epoch, the same whenever it is asked for."""
        ...

    def lengths(self, shard: int) -> np.ndarray:
        """Tokens of each sequence of a shard."""
        ...

    def sequence(self, shard: int, place: int) -> Document:
        """One of them, at most T tokens."""
        ...


@dataclass(frozen=True)
class OneShard:
    """Sequences that are all in memory."""

    documents: Sequence[Document]

    def shards(self, seed: int, epoch: int) -> Iterable[int]:
        """The only one."""
        return (0,)

    def lengths(self, shard: int) -> np.ndarray:
        """Tokens of each sequence."""
        return np.array([len(one.input_ids) for one in self.documents], dtype=np.int64)

    def sequence(self, shard: int, place: int) -> Document:
        """One of them."""
        return self.documents[place]


class ExampleOrder:
    """Which sequence example n of a run is: a function of the sequences, the seed, G and n, of nothing that was before.

    An epoch has every sequence once: shard by shard, the sequences of each in an order of their own in which those of a
    step are of similar length. A step begins at each multiple of G, whoever takes how many of its examples.
    """

    def __init__(self, sequences: Sequences, seed: int, examples_per_step: int = 1):
        """`examples_per_step` = G, over all processes; with 1 there is nothing to bring together."""
        self.sequences = sequences
        self.seed = seed
        self.examples_per_step = examples_per_step
        self._epoch_size: int | None = None
        self._begin(0)

    def at(self, example: int) -> tuple[int, int]:
        """(shard, place in it) of an example; fast where examples are asked for in their order.

        Raises:
            DataError: if there is no sequence at all.
        """
        if example < self._first:
            self._begin(0)
        if self._epoch_size is not None and example // self._epoch_size > self._epoch:
            self._begin(example // self._epoch_size)
        while example >= self._first + len(self._order):
            self._advance()
        return self._shard, int(self._order[example - self._first])

    def _begin(self, epoch: int) -> None:
        self._epoch, self._first = epoch, epoch * (self._epoch_size or 0)
        self._began, self._shard, self._order = self._first, -1, np.empty(0, dtype=np.int64)
        self._left: Iterator[int] = iter(self.sequences.shards(self.seed, epoch))

    def _advance(self) -> None:
        self._first += len(self._order)
        self._order = np.empty(0, dtype=np.int64)
        shard = next(self._left, None)
        if shard is not None:
            self._shard, self._order = shard, self._order_within(shard)
            return
        self._epoch_size = self._first - self._began
        if not self._epoch_size:
            raise DataError("data: expected a sequence to train on, found none")
        self._begin(self._epoch + 1)

    def _order_within(self, shard: int) -> np.ndarray:
        lengths = self.sequences.lengths(shard)
        source = np.random.default_rng((self.seed, self._epoch, shard))
        order = source.permutation(len(lengths))
        return by_similar_length(order, lengths, self._first, self.examples_per_step, source)


def by_similar_length(
    order: np.ndarray, lengths: np.ndarray, first: int, examples_per_step: int, source: np.random.Generator
) -> np.ndarray:
    """The same indices in an order in which those of a step are of similar length, as each is padded to the longest.

    Inside of pools of 64 steps, whose steps come in random order.

    Args:
        order: indices, in random order.
        lengths: by index.
        first: example that the first of them is; steps and pools begin at multiples of their sizes.
        examples_per_step: G.
        source: of randomness.
    """
    found, end = order.copy(), first + len(order)
    pool = examples_per_step * _STEPS_OF_A_POOL
    for begin in range(first - first % pool, end, pool):
        start, stop = max(begin, first), min(begin + pool, end)
        inside = order[start - first : stop - first]
        if examples_per_step == 1 or len(np.unique(lengths[inside])) < 2:
            continue
        ranked = inside[np.argsort(lengths[inside], kind="stable")]
        steps = list(pairwise([start, *range(start - start % examples_per_step, stop, examples_per_step)[1:], stop]))
        done = 0
        for index in source.permutation(len(steps)):
            a, b = steps[index]
            found[a - first : b - first] = ranked[done : done + b - a]
            done += b - a
    return found


class AnchoredSequences(Dataset):
    """Training examples in their final order: example n is a sequence with its anchors, the same in every run.

    So a position in examples is all that a run needs to go on: after n examples, however many processes saw them, the
    rest is `Subset(examples, range(n, len(examples)))`. Anchors are drawn anew each time a sequence comes up.
    """

    def __init__(
        self,
        sequences: Sequences | Sequence[Document],
        num_examples: int,
        anchors_per_sequence: int,
        seed: int,
        examples_per_step: int = 1,
    ):
        """Takes what example n depends on, none of it the number of processes.

        Args:
            sequences: in shards, or all of them.
            num_examples: of the whole run, so that resuming is starting further on.
            anchors_per_sequence: N.
            seed: of order and anchors.
            examples_per_step: G, over all processes; those of a step are of similar length.
        """
        self.sequences = OneShard(sequences) if isinstance(sequences, Sequence) else sequences
        self.num_examples = num_examples
        self.anchors_per_sequence = anchors_per_sequence
        self.seed = seed
        self._order = ExampleOrder(self.sequences, seed, examples_per_step)

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, example: int) -> dict[str, Tensor]:
        """Example n, 0 <= n < num_examples: input_ids [T], loss_mask [T], anchors [N]."""
        document = self.sequences.sequence(*self._order.at(example))
        ids = torch.from_numpy(document.input_ids.astype(np.int64))
        mask = torch.ones(len(ids), dtype=torch.bool)
        if document.loss_mask is not None:
            mask = torch.from_numpy(document.loss_mask)
        candidates = useful_anchors(mask).nonzero().squeeze(1)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + example)
        chosen = candidates[torch.randperm(len(candidates), generator=generator)[: self.anchors_per_sequence]]
        # anchors at the last token have no targets: they fill up where there are fewer candidates, behind the others,
        # since token dropping goes by this order, which must be random
        fill = torch.full((self.anchors_per_sequence - len(chosen),), len(ids) - 1)
        return {"input_ids": ids, "loss_mask": mask, "anchors": torch.cat([chosen, fill])}


def collate(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch, sequences padded on the right with tokens that no loss counts."""
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([e["input_ids"] for e in examples], batch_first=True),
        "loss_mask": pad([e["loss_mask"] for e in examples], batch_first=True),
        "anchors": torch.stack([e["anchors"] for e in examples]),
    }


def collate_used(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The same without anchors that fill up in all sequences: no row behind them has a target.

    Not where mask tokens are dropped, which goes by how many anchors there are, nor where forwards run some of them at
    a time, which must be as many in every process.
    """
    used = [int((e["anchors"] < len(e["input_ids"]) - 1).sum()) for e in examples]
    return collate([{**e, "anchors": e["anchors"][: max(1, *used)]} for e in examples])
