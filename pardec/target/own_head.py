"""A model in two halves, to make logits of a few rows at a time: hidden states by its body, logits by the rest.

Models scale, shift and cap logits in their own forward. So that forward makes them, with the body's place taken by
hidden states that are there already. Knows no layout and no adapter.
Legend: B sequences, R rows, H width of hidden states, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from pardec.target.forward import TargetModel, UnsupportedModelError
from pardec.target.prefix_cache import PrefixCache
from pardec.target.survey import agree


@dataclass(frozen=True)
class OwnHead:
    """A target whose logits are made apart from its hidden states.

    Attributes:
        target: the model.
        body: the module inside it that gives hidden states.
        output: the class of what it gives; families have their own.
    """

    target: TargetModel
    body: nn.Module
    output: type[ModelOutput]

    @classmethod
    def of(cls, target: TargetModel) -> "OwnHead":
        """Finds the body, by what the model's own forward calls.

        Raises:
            UnsupportedModelError: if there is none, or logits made of its hidden states are not the model's own.
        """
        ids = torch.arange(3, device=target.device)[None] % target.vocab_size
        with torch.no_grad():
            found, expected = _observed(target, ids)
            for body, output in found:
                head = cls(target, body, output)
                if _gives(head, ids, expected):
                    return head
        raise UnsupportedModelError(
            f"base: expected logits that its own forward makes of hidden states alone, found a "
            f"{type(target.base).__name__} whose are not"
        )

    def hidden(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | Mapping[str, Tensor] | None,
        cache: Cache,
    ) -> Tensor:
        """Hidden states of all rows, shape [B, R, H]; arguments as of `TargetModel.run`."""
        return self.body(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        ).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, shape [n, V] of [n, H]."""
        rows = hidden[None]
        own = vars(self.body).get("forward")
        # on the instance, so that hooks of the module, which offloading and sharding live by, still run
        self.body.forward = lambda *args, **options: self.output(last_hidden_state=rows)  # type: ignore[arg-type]
        try:
            return self.target.base(inputs_embeds=rows, use_cache=False, return_dict=True).logits[0]
        finally:
            if own is None:
                del self.body.forward
            else:
                self.body.forward = own

    @contextmanager
    def cast_once(self) -> Iterator[None]:
        """Under autocast the frozen output matrix is cast here, and not again for all logits that are made inside."""
        head, dtype = self.target.base.get_output_embeddings(), autocast_dtype(self.target.device)
        if not isinstance(head, nn.Linear) or head.weight.requires_grad or dtype is None:
            yield
            return
        weight = head.weight
        head.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        try:
            yield
        finally:
            head.weight = weight


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What matrices are multiplied in under the autocast that is on; None without one, as always on `meta`."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _observed(target: TargetModel, ids: Tensor) -> tuple[list[tuple[nn.Module, type[ModelOutput]]], Tensor]:
    """Modules inside the model that give hidden states in a forward, outermost first; logits of that forward."""
    found: list[tuple[nn.Module, type[ModelOutput]]] = []

    def see(module: nn.Module, args: tuple, output: object) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        if module is not target.base and isinstance(output, ModelOutput) and isinstance(hidden, Tensor):
            found.append((module, type(output)))

    handles = [module.register_forward_hook(see) for module in target.base.modules()]
    try:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        embeds = target.embed(ids)
        cache = PrefixCache(target.num_layers)
        logits = target.base(
            inputs_embeds=embeds, position_ids=positions, past_key_values=cache, use_cache=True, return_dict=True
        ).logits
    finally:
        for handle in handles:
            handle.remove()
    return found[::-1], logits  # modules end from the inside out


def _gives(head: OwnHead, ids: Tensor, expected: Tensor) -> bool:
    target = head.target
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    try:
        hidden = head.hidden(target.embed(ids), positions, None, PrefixCache(target.num_layers))
        found = head.logits(hidden[0])
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError, KeyError):
        return False
    return found.shape == expected[0].shape and agree(found, expected[0], target.dtype)
