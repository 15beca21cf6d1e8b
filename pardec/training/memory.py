"""How much memory training takes, found on a few rows of the very model, before anything large is allocated.

What a row and a real token leave alive differs between families, dtypes and layers with a LoRA; so a tiny step is run
in several sizes, every allocation counted, and what grows is carried on to the sizes of a recipe.
Legend: B sequences, T tokens, N anchors, K num_speculative_tokens, M mask rows of a sequence, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pardec.target.forward import config_value, text_config
from pardec.training.live_bytes import LiveBytes
from pardec.training.mask_rows.prefix_attention import scores_at_once
from pardec.training.module import MaskTokenTrainer
from pardec.training.prefix_memory import PrefixMemory, line, measure_whole, tiny_lengths

_SCORES_ALIVE = 3  # of a slice of attention: scores, those beside the ones of a row's own block, their softmax
_ANCHORS = (4, 8)  # of the tiny steps


@dataclass(frozen=True)
class StepMemory:
    """What is alive in a step, in bytes: of the pass over real tokens, and of what follows it.

    Attributes:
        prefix: of the pass as a whole.
        kept: in the rest, from the forward of mask rows for their backward: constant, for each real token, for each
            mask row, for each pair of a mask row and a token of either kind in its sequence, where attention makes
            all scores at once.
        most: likewise, the most there is in forward or backward; with checkpointing far more than what is kept.
        logits: of a part of the loss, for each of its rows.
        rows_of_part: the most there are.
        scores: of a slice of attention, for each pair of a mask row and a real token.
        most_scores: of all that are made at a time.
    """

    prefix: PrefixMemory
    kept: tuple[float, ...]
    most: tuple[float, ...]
    logits: float
    rows_of_part: int
    scores: int
    most_scores: int

    def bytes_for(self, batch_size: int, num_tokens: int, mask_rows: int) -> int:
        """Of a forward and its backward, beside weights, learned numbers, their gradients and moments.

        Args:
            batch_size: B.
            num_tokens: T.
            mask_rows: of all sequences, those that run together.
        """
        return max(self.prefix.bytes_for(batch_size, num_tokens), self.behind(batch_size, num_tokens, mask_rows))

    def behind(self, batch_size: int, num_tokens: int, mask_rows: int) -> int:
        """The same of what follows the pass over real tokens."""
        sizes = 1, batch_size * num_tokens, mask_rows, _pairs(batch_size, num_tokens, mask_rows)
        kept, most = (sum(a * b for a, b in zip(one, sizes, strict=True)) for one in (self.kept, self.most))
        part = self.logits * min(self.rows_of_part, mask_rows)
        scores = min(self.most_scores, self.scores * num_tokens * mask_rows)
        return int(max(kept + part, most + scores))

    def carried_on(self, other: "StepMemory", share: float) -> "StepMemory":
        """What grows along with layers, as from here to another of more layers, `share` times as far."""
        kept, most = line(self.kept, other.kept, share), line(self.most, other.most, share)
        return replace(self, prefix=self.prefix.carried_on(other.prefix, share), kept=kept, most=most)


def learned_bytes(num_learned: int) -> int:
    """Numbers in float32, gradients and the two moments of AdamW."""
    return num_learned * 4 * 4


def _pairs(batch_size: int, num_tokens: int, mask_rows: int) -> float:
    return mask_rows * (num_tokens + mask_rows / batch_size)


def measure_step(module: MaskTokenTrainer) -> StepMemory:
    """Runs tiny steps of the module, in the autocast that is on; leaves no gradient, and no number changed."""
    target, K = module.target, module.drafter.num_speculative_tokens
    _, *lengths = tiny_lengths(target)
    sizes = [(T, N * K) for T in lengths for N in _ANCHORS]
    found = [_alive_behind(module, T, M // K) for T, M in sizes]
    # the route of blocks makes no scores between blocks
    pairs = [T * M if module.mask_pass.takes_blocks else _pairs(1, T, M) for T, M in sizes]
    kept, most = (_by_size(alive, sizes, pairs) for alive in zip(*found, strict=True))
    if module.mask_pass.takes_blocks:  # whose scores are told below
        kept, most = (*kept[:3], 0.0), (*most[:3], 0.0)
    heads = config_value(text_config(target.base), "num_attention_heads") or 1
    return StepMemory(
        measure_whole(module.own_head),
        kept,
        most,
        _of_logits(module, lengths[0], _ANCHORS[1]),
        module.most_rows,
        _SCORES_ALIVE * heads * 4 if module.mask_pass.takes_blocks else 0,
        _SCORES_ALIVE * scores_at_once(target.device) * 4,
    )


def _by_size(
    alive: Sequence[int], sizes: Sequence[tuple[int, int]], pairs: Sequence[float]
) -> tuple[float, float, float, float]:
    """What is constant, of each real token, of each mask row and of each pair in bytes that are alive.

    Args:
        alive: of two lengths with two numbers of mask rows each.
        sizes: real tokens and mask rows of each.
        pairs: of each.
    """
    (T0, M0), (T1, M1) = sizes[0], sizes[-1]
    f00, f01, f10, f11 = alive
    of_pair = (f11 - f10 - f01 + f00) / ((T1 - T0) * (M1 - M0))
    # what each size adds once pairs are taken away
    g00, g01, g10, _ = (bytes_ - of_pair * count for bytes_, count in zip(alive, pairs, strict=True))
    of_real, of_mask = (g10 - g00) / (T1 - T0), (g01 - g00) / (M1 - M0)
    return g00 - of_real * T0 - of_mask * M0, of_real, of_mask, max(0.0, of_pair)


def _alive_behind(module: MaskTokenTrainer, T: int, N: int) -> tuple[int, int]:
    """Bytes in what follows that pass, with N anchors, one block a part: kept for the backward; the most there are."""
    ids = torch.zeros(1, T, dtype=torch.long, device=module.target.device)
    with _counted(module, most_rows=1) as counted:
        loss = _loss_behind_a_prefix(module, ids, N, counted)
        kept = counted.live
        loss.backward()
        return kept, counted.peak


def _of_logits(module: MaskTokenTrainer, T: int, N: int) -> float:
    """Bytes for each row of a part of the loss that are alive while it is made, beside what is kept."""
    ids = torch.zeros(1, T, dtype=torch.long, device=module.target.device)
    num_rows = N * module.drafter.num_speculative_tokens
    with _counted(module, most_rows=num_rows) as counted:
        loss = _loss_behind_a_prefix(module, ids, N, counted)
        found = (counted.peak - counted.live) / num_rows
        del loss
        return found


def _loss_behind_a_prefix(module: MaskTokenTrainer, ids: Tensor, N: int, counted: LiveBytes) -> Tensor:
    """Loss of N anchors behind real tokens that have run before; the peak begins with what these leave."""
    anchors = torch.linspace(0, ids.shape[1] - 2, 2 * N).long()[None, N - 1 :]
    with torch.no_grad():
        module(ids, ids == 0, anchors, num_anchors=1)  # the first only makes the prefix
    counted.peak = counted.live
    return module(ids, ids == 0, anchors, first_anchor=1, num_anchors=N)[0]


@contextmanager
def _counted(module: MaskTokenTrainer, *, most_rows: int) -> Iterator[LiveBytes]:
    """Counts what is made beside learned numbers and their gradients; the module is as it was afterwards."""
    learned = [p for p in module.parameters() if p.requires_grad]
    before = module.most_rows, [p.grad for p in learned]
    for parameter in learned:
        parameter.grad = torch.zeros_like(parameter)
    counted, device = LiveBytes(), module.target.device
    counted.leave_out([*module.parameters(), *module.buffers(), *(p.grad for p in learned if p.grad is not None)])
    module.most_rows = most_rows
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), counted:
            yield counted
    finally:
        module.forget_prefix()
        module.most_rows, gradients = before
        for parameter, gradient in zip(learned, gradients, strict=True):
            parameter.grad = gradient
