"""What draft logits are trained for, one number per mask row.

Legend: M mask rows, V vocabulary; p is the target's law, q the draft's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def draft_loss(objective: str, draft_logits: Tensor, target_logits: Tensor, target_ids: Tensor) -> Tensor:
    """Loss of every mask row, shape [M], float32.

    Args:
        objective: `kl`, KL(p || q) to the target's own law; `cross_entropy`, -log q of the data's token.
        draft_logits: shape [M, V].
        target_logits: of the real row that predicts the same token, shape [M, V], without gradient.
        target_ids: the data's tokens, shape [M].

    Raises:
        ValueError: for an unknown objective, naming the known ones.
    """
    if objective == "kl":
        draft, target = draft_logits.float(), target_logits.float()
        p = target.softmax(dim=-1)
        # KL = sum p (log p - log q), written so that the only large tensor with a gradient is the logits themselves
        negative_entropy = torch.linalg.vecdot(p, target) - target.logsumexp(dim=-1)
        return negative_entropy + draft.logsumexp(dim=-1) - torch.linalg.vecdot(p, draft)
    if objective == "cross_entropy":
        return F.cross_entropy(draft_logits.float(), target_ids, reduction="none")
    raise ValueError(f"objective: expected kl or cross_entropy, found {objective!r}")


@torch.no_grad()
def agreement(draft_logits: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
    """What the loss stands for, per mask row, shapes [M]: whether argmaxes agree, and sum of min(p, q).

    The second is the probability that a sampled draft is accepted, 1 - TV(p, q) (arXiv:2211.17192, Theorem 3.5).
    """
    p, q = target_logits.float().softmax(dim=-1), draft_logits.float().softmax(dim=-1)
    return (p.argmax(dim=-1) == q.argmax(dim=-1)).float(), torch.minimum(p, q).sum(dim=-1)
