"""All state of a decoding, in tensors on the device.

Legend: B batch, P padded prompt length, K num_speculative_tokens, V vocabulary, W tokens that a step emits at most.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pardec.target.cache import SlotCache

# a mark is accepted drafts + draft_length * this; more than any K
MARK = 256


@dataclass
class DecodeState:
    """Everything a step reads and writes.

    Attributes:
        cache: keys and values; slot s < lengths[b] holds the committed token at position s of row b.
        lengths: committed tokens, shape [B].
        bonus: the newest emitted token, not yet in the cache, shape [B].
        drafts: drafted token ids behind it, shape [B, K].
        draft_probs: the law q they were drawn from, shape [B, K, V]; None when greedy.
        draft_length: drafts that exist in each row, shape [B], in 0..K.
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
    """

    cache: SlotCache
    lengths: Tensor
    bonus: Tensor
    drafts: Tensor
    draft_probs: Tensor | None
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

    def report(self) -> Tensor:
        """For the host, in one tensor, shape [B, 3 + W]: num_new, done, num_accepted, tokens."""
        counts = [column[:, None] for column in (self.num_new, self.done, self.num_accepted)]
        return torch.cat([*counts, self.tokens], dim=1)

    def rounds(self) -> list[list[tuple[int, int]]]:
        """(accepted drafts, draft_length) of the rounds of each sequence, before EOS or length cuts."""
        ends = self.num_new.tolist()
        marks = [row[:end] for row, end in zip(self.marks.tolist(), ends, strict=True)]
        return [[(mark % MARK, mark // MARK) for mark in row if mark >= 0] for row in marks]
