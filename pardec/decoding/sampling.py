"""From logits to the law that tokens follow: temperature, top-k, top-p, min-p and any other logits processor.

The processors are transformers' own. Knows nothing of drafts; `draw` serves target and draft alike.
Legend: B batch, R rows, V vocabulary.
"""

import math
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from pardec.arguments import integer, real
from pardec.decoding.verify import sample_from
from pardec.errors import shown

# These look at the scores of one row alone; every other processor, a subclass too, is given the row's token ids.
_WARPERS = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
)

_MANY_TIES = 16  # with the last score that top-k keeps
_CHUNK = 64  # tokens whose largest logit is found at once
LEAST_TEMPERATURE = 1e-4  # but for 0


def make_warpers(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> list[LogitsProcessor]:
    """Transformers' warpers in transformers' order; empty for greedy decoding (temperature 0).

    Raises:
        ValueError: for a value out of range, naming the range and the value.
    """
    if real(temperature) != 0 and not LEAST_TEMPERATURE <= real(temperature) < math.inf:
        least, found = LEAST_TEMPERATURE, shown(temperature)
        raise ValueError(f"temperature: expected 0 (greedy) or a finite number of at least {least}, found {found}")
    top_k = None if top_k is None else integer("top_k", top_k, 1)
    if top_p is not None and not 0 < real(top_p) <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], found {shown(top_p)}")
    if min_p is not None and not 0 <= real(min_p) <= 1:
        raise ValueError(f"min_p: expected a number in [0, 1], found {shown(min_p)}")
    if temperature == 0:
        return []
    warpers: list[LogitsProcessor] = []
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k is not None:
        warpers.append(TopKLogitsWarper(min(top_k, 2**31 - 1)))  # above every vocabulary
    if top_p is not None and top_p < 1:
        warpers.append(TopPLogitsWarper(float(top_p)))
    if min_p is not None and min_p > 0:
        warpers.append(MinPLogitsWarper(float(min_p)))
    return warpers


