"""Gradients of drawn anchors beside those of all: figures are what their definitions say, and the page is written."""

import json
from types import SimpleNamespace

import drawing
import numpy as np
import pytest
import torch
from data_samples import write_jsonl
from programs import run

from pardec.data.tokenising import Document


@pytest.fixture
def marked(tmp_path):
    """Texts of 30 tokens, a third of whose anchors are marked."""
    draw = np.random.default_rng(0)
    rows = [
        {"input_ids": draw.integers(5, 4000, 30).tolist(), "loss_mask": [0] * 6 + [1] * 24, "marked": [0, 0, 1] * 10}
        for _ in range(4)
    ]
    return write_jsonl(tmp_path / "marked.jsonl", rows)


def test_a_page_tells_how_far_each_way_to_draw_is_from_all_anchors(marked, adapters, tmp_path):
    few = ("--num-texts", 3, "--draws", 2, "--num-anchors", 8, "--output", tmp_path / "found")
    ended = run(drawing.main, adapters / "lora", marked, *few)
    assert ended.code == 0, ended.err[-2000:]
    rows = {row["draws"]: row for row in ended.result["rows"]}
    assert set(rows) == {drawing.EVEN, drawing.MARKED, drawing.CORRECTED}
    assert rows[drawing.EVEN]["of_even"] == {"value": 1.0, "interval": [1.0, 1.0]}
    assert all(row["squared_error"]["value"] > 0 for row in rows.values())
    assert json.loads((tmp_path / "found.json").read_text()) == ended.result
    assert (tmp_path / "found.md").read_text().count("\n| ") == 5
    refused = run(drawing.main, adapters / "lora", marked, "--num-texts", 9, "--num-anchors", 8).error
    assert refused.endswith("expected 9 texts to draw from, found 4")
    assert run(drawing.main, adapters / "lora", marked, "--draws", 1).error.endswith("found 1")


def test_errors_and_bias_are_those_of_gradients_that_are_known(monkeypatch):
    """Every anchor's gradient is a number of its own: means over anchors, and draws of them, can be written down."""
    values = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    marks = np.arange(40) % 4 == 0
    values[torch.from_numpy(marks)] += 2  # what is marked has another mean: even draws and those of marks differ

    def known(_, text, anchors, weights):
        one = values[anchors] if weights is None else values[anchors] * weights
        return one.mean()[None]

    monkeypatch.setattr(drawing, "gradient", known)
    text = Document(np.arange(40, dtype=np.int32), np.ones(40, dtype=bool), marked=marks)
    args = SimpleNamespace(draws=3000, num_anchors=8, times=4.0)
    found = drawing.errors_of(None, text, args, torch.Generator().manual_seed(1))
    useful, is_marked = values[:38], torch.from_numpy(marks)[:38]
    full = useful.mean()
    assert found.figures["norm"] == pytest.approx(float(full) ** 2)
    of_mean = float(useful.var(unbiased=True)) / 8 * (1 - 8 / 38)  # without replacement
    assert found.figures[drawing.EVEN][0] == pytest.approx(of_mean, rel=0.1)
    assert found.figures[drawing.EVEN][1] == pytest.approx(0, abs=of_mean / 100)
    share = 4 * 10 / (4 * 10 + 28)
    biased = share * useful[is_marked].mean() + (1 - share) * useful[~is_marked].mean() - full
    assert found.figures[drawing.MARKED][1] == pytest.approx(float(biased) ** 2, rel=0.1)
    assert found.figures[drawing.CORRECTED][1] == pytest.approx(0, abs=of_mean / 100)
    assert float(found.sums[drawing.CORRECTED]) == pytest.approx(float(full), abs=0.05)
    assert float(found.sums["all"]) == float(full)
