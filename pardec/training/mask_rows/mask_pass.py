"""The pass over the mask rows of a training step: their hidden states, with gradient, against the cached real tokens.

Some layers may keep nothing but their input for the gradient and run a second time in the backward, which is when
memory is traded for time; what holds in the forward holds there again.
Knows neither loss nor law. Legend: B sequences, M mask rows, D width of embeddings, H of hidden states.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from pardec.layout import TrainingLayout
from pardec.target.own_head import OwnHead
from pardec.target.prefix_cache import PrefixCache
from pardec.training.mask_rows.block_attention import BlockRoute
from pardec.training.mask_rows.lora_linear import fused_loras
from pardec.training.peft_lora import lora_enabled

# of sdpa, where there are gradients: the backward of cuDNN's gives NaN for some numbers of keys, pytorch issue 196678
ATTENTION_KERNELS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
    SDPBackend.OVERRIDEABLE,
]


@dataclass
class MaskPass:
    """How mask rows of a model run.

    Attributes:
        own_head: of the model.
        has_lora: it has a LoRA injected, which is on for these rows.
        takes_blocks: they attend by `block_attention`.
        run_twice: layers whose activations are made again in the backward instead of being kept.
    """

    own_head: OwnHead
    has_lora: bool
    takes_blocks: bool
    run_twice: Sequence[nn.Module] = ()

    def hidden(self, inputs: Tensor, layout: TrainingLayout, on_host: TrainingLayout, cache: PrefixCache) -> Tensor:
        """Hidden states, shape [B, M, H].

        Args:
            inputs: embeddings of the mask rows, shape [B, M, D].
            layout: of the mask rows, on their device.
            on_host: the same where the host can read it.
            cache: with the real tokens.
        """
        target, B = self.own_head.target, len(inputs)
        positions, route = target.clamp_positions(layout.positions), None
        if self.takes_blocks:
            route = BlockRoute.of(target, layout, on_host, cache)
            mask = route.mask
        else:
            real = torch.arange(layout.num_tokens, device=positions.device).expand(B, -1)
            mask = target.attention.render(layout.visible, positions, torch.cat([real, positions], dim=1), target.dtype)
        with self._holding(target.base, route), self._keeping_less(route):
            return self.own_head.hidden(inputs, positions, mask, cache)

    @contextmanager
    def _holding(self, part: nn.Module, route: BlockRoute | None) -> Iterator[None]:
        """What holds while a part of the model runs on mask rows, in the forward and when it is run again."""
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(ATTENTION_KERNELS))
            if route is not None:
                stack.enter_context(route.on(self.own_head.target))
            if self.has_lora:
                stack.enter_context(lora_enabled(part))
                stack.enter_context(fused_loras(part))
            yield

    @contextmanager
    def _keeping_less(self, route: BlockRoute | None) -> Iterator[None]:
        """Layers that run twice are checkpointed inside, from within their hooks, by which sharded ones are there."""
        layers = self.run_twice if torch.is_grad_enabled() else ()
        before = [vars(layer).get("forward") for layer in layers]
        for layer in layers:
            again = partial(_contexts, self._holding, layer, route)
            # no random number is drawn in a layer: a frozen model has no dropout, and PEFT's is off
            options = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": again}
            vars(layer)["forward"] = partial(checkpoint, layer.forward, **options)
        try:
            yield
        finally:
            for layer, forward in zip(layers, before, strict=True):
                if forward is None:
                    del vars(layer)["forward"]
                else:
                    vars(layer)["forward"] = forward


def _contexts(holding, layer: nn.Module, route: BlockRoute | None):
    """Those of a checkpointed layer: of its forward, where everything holds already, and of its second run."""
    return nullcontext(), holding(layer, route)


def spread(layers: Sequence[nn.Module], share: float) -> list[nn.Module]:
    """A share of the layers, as evenly as can be."""
    wanted = [int(index * share + 1e-9) for index in range(len(layers) + 1)]
    return [layer for index, layer in enumerate(layers) if wanted[index + 1] > wanted[index]]
