"""What a step cannot be faster than: the bytes that it must read over the bandwidth of the device's memory.

The bandwidth is that of a plain copy, measured in the same run and counted as bytes read plus bytes written.
Knows modules and tensors, nothing of how steps are run.
"""

import statistics
import time
from dataclasses import dataclass
from functools import partial

import torch
from timing.clock import seconds_of
from torch import nn
from transformers import PreTrainedModel

from pardec.adapters.gated_lora import LoraWeights
from pardec.target.forward import embedding_weight

CUDA_COPY_BYTES = 2**30
# far more than the caches of a CPU hold
CPU_COPY_BYTES = 2**28
WARM_UP_SECONDS = 0.1


def copy_bandwidth(device: torch.device, *, num_bytes: int | None = None, repetitions: int = 10) -> float:
    """Bytes read plus bytes written per second by a copy from one buffer of the device to another; the median.

    Args:
        device: a CPU or a CUDA device.
        num_bytes: of each buffer; default far more than caches hold.
        repetitions: timed, after a tenth of a second that wakes the device up.
    """
    num_bytes = num_bytes or (CUDA_COPY_BYTES if device.type == "cuda" else CPU_COPY_BYTES)
    # random bits: memory may be faster on zeros
    source = torch.randint(-(2**62), 2**62, (num_bytes // 8,), device=device)
    copy = partial(torch.empty_like(source).copy_, source)
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_UP_SECONDS:
        seconds_of(copy, device)
    seconds = [seconds_of(copy, device) for _ in range(repetitions)]
    return 2 * source.nbytes / statistics.median(seconds)


def weight_bytes_per_step(base: nn.Module) -> int:
    """Bytes of the parameters that a step multiplies with, each read once.

    Tables of embeddings are left out, since a step reads a few of their rows; one that is tied to the head counts,
    as the head's. Every expert of a mixture counts, though a step may not read all.
    """
    read = {}
    for module in base.modules():
        if not isinstance(module, nn.Embedding):
            for parameter in module.parameters(recurse=False):
                read[id(parameter)] = parameter.nbytes  # not by its address, which shapes alone have not
    return sum(read.values())


def lora_bytes_per_step(lora: LoraWeights, dtype: torch.dtype) -> int:
    """Bytes of a LoRA in the dtype that steps hold it in."""
    return sum(tensor.numel() for tensor in lora.tensors.values()) * dtype.itemsize


@dataclass(frozen=True)
class StepBound:
    """The floor under the time of a step.

    Attributes:
        bytes_per_second: that memory moves.
        weight_bytes_per_step: read by every step.
        lora_bytes_per_step: read by every step whose mask rows have a LoRA.
        bytes_per_slot: keys and values of one committed token.
    """

    bytes_per_second: float
    weight_bytes_per_step: int
    lora_bytes_per_step: int
    bytes_per_slot: int

    def ms(self, committed_tokens: float, *, with_lora: bool) -> float:
        """Milliseconds to read the weights and the keys and values of the used context."""
        lora = self.lora_bytes_per_step if with_lora else 0
        read = self.weight_bytes_per_step + lora + self.bytes_per_slot * committed_tokens
        return 1000 * read / self.bytes_per_second


def flops_per_step(base: PreTrainedModel, num_rows: int, committed_tokens: float) -> float:
    """Floating-point operations of a step: two for each weight and row, and those of attention over the context.

    Rows that see each other, and a LoRA, are small beside these and are not counted.
    """
    weights = weight_bytes_per_step(base) / embedding_weight(base).element_size()
    config = base.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", 0)
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1))
    return num_rows * (2 * weights + 4 * width * config.num_hidden_layers * committed_tokens)
