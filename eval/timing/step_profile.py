"""What the device does in a step, from a trace of torch's profiler: graph launches, copies, kernels, idle time.

Reads the events of a Chrome trace; `summarise` needs no device.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

NUM_TOP_KERNELS = 8


def profile_steps(advance: Callable[[int], None], num_steps: int) -> dict[str, Any]:
    """The summary of `num_steps` steps that `advance` runs on CUDA, all work before and after them done."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as traced:
        advance(num_steps)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        traced.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return summarise(events, num_steps)


def summarise(events: Iterable[dict[str, Any]], num_steps: int) -> dict[str, Any]:
    """Counts and milliseconds per step.

    Args:
        events: of a Chrome trace; `ts` and `dur` are microseconds.
        num_steps: that they cover.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    calls = [event["name"] for event in complete if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    kernels = [event for event in complete if event.get("cat") == "kernel"]
    copies = [event for event in complete if event.get("cat") == "gpu_memcpy"]
    to_host = [event for event in copies if "DtoH" in event["name"]]
    on_device = [*kernels, *copies, *(event for event in complete if event.get("cat") == "gpu_memset")]
    busy, wall = _busy_and_wall([(event["ts"], event["ts"] + event["dur"]) for event in on_device])
    kernel_us = sum(event["dur"] for event in kernels)
    return {
        "num_steps": num_steps,
        "graph_launches_per_step": sum("GraphLaunch" in name for name in calls) / num_steps,
        "kernel_launches_by_host_per_step": sum("LaunchKernel" in name for name in calls) / num_steps,
        "copies_to_host_per_step": len(to_host) / num_steps,
        "bytes_to_host_per_step": sum(event.get("args", {}).get("bytes", 0) for event in to_host) / num_steps,
        "copies_to_device_per_step": sum("HtoD" in event["name"] for event in copies) / num_steps,
        "kernels_per_step": len(kernels) / num_steps,
        "kernel_ms_per_step": kernel_us / 1000 / num_steps,
        "wall_ms_per_step": wall / 1000 / num_steps,
        "busy_share": busy / wall if wall else 0.0,
        "top_kernels": _top_kernels(kernels, num_steps),
    }


def _busy_and_wall(spans: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Time that at least one span covers, and from the first beginning to the last end."""
    if not spans:
        return 0.0, 0.0
    busy, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        busy += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return busy, reached - min(begin for begin, _ in spans)


def _top_kernels(kernels: Sequence[dict[str, Any]], num_steps: int) -> list[dict[str, Any]]:
    microseconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in kernels:
        microseconds[event["name"]] += event["dur"]
        calls[event["name"]] += 1
    return [
        {"name": name[:100], "ms_per_step": us / 1000 / num_steps, "calls_per_step": calls[name] / num_steps}
        for name, us in microseconds.most_common(NUM_TOP_KERNELS)
    ]
