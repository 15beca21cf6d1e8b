"""All state of a decoding, in tensors on the device, how emitted tokens change it, and how finished rows leave it.

Legend: B batch, P padded prompt length, K num_speculative_tokens, N nodes of a tree, V vocabulary,
W tokens that a step emits at most, N texts in which tokens are copied from, R of them for each row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from pardec.decoding.copying import MARGIN, Texts, begin_context
from pardec.target.cache import SlotCache

# a mark is accepted drafts + draft_length * this + copies * this ^ 2 + accepted copies * this ^ 3; more than any W
MARK = 256
# what rows have in common; texts stay when rows leave, as others copy from them
_OF_ALL_ROWS = ("cache", "eos_token_ids", "context", "context_lengths")


@dataclass
class DecodeState:
    """Everything a step reads and writes.

    Attributes:
        cache: keys and values; slot s < lengths[b] holds the committed token at position s of row b.
        lengths: committed tokens, shape [B].
        bonus: the newest emitted token, not yet in the cache, shape [B].
        drafts: drafted token ids behind it, shape [B, K]; of a tree those of its nodes, [B, N].
        draft_probs: the law q they were drawn from, shape [B, K, V]; None when greedy, and of a tree.
        parents: rows of the parents of a dynamic tree's nodes, shape [B, N]; None of all else.
        draft_length: drafts that exist in each row, of a tree levels of nodes, shape [B], in 0..K.
        done: rows that have met EOS or their length, shape [B], bool.
        room: new tokens still allowed, shape [B]; 0 where done.
        eos_token_ids: shape [n], may be empty.
        prompts: padded prompt ids, shape [B, P].
        prompt_lengths: shape [B].
        output: emitted ids, shape [B, capacity + W], W the most that a step emits; only the first num_new count.
        num_new: emitted ids that count, shape [B].
        marks: a round's drafts, shape [B, capacity + W], where its first token stands in `output`; see `rounds`.
        tokens: of the last step, shape [B, W], emitted or not.
        num_accepted: drafts accepted by the last step, shape [B].
        num_copied: copied tokens accepted by the last step, shape [B].
        context: ids of prompt and output of every sequence of the batch by position, those that have left it too, see
            `copying.begin_context`; None where nothing is copied.
        context_lengths: tokens of each that count, shape [N]; not kept up where R is 1.
        sources: texts that each row copies from, its own first, shape [B, R]; None where nothing is copied.
    """

    cache: SlotCache
    lengths: Tensor
    bonus: Tensor
    drafts: Tensor
    draft_probs: Tensor | None
    parents: Tensor | None
    draft_length: Tensor
    done: Tensor
    room: Tensor
    eos_token_ids: Tensor
    prompts: Tensor
    prompt_lengths: Tensor
    output: Tensor
    num_new: Tensor
    marks: Tensor
    tokens: Tensor
    num_accepted: Tensor
    num_copied: Tensor
    context: Tensor | None
    context_lengths: Tensor | None
    sources: Tensor | None

    @classmethod
    def begin(
        cls,
        cache: SlotCache,
        prompts: Tensor,
        lengths: Tensor,
        eos_token_ids: Tensor,
        *,
        room: Tensor,
        drafts: Tensor,
        draft_probs: Tensor | None,
        width: int,
        capacity: int,
        parents: Tensor | None = None,
        draft_length: int | None = None,
        sources: Tensor | None = None,
    ) -> "DecodeState":
        """The state behind prompts that are in the cache, before the first token is emitted.

        Args:
            cache: holds the prompts.
            prompts: shape [B, P].
            lengths: of the prompts, shape [B].
            eos_token_ids: shape [n].
            room: shape [B].
            drafts: place for them, shape [B, K].
            draft_probs: place for their law, shape [B, K, V], or None.
            width: W.
            capacity: new tokens that there is place for.
            parents: place for them, shape [B, N], or None.
            draft_length: K of a tree, which has more nodes than that; default as many as there are drafts.
            sources: texts that each row copies from, shape [B, R]; None where nothing is copied.
        """
        B = lengths.shape[0]
        return cls(
            cache=cache,
            lengths=lengths,
            bonus=lengths.new_zeros(B),
            drafts=drafts,
            draft_probs=draft_probs,
            parents=parents,
            draft_length=lengths.new_full((B,), drafts.shape[1] if draft_length is None else draft_length),
            done=torch.zeros(B, dtype=torch.bool, device=lengths.device),
            room=room,
            eos_token_ids=eos_token_ids,
            prompts=prompts,
            prompt_lengths=lengths.clone(),
            output=lengths.new_zeros(B, capacity + width),
            num_new=lengths.new_zeros(B),
            marks=lengths.new_full((B, capacity + width), -1),
            tokens=lengths.new_zeros(B, width),
            num_accepted=lengths.new_zeros(B),
            num_copied=lengths.new_zeros(B),
            context=None if sources is None else begin_context(prompts, cache.num_slots),
            context_lengths=None if sources is None else lengths.clone(),
            sources=sources,
        )

    @property
    def texts(self) -> Texts | None:
        """Where copies are looked for; None where nothing is copied."""
        if self.context is None or self.context_lengths is None or self.sources is None:
            return None
        return Texts(self.context, self.context_lengths, self.sources)

    def mark(self, num_accepted: Tensor, num_copies: Tensor | None = None, num_drafts: Tensor | None = None) -> None:
        """Notes a round, before EOS or length cuts; of rows that were done before, behind what counts.

        Args:
            num_accepted: drafts and copies, shape [B].
            num_copies: that were verified, shape [B].
            num_drafts: accepted drafts, shape [B]; default as many as there are, as copies stand behind all of them.
        """
        self.num_accepted = num_accepted
        if num_copies is not None:
            drafts = torch.minimum(num_accepted, self.draft_length) if num_drafts is None else num_drafts
            self.num_accepted, self.num_copied = drafts, num_accepted - drafts
        mark = self.num_accepted
        if self.drafts.shape[1]:
            mark = torch.add(mark, self.draft_length, alpha=MARK)
        if num_copies is not None:
            mark = torch.add(torch.add(mark, num_copies, alpha=MARK**2), self.num_copied, alpha=MARK**3)
        self.marks.scatter_(1, self.num_new[:, None], mark[:, None])

    def commit(self, tokens: Tensor, last: Tensor, index: Tensor) -> None:
        """Emits tokens[:, : last + 1] and advances the committed length past all of them but the last."""
        # of rows that end here, or have ended before, the length no longer matters: it only must not grow on
        self.lengths = self.lengths + self.emit(tokens, last, index)

    def emit(self, tokens: Tensor, last: Tensor, index: Tensor) -> Tensor:
        """Appends tokens[:, : last + 1] to each row's output, up to EOS and the length limit; returns how many.

        Args:
            tokens: shape [B, W].
            last: shape [B].
            index: 0..W-1, shape [W].
        """
        end = last
        # what stands behind the end of a row's output does not count, so all tokens may be written
        self.output.scatter_(1, self.num_new[:, None] + index, tokens)
        if self.texts is not None:
            self.write(self.prompt_lengths + self.num_new, tokens, index)
        self.tokens = tokens
        if self.eos_token_ids.numel() and tokens.shape[1] > 1:
            stops = _is_any(tokens, self.eos_token_ids) | (index >= last[:, None])
            end = stops.byte().argmax(dim=1)  # the first EOS token or the last token, whichever comes first
        count = torch.minimum(end + 1, self.room)
        self.bonus = tokens.gather(1, end[:, None])[:, 0]
        self.room = self.room - count
        if self.eos_token_ids.numel():
            self.room = self.room.masked_fill(_is_any(self.bonus, self.eos_token_ids), 0)
        self.num_new = self.num_new + count
        self.done = self.room == 0
        if self.texts is not None and self.texts.sources.shape[1] > 1:
            self.texts.lengths.index_copy_(0, self.texts.sources[:, 0], self.prompt_lengths + self.num_new)
        return count

    def write(self, first: Tensor, ids: Tensor, index: Tensor) -> None:
        """Puts ids, shape [B, n], into each row's own text from positions `first`, shape [B], on; index: 0..n-1."""
        assert self.texts is not None
        self.texts.ids.index_put_((self.texts.sources[:, :1], first[:, None] + (MARGIN + index)), ids)

    def report(self) -> Tensor:
        """For the host, in one tensor, shape [B, 4 + W]: num_new, done, num_accepted, num_copied, tokens."""
        counts = [column[:, None] for column in (self.num_new, self.done, self.num_accepted, self.num_copied)]
        return torch.cat([*counts, self.tokens], dim=1)

    def committed(self, row: int) -> Tensor:
        """Ids of prompt and output of a row that are in the cache, shape [n]; waits for the device."""
        num_prompt = int(self.prompt_lengths[row])
        num_new = int(self.lengths[row]) - num_prompt
        return torch.cat([self.prompts[row, :num_prompt], self.output[row, :num_new]])

    def prefixes(self, since: Tensor, path_of: Callable[[int, int], Sequence[int]]) -> Callable[[int, int], Tensor]:
        """Of row (b, r) the tokens before what it predicts: what is committed, then the ids of `since` on its path."""
        return lambda b, r: torch.cat([self.committed(b), since[b, list(path_of(b, r))]])

    def of_rows(self, rows: Tensor) -> "DecodeState":
        """The state of some rows in this order, shape [n], int64; copies but for the cache, whose rows stay."""
        return replace(self, **{name: tensor[rows] for name, tensor in self._by_row().items()})

    def put(self, rows: Tensor, other: "DecodeState") -> None:
        """Rows `rows`, shape [B], int64, become those of another state in place; the cache stays as it is."""
        theirs = other._by_row()
        for name, tensor in self._by_row().items():
            tensor[rows] = theirs[name]

    def _by_row(self) -> dict[str, Tensor]:
        """Every tensor of shape [B, ...]."""
        found = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in _OF_ALL_ROWS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def rounds(self) -> list[list[tuple[int, int]]]:
        """(accepted drafts, draft_length) of the rounds of each sequence, before EOS or length cuts."""
        return [[(mark % MARK, mark // MARK % MARK) for mark in row] for row in self._marks()]

    def copies(self) -> list[list[tuple[int, int]]]:
        """(accepted copies, copies) of the same rounds."""
        return [[(mark // MARK**3, mark // MARK**2 % MARK) for mark in row] for row in self._marks()]

    def _marks(self) -> list[list[int]]:
        ends = self.num_new.tolist()
        return [[mark for mark in row[:end] if mark >= 0] for row, end in zip(self.marks.tolist(), ends, strict=True)]


class LiveRows:
    """The rows of a batch that are not done, as a state of their own, so that those that are cost nothing more.

    Attributes:
        state: of the rows that are left; steps run on it.
        sequences: the sequence that each of them decodes.
    """

    def __init__(self, whole: DecodeState):
        """Begins with all rows of `whole`, which has every sequence in its place again once all are done."""
        self.state = self._whole = whole
        self.sequences = list(range(whole.lengths.shape[0]))

    def leave(self, done: list[bool]) -> None:
        """Takes out the rows of the sequences that are done; one entry for each sequence."""
        gone = [row for row, sequence in enumerate(self.sequences) if done[sequence]]
        if not gone:
            return
        num_left = len(self.sequences) - len(gone)
        if self.state is not self._whole:
            self._whole.put(self._index([self.sequences[row] for row in gone]), self.state.of_rows(self._index(gone)))
        # the last rows move up into the gaps: moving keys and values costs about as much as a step of the row
        movers = (row for row in range(num_left, len(self.sequences)) if not done[self.sequences[row]])
        rows = [next(movers) if done[self.sequences[row]] else row for row in range(num_left)]
        if rows:
            self.state.cache.spread(rows, self.state.cache.num_used)
        self.state = self.state.of_rows(self._index(rows)) if rows else self._whole
        self.sequences = [self.sequences[row] for row in rows]

    def _index(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, device=self._whole.lengths.device)


def _is_any(tokens: Tensor, ids: Tensor) -> Tensor:
    """Whether each token is one of `ids`, shape [n]."""
    return tokens == ids if ids.shape[0] == 1 else (tokens[..., None] == ids).any(dim=-1)
