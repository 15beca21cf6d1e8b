"""What draft logits are trained for, one number per mask row, and how much each row counts.

Knows no model and no layout.
Legend: M mask rows, N blocks, K mask tokens of a block, V vocabulary; p is the target's law, q the draft's.
"""

import torch
from torch import Tensor

from pardec.training.comparison import Comparison, TargetLaw

ROW_OBJECTIVES = ("kl", "cross_entropy", "cross_entropy_argmax", "tv", "cross_entropy_tv", "lk", "lk_hybrid")
ACCEPTED_LENGTH = "accepted_length"  # of a whole block, see `expected_accepted_length`
OBJECTIVES = (*ROW_OBJECTIVES, ACCEPTED_LENGTH)
WEIGHT_RULES = ("expected_length", "prefix_product")
# how fast the hybrid turns from KL to TV as acceptance rises
_HYBRID_RATE = 3.0
_SHARE_OF_CROSS_ENTROPY = 0.1  # of cross_entropy_tv


def draft_loss(objective: str, found: Comparison) -> Tensor:
    """Loss of every mask row, shape [M], float32.

    Args:
        objective: `kl`, KL(p || q) to the target's own law; `cross_entropy`, -log q of the data's token;
            `cross_entropy_argmax`, -log q of the target's likeliest token; `tv`, 1 - the probability sum min(p, q)
            that a draft from q is accepted, which is the total variation of p and q (as in Uno, arXiv:2609.04010);
            `cross_entropy_tv`, .1 cross_entropy + .9 tv (DSpark, arXiv:2607.05147);
            `lk`, -log of that probability; `lk_hybrid`, lambda KL + (1 - lambda) TV, where lambda falls from 1 as it
            rises (both of LK losses, arXiv:2602.23881).
        found: of these rows, with the log-likelihood of the tokens of `learned_tokens`.

    Raises:
        ValueError: for an unknown objective, or one of whole blocks, naming the known ones.
    """
    if objective in ("cross_entropy", "cross_entropy_argmax"):
        return -found.log_likelihood
    if objective == "kl":
        return found.kl
    if objective == "tv":
        return 1 - found.overlap
    if objective == "cross_entropy_tv":
        return (1 - _SHARE_OF_CROSS_ENTROPY) * (1 - found.overlap) - _SHARE_OF_CROSS_ENTROPY * found.log_likelihood
    if objective == "lk":
        return -found.overlap.clamp_min(torch.finfo(torch.float32).tiny).log()
    if objective == "lk_hybrid":
        share = torch.exp(-_HYBRID_RATE * found.overlap.detach())
        return share * found.kl + (1 - share) * (1 - found.overlap)
    raise ValueError(f"objective: expected one of {', '.join(ROW_OBJECTIVES)}, found {objective!r}")


def learned_tokens(objective: str, law: TargetLaw, ids: Tensor) -> Tensor:
    """Whose log-likelihood the objective looks at, shape [M]: the target's likeliest token, or the data's own."""
    if not learns_likeliest(objective):
        return ids
    assert law.likeliest is not None
    return law.likeliest


def learns_likeliest(objective: str) -> bool:
    """Whether the objective looks at the target's likeliest token."""
    return objective == "cross_entropy_argmax"


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
