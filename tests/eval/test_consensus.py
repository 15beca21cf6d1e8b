"""The program that compares samples which copy from each other with those that copy from themselves."""

import consensus
import numpy as np
import pytest
from programs import run

import pardec
from pardec.data.corpus import held_out_prompts
from pardec.decoding.copying import sources_of


def test_a_row_for_each_number_of_samples_and_a_page(adapters, tmp_path):
    ended = run(consensus.main, adapters / "embeddings", "--quick", "--samples", "1,2", "--output", tmp_path / "found")
    assert ended.code == 0, ended.err[-2000:]
    alone, pairs = ended.result["rows"]
    assert (alone["samples"], pairs["samples"]) == (1, 2)
    assert alone["gain"] == 1
    assert pairs["tokens_per_step_apart"] == alone["tokens_per_step_together"]
    page = (tmp_path / "found.md").read_text()
    assert f"| 2 | {pairs['tokens_per_step_apart']:.3f} | {pairs['tokens_per_step_together']:.3f} |" in page
    assert (tmp_path / "found.json").exists()


@pytest.mark.parametrize("count", [1, 4])
def test_steps_are_those_that_the_decoder_takes(adapters, count):
    model = pardec.load(adapters / "embeddings")
    prompt = held_out_prompts(model.tokenizer, "test", num_prompts=1)[0]
    asked = {"max_new_tokens": 32, "temperature": 0.6, "seed": 0, "num_speculative_tokens": 0, "copy_tokens": 5}
    out = model.generate([prompt], num_return_sequences=count, **asked)
    found = consensus.steps_of(prompt, out.token_ids, 5, sources_of([prompt] * count))
    assert found == [one.num_steps for one in out.stats.sequences]


def test_gains_are_ratios_of_steps_summed_over_prompts(monkeypatch):
    monkeypatch.setattr(
        consensus, "steps_of", lambda prompt, texts, L, sources: [6 if len(sources[0]) == 1 else prompt[0]]
    )
    texts = [[[0] * 13, [0] * 13]] * 2
    row = consensus.row_of([[2], [4]], texts, 2, 8)
    assert row["tokens_per_step_apart"] == 48 / 12
    assert row["tokens_per_step_together"] == 48 / 6
    assert row["gain"] == 2
    assert row["gain_interval"] == pytest.approx(np.array([1.5, 3]), abs=1e-6)


def test_samples_that_do_not_divide_the_largest_are_refused(adapters):
    ended = run(consensus.main, adapters / "embeddings", "--quick", "--samples", "2,3")
    assert ended.code == 2
    assert "samples: expected divisors of the largest, 3, found '2,3'" in ended.err
