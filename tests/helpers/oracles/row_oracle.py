"""What a row must give: plain forwards of the tokens that it sees."""

import torch

from pardec.target.cache import SlotCache
from pardec.target.forward import TargetModel


def committed(target: TargetModel, rows: list[list[int]], num_slots: int) -> SlotCache:
    """A cache that holds the rows' tokens, with what was run behind the shorter ones still in it."""
    cache = SlotCache(target.num_layers, num_slots, len(rows))
    width = max(map(len, rows))
    padded = torch.tensor([row + [7] * (width - len(row)) for row in rows])
    target.run(target.embed(padded), torch.arange(width).expand(len(rows), -1), None, cache)
    return cache


def logits_of(model, tokens: list[int], masks: torch.Tensor) -> torch.Tensor:
    """The oracle: a plain forward of real tokens and then mask tokens; the last row's logits."""
    embeds = model.get_input_embeddings()(torch.tensor([tokens]))
    embeds = torch.cat([embeds, masks[None]], dim=1)
    return model(inputs_embeds=embeds, use_cache=False).logits[0, -1]