@dataclass(frozen=True)
class TokenLaw:
    """How tokens are chosen from logits.

    Attributes:
        greedy: the token is the argmax; otherwise it is drawn.
        processors: applied to float32 scores in this order, as `generate` does.
        generator: source of randomness; None for torch's global one.
    """

    greedy: bool
    processors: tuple[LogitsProcessor, ...] = ()
    generator: Generator | None = None

    def __post_init__(self) -> None:
        if self.needs_prefix:
            names = ", ".join(type(p).__name__ for p in self.processors if type(p) not in _WARPERS)
            warnings.warn(f"called row by row on the host, which slows every step: {names}", stacklevel=3)

    @property
    def key(self) -> Hashable:
        """Equal for laws that a captured step cannot tell apart, the generator aside; None if some is unknown."""
        if self.needs_prefix:
            return None
        return (self.greedy, *((type(p), *sorted((k, _exact(v)) for k, v in vars(p).items())) for p in self.processors))

    @property
    def is_capturable(self) -> bool:
        """Whether nothing in it reads a value back to the host, as torch's distributions do in the eta warper."""
        return not self.needs_prefix and not any(isinstance(p, EtaLogitsWarper) for p in self.processors)

    @property
    def needs_prefix(self) -> bool:
        """Whether some processor must see the tokens before the row."""
        return any(type(processor) not in _WARPERS for processor in self.processors)

    def scores(self, logits: Tensor, prefix_of: Callable[[int, int], Tensor] | None = None) -> Tensor:
        """Processed scores.

        Args:
            logits: shape [B, R, V].
            prefix_of: token ids, shape [n], before the token that row (b, r) predicts; None where no such prefix
                is known, as for drafts: then only the warpers are applied.
        """
        scores = logits.float()
        if self.needs_prefix and prefix_of is not None:
            B, R, _ = logits.shape
            rows = [[self._process_row(scores[b, r], prefix_of(b, r)) for r in range(R)] for b in range(B)]
            return torch.stack([torch.stack(row) for row in rows])
        warpers = [processor for processor in self.processors if type(processor) in _WARPERS]
        if not warpers:
            return scores
        flat = scores.reshape(-1, scores.shape[-1])
        no_ids = torch.empty(flat.shape[0], 0, dtype=torch.long, device=flat.device)
        for warper in warpers:
            flat = warper(no_ids, flat)  # type: ignore[arg-type]
        return flat.view_as(scores)

    def probs(self, logits: Tensor, prefix_of: Callable[[int, int], Tensor] | None = None) -> Tensor:
        """The law after the processors, float32, shape [B, R, V]; arguments as in `scores`."""
        return self.scores(logits, prefix_of).softmax(dim=-1)

    def argmax(self, logits: Tensor, prefix_of: Callable[[int, int], Tensor] | None = None) -> Tensor:
        """The greedy tokens, shape [B, R]; arguments as in `scores`."""
        if self.is_plain_argmax(logits.dtype):
            return likeliest(logits)
        return self.scores(logits, prefix_of).argmax(dim=-1)

    def is_plain_argmax(self, dtype: torch.dtype) -> bool:
        """Whether the greedy token is the argmax of logits of this dtype as they are."""
        # `generate` compares float32 scores, also for a float64 model
        return self.greedy and not self.processors and dtype != torch.float64

    def sample(self, logits: Tensor, prefix_of: Callable[[int, int], Tensor] | None = None) -> Tensor:
        """Tokens drawn from the law, shape [B, R]; arguments as in `scores`.

        On a CPU a draw from what top-k keeps looks at the rest of the vocabulary only to find it.
        """
        kept = self._kept(logits)
        if kept is None:
            return sample_from(self.probs(logits, prefix_of), self.generator)
        scores, ids = kept
        return ids.gather(-1, sample_from(scores.softmax(dim=-1), self.generator)[..., None])[..., 0]

    def _kept(self, logits: Tensor) -> tuple[Tensor, Tensor] | None:
        """(processed scores, ids), each of shape [B, R, m], of all tokens that the law leaves; None for want of top-k.

        The processors see the m largest scores alone, which to them is the vocabulary: what they would find in the rest
        has score -inf after top-k.
        """
        place = self._top_k_place(self.processors, logits.shape[-1])
        if place is None or logits.device.type != "cpu":
            return None
        # behind top-k nothing that goes by the order of equal scores
        behind = self.processors[place + 1 :]
        if any(type(p) not in (MinPLogitsWarper, EpsilonLogitsWarper, EtaLogitsWarper) for p in behind):
            return None
        top_k = self.processors[place].top_k  # type: ignore[union-attr]
        m = top_k + _MANY_TIES
        scores, ids = largest(logits.float(), m)
        flat = scores.view(-1, m)
        no_ids = torch.empty(flat.shape[0], 0, dtype=torch.long)
        for number, processor in enumerate(self.processors):
            if number == place and bool((flat[:, top_k - 1] <= flat[:, -1]).any()):
                return None  # top-k keeps ties with its last score, and there may be more of them
            flat = processor(no_ids, flat)  # type: ignore[operator, arg-type]
        return flat.view_as(scores), ids

    def draw(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Drafts from the logits of mask rows, shape [B, R]: tokens, and the law q they were drawn from.

        Drafts are made with the warpers alone: any law is sound that verification is told of.
        Greedy decoding needs no q.
        """
        if self.greedy:
            return likeliest(logits), None
        # a CPU draws by a number that goes through the tokens in their order; a seed must bring what it always brought
        listed = None if logits.device.type == "cpu" else self._draw_listed(logits)
        if listed is not None:
            return listed
        q = self.probs(logits)
        return sample_from(q, self.generator), q

    def _draw_listed(self, logits: Tensor) -> tuple[Tensor, Tensor] | None:
        """`draw` from the tokens that top-k leaves, so that no row is sorted as a whole; None for want of top-k.

        Of more than `_MANY_TIES` tokens that tie with its last score some are left out, and top-p may cut among equal
        ones elsewhere. So it serves drafts, whose law is free, and not the target.
        """
        warpers = tuple(processor for processor in self.processors if type(processor) in _WARPERS)
        place = self._top_k_place(warpers, logits.shape[-1])
        if place is None:
            return None
        values, ids = largest(logits, warpers[place].top_k + _MANY_TIES)  # type: ignore[union-attr]
        law = self.probs(values)
        tokens = ids.gather(-1, sample_from(law, self.generator)[..., None])[..., 0]
        return tokens, torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, ids, law)

    @staticmethod
    def _top_k_place(processors: tuple[LogitsProcessor, ...], vocab_size: int) -> int | None:
        """Where top-k stands among processors, if it leaves a small part and all before it keep the order of scores."""
        place = next((i for i, p in enumerate(processors) if type(p) is TopKLogitsWarper), None)
        if place is None or 4 * (processors[place].top_k + _MANY_TIES) > vocab_size:  # type: ignore[union-attr]
            return None
        return place if all(type(p) is TemperatureLogitsWarper for p in processors[:place]) else None

    def _process_row(self, scores: Tensor, prefix: Tensor) -> Tensor:
        row, ids = scores[None], prefix[None]
        for processor in self.processors:
            row = processor(ids, row)  # type: ignore[operator]
        return row[0]


def likeliest(logits: Tensor) -> Tensor:
    """The argmax over the vocabulary, shape [...] for logits of shape [..., V]; of equal ones the first."""
    # a CPU looks through 16-bit numbers one by one, which for a large vocabulary takes as long as some layers
    is_slow = logits.device.type == "cpu" and logits.dtype in (torch.bfloat16, torch.float16)
    return (logits.float() if is_slow else logits).argmax(dim=-1)


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and ids of the k likeliest tokens, falling, each [..., k] for logits of shape [..., V], as `topk`'s are.

    A CPU's `topk` sorts its way through the whole vocabulary, where finding the chunks that hold the k largest maxima,
    and so all of the k largest numbers, is one sweep.
    """
    num_chunks, rest = divmod(logits.shape[-1], _CHUNK)
    if logits.device.type != "cpu" or num_chunks < 4 * k:
        return logits.topk(k, dim=-1)
    wide, end = logits.float() if logits.itemsize == 2 else logits, logits.shape[-1]
    chunks = wide[..., : num_chunks * _CHUNK].unflatten(-1, (num_chunks, _CHUNK)).amax(dim=-1).topk(k).indices
    ids = (chunks[..., None] * _CHUNK + torch.arange(_CHUNK)).flatten(-2)
    ids = torch.cat([ids, torch.arange(end - rest, end).expand(*ids.shape[:-1], rest)], dim=-1)
    ids = ids.gather(-1, wide.gather(-1, ids).topk(k).indices)
    return logits.gather(-1, ids), ids


def _exact(value: object) -> str:
    """Different for different settings; tensors print rounded."""
    return repr(value.tolist() if isinstance(value, Tensor) else value)
