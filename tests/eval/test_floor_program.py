"""The program that measures the floor: a table for people, one JSON object, pictures; its means and intervals."""

from dataclasses import replace

import floor
import numpy as np
import pytest
import torch
from programs import run

from pardec.measures.floor import Overlaps


@pytest.fixture(scope="module")
def ended(adapters, tmp_path_factory):
    stem = tmp_path_factory.mktemp("floor") / "found"
    ended = run(floor.main, adapters / "embeddings", adapters / "lora", "--quick", "--output", stem)
    assert ended.code == 0, ended.err[-2000:]
    return ended, stem


def test_every_adapter_is_set_beside_the_same_floor(ended):
    result = ended[0].result
    plain, with_lora = result["rows"]
    assert [row["adapter"] for row in result["rows"]] == ["embeddings", "lora"]
    assert result["num_places"] == 4
    assert plain["drafted"] != with_lora["drafted"]
    for name in ("blind", "blind_shown", "behind_one", "behind_one_shown"):
        # one set of futures; the rows of a forward are as many, but its mask rows are others
        np.testing.assert_allclose(plain[name]["mean"][:2], with_lora[name]["mean"][:2], atol=1e-3)
    for row in result["rows"]:
        assert ("with_head" in row) == ("share_with_head" in row)
        ratio = np.array(row["drafted"]["mean"]) / np.array(row["blind"]["mean"])
        np.testing.assert_allclose(row["share"]["mean"], ratio, atol=2e-3)


def test_page_and_picture_are_written_and_say_what_the_bounds_are(ended):
    told, stem = ended
    page = stem.with_suffix(".md").read_text()
    assert stem.with_suffix(".json").exists()
    assert stem.with_suffix(".png").exists()
    for row in told.result["rows"]:
        assert f"{row['adapter']}: {row['share']['all_depths']:.0%} (" in page
    assert "on average is too large" in page


def test_prompts_are_resampled_with_all_their_places():
    draws = floor.resampled([0, 0, 0, 1, 1])
    assert (draws[:, 0] == draws[:, 2]).all()
    assert (draws[:, 3] == draws[:, 4]).all()
    assert (draws[:, 0] + draws[:, 3] == 2).all()


def test_shares_are_of_sums_over_places():
    values = torch.tensor([[0.2, 0.1], [0.4, 0.3]], dtype=torch.float64)
    most = torch.tensor([[1.0, 0.5], [0.5, 0.5]], dtype=torch.float64)
    lengths = torch.tensor([1.0, 0.5], dtype=torch.float64)
    found = Overlaps(most, most, most, most, values, values, lengths, 2 * lengths)
    row = floor.row_of("runs/x", found, [0, 1], has_head=False)
    assert row["adapter"] == "x"
    assert row["share"]["mean"] == pytest.approx([0.6 / 1.5, 0.4 / 1.0])
    assert row["blind"]["mean_acceptance_length"] == 1.75
    assert row["behind_one"]["mean_acceptance_length"] == 2.5
    assert row["share"]["all_depths"] == pytest.approx(1.0 / 2.5)
    assert row["share"]["interval"][0] == pytest.approx([0.2, 0.8])


def test_adapters_of_two_bases_are_refused(adapters, tmp_path, monkeypatch):
    load, directories = floor.pardec.load, []

    def loaded(directory):
        model = load(directory)
        directories.append(directory)
        if len(directories) == 2:
            metadata = model.adapter.metadata
            another = metadata.base.model_copy(update={"name": "another"})
            model.adapter = replace(model.adapter, metadata=metadata.model_copy(update={"base": another}))
        return model

    monkeypatch.setattr(floor.pardec, "load", loaded)
    ended = run(floor.main, adapters / "embeddings", adapters / "lora", "--quick", "--output", tmp_path / "x")
    assert ended.error.endswith("expected an adapter of tiny-python, as the first one is, found one of another")
