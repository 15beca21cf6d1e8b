"""What draft logits are trained for, one number per mask row, and how much each row counts.

Knows no model and no layout.
Legend: M mask rows, N blocks, K mask tokens of a block, V vocabulary; p is the target's law, q the draft's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pardec.training.kl import entropies, kl_and_acceptance
from pardec.training.overlap import overlap_and_likelihood

ROW_OBJECTIVES = ("kl", "cross_entropy", "cross_entropy_argmax", "tv", "cross_entropy_tv", "lk", "lk_hybrid")
ACCEPTED_LENGTH = "accepted_length"  # of a whole block, see `expected_accepted_length`
OBJECTIVES = (*ROW_OBJECTIVES, ACCEPTED_LENGTH)
WEIGHT_RULES = ("expected_length", "prefix_product")
# how fast the hybrid turns from KL to TV as acceptance rises
_HYBRID_RATE = 3.0
_SHARE_OF_CROSS_ENTROPY = 0.1  # of cross_entropy_tv


@torch.no_grad()
def target_law(target_logits: Tensor, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
    """p, float32, shape [M, V]: the law that drafts are trained to follow.

    Args:
        target_logits: shape [M, V].
        temperature: of the law; drafts are to be compared at the same.
        top_k: only so many of the likeliest tokens keep their probability; None for all.
    """
    scores = target_logits.float() / temperature
    if top_k is not None and top_k < scores.shape[-1]:
        least = scores.topk(top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    return scores.softmax(dim=-1)


def draft_loss(
    objective: str, draft_logits: Tensor, target_probs: Tensor, target_ids: Tensor, temperature: float = 1.0
) -> Tensor:
    """Loss of every mask row, shape [M], float32.

    Args:
        objective: `kl`, KL(p || q) to the target's own law; `cross_entropy`, -log q of the data's token;
            `cross_entropy_argmax`, -log q of the target's likeliest token; `tv`, 1 - the probability sum min(p, q)
            that a draft from q is accepted, which is the total variation of p and q (as in Uno, arXiv:2609.04010);
            `cross_entropy_tv`, .1 cross_entropy + .9 tv (DSpark, arXiv:2607.05147);
            `lk`, -log of that probability; `lk_hybrid`, lambda KL + (1 - lambda) TV, where lambda falls from 1 as it
            rises (both of LK losses, arXiv:2602.23881).
        draft_logits: shape [M, V].
        target_probs: p of the real row that predicts the same token, shape [M, V], float32, without gradient.
        target_ids: the data's tokens, shape [M].
        temperature: q is the softmax of the logits / temperature.

    Raises:
        ValueError: for an unknown objective, or one of whole blocks, naming the known ones.
    """
    if objective == "cross_entropy":
        return F.cross_entropy(draft_logits.float() / temperature, target_ids, reduction="none")
    if objective == "cross_entropy_argmax":
        return F.cross_entropy(draft_logits.float() / temperature, target_probs.argmax(dim=-1), reduction="none")
    if objective == "kl":
        return kl_and_acceptance(draft_logits, target_probs, entropies(target_probs), temperature)[0]
    if objective not in ROW_OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(ROW_OBJECTIVES)}, found {objective!r}")
    overlap, likelihood = overlap_and_likelihood(draft_logits, target_probs, target_ids, temperature)
    if objective == "tv":
        return 1 - overlap
    if objective == "cross_entropy_tv":
        return (1 - _SHARE_OF_CROSS_ENTROPY) * (1 - overlap) - _SHARE_OF_CROSS_ENTROPY * likelihood
    if objective == "lk":
        return -overlap.clamp_min(torch.finfo(torch.float32).tiny).log()
    share = torch.exp(-_HYBRID_RATE * overlap.detach())
    kl, _ = kl_and_acceptance(draft_logits, target_probs, entropies(target_probs), temperature)
    return share * kl + (1 - share) * (1 - overlap)


def expected_accepted_length(overlap: Tensor, kept: Tensor) -> Tensor:
    """Expected number of accepted drafts of a block whose drafts are verified one by one, shape [...].

    E = sum_k (prod_{i<k} min(1, q_i / p_i)) sum_v min(p_k, q_k), the ratios at the tokens of a text. Its mean over
    texts that the target samples is exact, also where drafts do not know the tokens before them.

    Args:
        overlap: sum_v min(p_k, q_k) at each depth, shape [..., K]; 0 where a block has no such depth.
        kept: min(1, q_k / p_k) at the text's own token there, shape [..., K].
    """
    before = torch.cat([torch.ones_like(kept[..., :1]), kept[..., :-1].cumprod(dim=-1)], dim=-1)
    return (before * overlap).sum(dim=-1)


def acceptance_probability(draft_logits: Tensor, target_probs: Tensor) -> Tensor:
    """Probability that a draft drawn from q is accepted, shape [M]: sum of min(p, q) = 1 - TV(p, q).

    Source: arXiv:2211.17192, Theorem 3.5.
    """
    return torch.minimum(draft_logits.float().softmax(dim=-1), target_probs).sum(dim=-1)


@torch.no_grad()
def argmax_agreement(draft_logits: Tensor, target_probs: Tensor) -> Tensor:
    """Whether the likeliest tokens of draft and target are the same, shape [M], 0 or 1."""
    return (draft_logits.argmax(dim=-1) == target_probs.argmax(dim=-1)).float()


@torch.no_grad()
def acceptance_weights(rule: str, accepted: Tensor) -> Tensor:
    """Weights that follow how far a draft is expected to be accepted, shape [..., N, K], without gradient.

    With a_j the probability that the token at depth j is accepted once those before it are:
    `prefix_product`, the probability that depth i is reached, prod_{j<i} a_j (PARD-2, arXiv:2605.08632);
    `expected_length`, sum_{m>=i} prod_{j<=m} a_j (D-PACE, arXiv:2605.18810): with -log a_i as the loss, the
    gradient is that of the expected number of accepted tokens.

    Args:
        rule: one of these.
        accepted: a, shape [..., N, K]; 0 where a block has no such depth.

    Raises:
        ValueError: for an unknown rule, naming the known ones.
    """
    reached = accepted.cumprod(dim=-1)
    if rule == "prefix_product":
        return torch.cat([torch.ones_like(reached[..., :1]), reached[..., :-1]], dim=-1)
    if rule == "expected_length":
        return reached.flip(-1).cumsum(dim=-1).flip(-1)
    raise ValueError(f"position_weights: expected numbers or one of {', '.join(WEIGHT_RULES)}, found {rule!r}")
