"""Optimiser steps of an adapter's training: learning rates, the update, and what is logged of it.

Legend: N anchors of a sequence, K num_speculative_tokens.
"""

import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_cosine_schedule_with_warmup

from pardec.training.module import METRICS, part_of
from pardec.training.running.processes import average_gradients


def build_optimizer(parameters: Mapping[str, Tensor], learning_rates: Mapping[str, float]) -> Optimizer:
    """AdamW with a learning rate for each part of what is learned; see `part_of`."""
    groups = [
        {"params": [p for name, p in parameters.items() if part_of(name) == part], "lr": rate}
        for part, rate in learning_rates.items()
    ]
    return AdamW([group for group in groups if group["params"]], weight_decay=0.0)


def make_schedule(optimizer: Optimizer, warmup_steps: int, steps: int, first_step: int) -> LRScheduler:
    """Linear warm-up and cosine decay, at the step where the run goes on."""
    schedule = get_cosine_schedule_with_warmup(optimizer, min(warmup_steps, steps // 2), steps)
    with warnings.catch_warnings():
        # the steps of the optimizer that torch misses were those of the run that is continued
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        for _ in range(first_step):
            schedule.step()
    return schedule


def depth_at(step: int, steps: int, growth: Sequence[int] | None) -> int | None:
    """How many mask tokens of each block step 1, 2, .., `steps` trains; None for all of them.

    Blocks grow while the drafts of their first tokens get better (Uno, arXiv:2609.04010).

    Args:
        step: which.
        steps: of the run.
        growth: numbers that rise to K, each for an equal share of the steps, the last step always K; None for K.
    """
    return growth[math.ceil(step * len(growth) / steps) - 1] if growth else None


@dataclass(frozen=True)
class Learner:
    """Updates what is learned.

    Attributes:
        accelerator: of the run.
        wrapped: the training module, wrapped for distribution, or as it is, which leaves gradients to `update`.
        parameters: what is learned, by name.
        optimizer: over them.
        schedule: of its learning rates.
        seed: of the run.
        anchors_per_forward: run so many of them at a time; None for all.
        max_grad_norm: gradients are clipped to this norm.
    """

    accelerator: Accelerator
    wrapped: nn.Module
    parameters: Mapping[str, Tensor]
    optimizer: Optimizer
    schedule: LRScheduler
    seed: int
    anchors_per_forward: int | None
    max_grad_norm: float

    def update(
        self, batches: Sequence[Mapping[str, Tensor]], step: int, *, max_depth: int | None = None, with_metrics: bool
    ) -> tuple[Tensor, float]:
        """One step; losses are summed over every target of it, and gradients divided by their global number.

        So neither accumulation nor the number of processes changes the update.

        Args:
            batches: of this process, each with N anchors per sequence.
            step: 1, 2, ...
            max_depth: mask tokens of a block, see `depth_at`; default K.
            with_metrics: compute those that cost time too.

        Returns:
            sums over the step, shape [9, K]: those of `METRICS` per position, 0 without metrics, and below them loss
            and rows of all; the gradient's norm before it was clipped.

        Raises:
            ValueError: if the loss is not finite.
        """
        accelerator = self.accelerator
        # noise at mask rows is drawn anew in every step and process, and again where a run is continued
        torch.manual_seed((self.seed * 1_000_003 + step) * accelerator.num_processes + accelerator.process_index)
        # each batch by its own number of anchors
        parts = [(batch, self.anchors_per_forward or batch["anchors"].shape[1]) for batch in batches]
        chunks = [(batch, first, part) for batch, part in parts for first in range(0, batch["anchors"].shape[1], part)]
        totals: Tensor | float = 0.0
        for index, (batch, first, part) in enumerate(chunks):
            is_last = index == len(chunks) - 1
            with nullcontext() if is_last else accelerator.no_sync(self.wrapped):
                which = {"first_anchor": first, "num_anchors": part, "max_depth": max_depth}
                loss_sum, count, metrics = self.wrapped(**batch, **which, with_metrics=with_metrics)
                accelerator.backward(loss_sum)
            of_all = torch.stack([loss_sum.detach(), count.to(loss_sum.dtype)])[:, None].expand(-1, metrics.shape[1])
            totals = totals + torch.cat([metrics if with_metrics else torch.zeros_like(metrics), of_all])
        sums = cast(Tensor, accelerator.reduce(totals, "sum"))  # type: ignore[arg-type]
        if not isinstance(self.wrapped, DistributedDataParallel):
            average_gradients(accelerator, self.parameters.values())
        for parameter in self.parameters.values():
            if parameter.grad is not None:  # which is the mean over processes
                parameter.grad *= accelerator.num_processes / sums[-1, 0].clamp_min(1)
        rates = "train.learning_rate or train.lora_learning_rate; the best adapter so far is kept"
        loss, parameters = mean_loss(sums), self.parameters.values()
        norm = apply_gradients(parameters, [self.optimizer], self.max_grad_norm, step, loss, rates)
        self.schedule.step()
        return sums, norm


def mean_loss(sums: Tensor) -> float:
    """Loss per mask row that has a target, from sums of `Learner.update`."""
    return float(sums[-2, 0] / sums[-1, 0].clamp_min(1))


def apply_gradients(
    parameters: Iterable[Tensor], optimizers: Sequence[Optimizer], max_norm: float, step: int, loss: float, rates: str
) -> float:
    """Clips the gradients and updates by them; returns their norm from before. `rates` is what a user may lower.

    Raises:
        ValueError: if loss or norm is not finite, which would spoil every number.
    """
    norm = float(nn.utils.clip_grad_norm_(parameters, max_norm))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise ValueError(
            f"step {step}: expected a finite loss, found loss {loss} and gradient norm {norm}; lower {rates}"
        )
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return norm


def cpu_minutes(before: float, num_processes: int = 1) -> float:
    """Minutes of processor time: `before`, of the run that this one goes on from, and those of all processes.

    They do the same work, so that nobody is asked: each counts for as much as this one.
    """
    return before + num_processes * time.process_time() / 60


def losses_of(sums: Tensor, norm: float, learning_rate: float | Tensor, minutes: float) -> dict[str, Any]:
    """What is logged: loss, and teacher-forced agreement and overlap per position.

    Args:
        sums: of `Learner.update`, over the steps since the last time.
        norm: of the last step's gradient.
        learning_rate: of the mask embeddings.
        minutes: of processor time since the run began.
    """
    rows: dict[str, Tensor] = dict(zip(METRICS, sums[:-2], strict=True))
    values = {"loss": mean_loss(sums), "gradient_norm": norm, "learning_rate": learning_rate, "cpu_minutes": minutes}
    names = {"argmax_agreement": "agreement", "overlap": "overlap"}
    if bool(rows["head_overlap"].any()):
        names |= {"head_argmax_agreement": "head_agreement", "head_overlap": "head_overlap"}
    return values | {name: (rows[metric] / rows["rows"].clamp_min(1)).tolist() for name, metric in names.items()}
