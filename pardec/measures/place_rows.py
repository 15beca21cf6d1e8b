"""Mask rows behind every few tokens of texts that the target has emitted, by the rows, cache and gate of the decoder.

Real tokens of a continuation, with a block of mask tokens behind every few of them, in one forward for many places.
Knows nothing of what is looked for in them.
Legend: B batch, C real rows of a forward, N blocks of a forward, K num_speculative_tokens, V vocabulary,
H width of a hidden state.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pardec.decoding.drafting import HeadDrafter
from pardec.decoding.prefill import prefill_prompts
from pardec.decoding.rows import RowForward
from pardec.layout import chain_layout
from pardec.measures.share import Share
from pardec.model import SelfSpeculativeModel
from pardec.target.cache import SlotCache

# of one forward, all rows together: bounds the memory of logits
_LOGITS_PER_FORWARD = 2**26
_BLOCKS_PER_FORWARD = 16


@dataclass(frozen=True)
class PlaceRows:
    """The mask rows of one forward.

    Attributes:
        logits: shape [B, N, K, V].
        hidden: what the output head read there, shape [B, N, K, H]; None without a sampler head.
        before: the continuation's token before the one that each row predicts, shape [B, N, K].
        wanted: the token itself, -1 where there is none, shape [B, N, K].
    """

    logits: Tensor
    hidden: Tensor | None
    before: Tensor
    wanted: Tensor


def look_by_place(
    model: SelfSpeculativeModel,
    prompts: Sequence[list[int]],
    continuations: Sequence[list[int]],
    look: Callable[[HeadDrafter | None, PlaceRows], Tensor],
    *,
    num_speculative_tokens: int | None,
    use_head: bool | None,
    stride: int,
    batch_size: int,
    share: Share,
) -> list[Tensor]:
    """What `look` finds at every place of each sequence, in order: a tensor [places, ...] for each.

    A place is a token that a step may draft behind: the prompt's last, or one of the continuation.

    Args:
        model: with an adapter.
        prompts: token ids, none empty.
        continuations: of each prompt, emitted by the model.
        look: from rows to a tensor [B, N, ...].
        num_speculative_tokens: K; default what the adapter was trained with.
        use_head: whether the sampler head is there for `look`; default if the adapter has one.
        stride: tokens from one place to the next, from the prompt's last token on.
        batch_size: sequences in one forward.
        share: the batches that this process looks at; results are of all.

    Raises:
        ValueError: without an adapter, or a head that is asked for, or if prompts and continuations do not go together.
    """
    if model.adapter is None:
        raise ValueError("model: expected one with an adapter, found none")
    if not prompts or len(prompts) != len(continuations):
        raise ValueError(
            f"continuations: expected one for each of some prompts, found {len(continuations)} for {len(prompts)}"
        )
    if stride < 1:
        raise ValueError(f"stride: expected an integer >= 1, found {stride}")
    K = num_speculative_tokens or model.adapter.metadata.num_speculative_tokens
    head = model.engines.chosen_head(use_head)
    # rows as the decoder runs them, but for weights that are packed and steps that are captured
    forward = model.engines.row_forward(K, head)
    mine = []
    for start in share.mine(range(0, len(prompts), batch_size)):
        part = slice(start, start + batch_size)
        rows = _rows_of_batch(forward, prompts[part], continuations[part], K, stride)
        with torch.no_grad(), forward.attached():
            mine.append((start, torch.cat([look(head, one) for one in rows], dim=1).cpu()))
    return [found for batch in share.of_all(mine) for found in batch]


def _rows_of_batch(
    forward: RowForward, prompts: Sequence[list[int]], continuations: Sequence[list[int]], K: int, stride: int
) -> Iterator[PlaceRows]:
    """The rows of a few sequences, forward by forward."""
    target, device = forward.target, forward.target.device
    B, P = len(prompts), max(map(len, prompts))
    # real rows: the prompt's last token and the continuation, C at a time, a block behind each `stride`-th of them
    tails = [[prompt[-1], *tokens] for prompt, tokens in zip(prompts, continuations, strict=True)]
    longest = max(map(len, tails))
    affordable = max(1, _LOGITS_PER_FORWARD // (B * (K + stride) * target.vocab_size))
    N = min(affordable, _BLOCKS_PER_FORWARD, -(-longest // stride))
    C = N * stride
    plan = forward.plan(chain_layout([K if row % stride == 0 else 0 for row in range(C)]))
    num_forwards = -(-longest // C)
    tokens = _padded(tails, num_forwards * C + K + 1, device)

    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    cache = SlotCache(target.num_layers, P + num_forwards * C + plan.layout.num_rows)
    prefill_prompts(target, _padded(prompts, P, device).clamp_min(0), lengths, cache, None, None)
    ahead = torch.arange(1, K + 1, device=device)
    for start in range(0, longest, C):
        ids = tokens[:, start : start + C].clamp_min(0)
        # the prompt's last token is run again, into its own slot
        logits = forward.run(plan, cache, lengths - 1 + start, ids)[:, C:].unflatten(1, (N, K))
        before = torch.arange(start, start + C, stride, device=device)[:, None] + ahead  # [N, K]
        hidden = None if forward.hidden is None else forward.hidden[:, C:].unflatten(1, (N, K))
        yield PlaceRows(logits, hidden, tokens[:, before].clamp_min(0), tokens[:, before + 1])


def _padded(rows: Sequence[list[int]], length: int, device: torch.device) -> Tensor:
    """Token ids, shape [B, length], -1 behind their end."""
    return torch.tensor([list(row) + [-1] * (length - len(row)) for row in rows], device=device)
