"""The program that compares samples which copy from each other with those that copy from themselves."""

from types import SimpleNamespace

import consensus
import numpy as np
import pytest
from programs import run
from tqdm import tqdm


def test_a_row_for_each_number_of_samples_and_a_page(adapters, tmp_path):
    ended = run(consensus.main, adapters / "embeddings", "--quick", "--samples", "1,2", "--output", tmp_path / "found")
    assert ended.code == 0, ended.err[-2000:]
    alone, pairs = ended.result["rows"]
    assert (alone["samples"], pairs["samples"]) == (1, 2)
    assert alone["gain"] == 1
    assert pairs["tokens_per_step_together"] >= 1
    page = (tmp_path / "found.md").read_text()
    assert f"| 2 | {pairs['tokens_per_step_apart']:.3f} | {pairs['tokens_per_step_together']:.3f} |" in page
    assert (tmp_path / "found.json").exists()


def test_every_prompt_is_sampled_as_often_either_way_in_batches_of_one_size():
    calls = []

    def generate(prompts, num_return_sequences=1, *, seed, **options):
        sampled = [prompt for prompt in prompts for _ in range(num_return_sequences)]
        calls.append(([prompt[0] for prompt in sampled], num_return_sequences > 1))
        steps = 1 if num_return_sequences > 1 else 3
        each = [SimpleNamespace(num_new_tokens=7, num_steps=steps + prompt[0]) for prompt in sampled]
        return SimpleNamespace(stats=SimpleNamespace(sequences=each, tokens_per_second=12 / steps))

    asked = {"max_new_tokens": 7, "temperature": 1.0, "top_k": 3, "num_speculative_tokens": 0, "copy_tokens": 4}
    prompts, model = [[n] for n in range(6)], SimpleNamespace(generate=generate)
    with tqdm(disable=True) as bar:
        row = consensus.row_of(model, prompts, 3, SimpleNamespace(**asked), bar)
    for together in (True, False):
        sampled = [rows for rows, is_together in calls if is_together is together]
        assert {len(rows) for rows in sampled} == {3}
        assert sorted(n for rows in sampled for n in rows) == sorted(list(range(6)) * 3)
        assert {len(set(rows)) for rows in sampled} == {1 if together else 3}
    expected = [18 * 6 / sum(3 * (steps + n) for n in range(6)) for steps in (1, 3)]
    assert row["tokens_per_step_together"] == pytest.approx(expected[0], abs=1e-4)
    assert row["tokens_per_step_apart"] == pytest.approx(expected[1], abs=1e-4)
    assert row["gain"] == pytest.approx(expected[0] / expected[1], abs=1e-3)
    assert row["gain_interval"][0] < row["gain"] < row["gain_interval"][1]
    assert row["speed_ratio"] == 3


def test_gains_are_ratios_of_sums_over_prompts():
    together, apart = np.array([[6.0, 2.0], [6.0, 3.0]]), np.array([[6.0, 6.0], [6.0, 3.0]])
    draws = np.array([[0, 1], [0, 0]])
    assert consensus.gain(together, apart, draws).tolist() == [12 / 5 / (12 / 9), 3.0]


def test_samples_that_do_not_divide_the_prompts_are_refused(adapters):
    ended = run(consensus.main, adapters / "embeddings", "--quick", "--samples", "3")
    assert ended.code == 2
    assert "samples: expected divisors of 2, the number of prompts, found 3" in ended.err
