"""Turns what was recorded of a study's variants into rows of figures, each compared with the first.

Knows records, no models and no tables.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from studies.study import Budget, Study, Variant
from studies.variant_runs import base_of, is_trained, measured, read_record, view_settings

from pardec.measures.acceptance import BOOTSTRAP_SAMPLES

Pairs = Sequence[tuple[int, int]]
# figures whose difference to the first row is given, and where their pairs lie
COMPARED = {"sampled": ("sampled", "pairs"), "outside_repetition": ("greedy", "outside_pairs")}
_SPENT = {"minutes": "seconds", "cpu_minutes": "cpu_seconds"}
DONE, FAILED, NOT_RUN = "done", "failed", "not run"
BEST, LEVEL = "best", "level"


def paired_difference(pairs: Pairs, baseline: Pairs) -> dict[str, Any] | None:
    """Difference of two mean acceptance lengths on the same prompts, with its bootstrap 95 % interval.

    Both lengths, 1 + sum of accepted / sum of drafts, are taken over the same resampled prompts: what makes a prompt
    easy or hard for both cancels out.

    Args:
        pairs: (accepted tokens, drafts) of each prompt.
        baseline: what is subtracted, of the same prompts in the same order.

    Returns:
        `value` and `interval`; None where one of the two has no drafts.
    """
    both = np.array([pairs, baseline], dtype=np.float64)  # [2, prompts, (accepted, drafts)]
    if both[..., 1].sum(axis=1).min() == 0:
        return None
    num_prompts = both.shape[1]
    draws = np.random.default_rng(0).integers(num_prompts, size=(BOOTSTRAP_SAMPLES, num_prompts))
    low, high = np.percentile(_difference(both[:, draws].sum(axis=2)), [2.5, 97.5])
    value = _difference(both.sum(axis=1))
    return {"value": round(float(value), 4), "interval": [round(float(low), 4), round(float(high), 4)]}


def _difference(sums: np.ndarray) -> np.ndarray:
    """Of sums of shape [2, ..., 2]."""
    lengths = sums[..., 0] / np.maximum(sums[..., 1], 1)
    return lengths[0] - lengths[1]


def rows_of(
    study: Study,
    work: Path,
    prompts: Mapping[str, Sequence[list[int]]],
    device: torch.device,
    failures: Mapping[str, str],
) -> list[dict[str, Any]]:
    """A row for each view of each variant, in the order of the file.

    Args:
        study: see `Study`.
        work: its folder.
        prompts: by name of the base.
        device: that views were measured on.
        failures: by name of the variant, why it could not be evaluated.
    """
    rows, first, reasons = [], None, dict(failures)
    for variant in study.variants:
        record = read_record(variant, work)
        of_training = training_columns(variant, record, study.budget)
        for view in variant.views:
            figures = None
            if is_trained(record, variant, work):
                try:
                    asked = view_settings(variant, view, work, study.evaluation, prompts[base_of(variant)], device)
                    figures = measured(record, asked)
                except (ValueError, OSError) as error:  # an adapter that cannot be read
                    reasons.setdefault(variant.name, f"error: {error}")
            reason = None if figures else record.get("training", {}).get("reason") or reasons.get(variant.name)
            status = DONE if figures else FAILED if reason else NOT_RUN
            row = of_training | {"view": view.label(), "status": status, "reason": reason}
            rows.append(row | compared(figures, first))
            if len(rows) == 1:
                first = figures
    mark(rows)
    return rows


def training_columns(variant: Variant, record: Mapping[str, Any], budget: Budget) -> dict[str, Any]:
    """What a variant is and what its training took."""
    training = record.get("training", {})
    spent = {name: training[seconds] / 60 for name, seconds in _SPENT.items() if seconds in training}
    limits = {name: limit for name, limit in budget.model_dump().items() if limit is not None}
    within = None if not (spent and limits) else all(spent[name] <= limit for name, limit in limits.items())
    facts = {name: training.get(name) for name in ("steps", "best_step", "mask_rows_per_step", "final_loss")}
    return {
        "variant": variant.name,
        "differs": variant.differs,
        "command": training.get("command"),
        **{name: round(spent[name], 2) if name in spent else None for name in _SPENT},
        "within_budget": within,
        **facts,
    }


def compared(figures: Mapping[str, Any] | None, baseline: Mapping[str, Any] | None) -> dict[str, Any]:
    """Figures of a row without those of each prompt, and their differences to the first row's, if there are any."""
    if figures is None:
        return {}
    row: dict[str, Any] = {"num_speculative_tokens": figures["num_speculative_tokens"]}
    for law in ("sampled", "greedy"):
        row[law] = {name: value for name, value in figures[law].items() if not name.endswith("pairs")}
    row["difference"] = dict.fromkeys(COMPARED)
    if baseline is not None and baseline["settings"]["prompts"] == figures["settings"]["prompts"]:
        for name, (law, pairs) in COMPARED.items():
            row["difference"][name] = paired_difference(figures[law][pairs], baseline[law][pairs])
    return row | {"git_commit": figures["git_commit"]}


def mark(rows: Sequence[dict[str, Any]]) -> None:
    """Marks the row that is best when sampled, and those that lie within its interval."""
    done = [row for row in rows if row["status"] == DONE]
    best = max(done, key=lambda row: row["sampled"]["mean_acceptance_length"], default=None)
    for row in rows:
        row["mark"] = None
        if best is not None and row["status"] == DONE:
            is_level = row["sampled"]["mean_acceptance_length"] >= best["sampled"]["interval"][0]
            row["mark"] = BEST if row is best else LEVEL if is_level else None
