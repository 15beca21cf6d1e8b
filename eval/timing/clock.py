"""How long work takes on a device, and how values spread."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of what `work` does: on CUDA by the device's clock, from when it gets there; on a CPU by the wall's."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile, interpolated between neighbours."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return float(low), float(median), float(high)
