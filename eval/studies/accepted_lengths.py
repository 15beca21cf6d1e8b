"""Expected accepted drafts of a block by exact sums, under both verifications, along texts that the target has sampled.

Where decoding counts a few accepted tokens, this sums their probabilities: two drafts, or two verifications, are told
apart by far fewer texts. Knows laws and tokens alone.
Legend: K num_speculative_tokens, V vocabulary; p is the target's law, q the draft's.
"""

import torch
from torch import Tensor


def accepted_lengths(p: Tensor, q: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Expected accepted drafts of each block by verification, `token` and `block`, shape [...] each, float64.

    With r_k = prod_{i<=k} q_i / p_i at the text's own tokens and a_k = min(r_0, .., r_k):
    token, sum_k (prod_{i<k} min(1, q_i / p_i)) sum_v min(p_k, q_k);
    block, sum_k sum_v min(a_{k-1} p_k, r_{k-1} q_k). Their means over texts sampled from p are exact, where each q_k
    may depend on the text before.

    Args:
        p: at each depth, given the text before, shape [..., K, V].
        q: likewise.
        tokens: of the text at these depths, shape [..., K].

    Source: arXiv:2211.17192 and arXiv:2403.10444; rewritten as expectations over the target's own texts.
    """
    p, q = p.double(), q.double()
    of_p, of_q = (law.gather(-1, tokens[..., None]).squeeze(-1) for law in (p, q))
    # a token that rounding has put behind top-k continues none of the target's texts
    ratio = torch.where(of_p > 0, of_q / of_p, 0.0)
    one = torch.ones_like(ratio[..., :1])
    kept = torch.cat([one, ratio[..., :-1].clamp_max(1)], dim=-1).cumprod(dim=-1)
    ratios = torch.cat([one, ratio[..., :-1]], dim=-1).cumprod(dim=-1)
    least = ratios.cummin(dim=-1).values
    return {
        "token": (kept * p.minimum(q).sum(dim=-1)).sum(dim=-1),
        "block": (least[..., None] * p).minimum(ratios[..., None] * q).sum(dim=(-2, -1)),
    }
