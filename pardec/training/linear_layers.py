"""Which layers of a base can hold a LoRA that acts on chosen rows: linear ones that read every row of a forward.

Experts read the rows that are routed to them, heads the rows whose logits are kept, layers behind a cache of latent
keys and values all that is cached. Names tell none of this, so it is observed. Legend: B sequences, R rows.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pardec.target.forward import TargetModel
from pardec.target.prefix_cache import PrefixCache

# no two of B R, R, B times prefix and R + prefix are the same
_B, _R, _PREFIX = 2, 29, 3


def linear_layers(base: PreTrainedModel) -> dict[str, bool]:
    """By name, for every linear layer but the output head: whether it reads every row of a forward, and no other.

    One that does not run, as in the tower for images of a model that is given text, is taken for one that does unless
    others in its place, say other experts, show that it does not.
    """
    head = base.get_output_embeddings()
    layers = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}
    target, generator = TargetModel.wrap(base), torch.Generator().manual_seed(0)
    ids = torch.randint(target.vocab_size, (_B, _PREFIX + _R), generator=generator).to(target.device)
    positions = target.clamp_positions(torch.arange(_PREFIX + _R, device=target.device).expand_as(ids))
    embeds, cache = target.embed(ids), PrefixCache(target.num_layers)
    first = ids.new_zeros(1)
    with torch.no_grad():
        target.run(embeds[:, :_PREFIX], positions[:, :_PREFIX], None, cache, logits_to_keep=first)
        with _observed(layers) as reads_rows:
            target.run(embeds[:, _PREFIX:], positions[:, _PREFIX:], None, cache, logits_to_keep=first)
    places_of_others = {_place(name) for name, found in reads_rows.items() if not found}
    return {name: reads_rows.get(name, _place(name) not in places_of_others) for name in layers}


def _place(name: str) -> str:
    """A name without the numbers of layers and experts."""
    return re.sub(r"\d+", "*", name)


@contextmanager
def _observed(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, bool]]:
    """By name of the layers that run inside, whether all its runs read B sequences of R rows."""
    found: dict[str, bool] = {}

    def observe(name: str):
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            x = args[0] if args else None
            reads_rows = isinstance(x, Tensor) and isinstance(output, Tensor) and x.shape[:-1] in ((_B, _R), (_B * _R,))
            found[name] = reads_rows and found.get(name, True)

        return hook

    handles = [module.register_forward_hook(observe(name)) for name, module in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
