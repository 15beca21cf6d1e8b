"""The script that times packed products runs, and its page holds what was measured."""

import json

import packing
from programs import run, run_in_own_process


def test_a_quick_run_writes_its_table(tmp_path):
    stem = tmp_path / "packing"
    ended = run(packing.main, "--quick", "--rows", "1,4", "--repetitions", 2, "--in-features", 64, "--output", stem)
    assert ended.code == 0, ended.err
    result = ended.result
    assert [row["rows"] for row in result["rows"]] == [1, 4]
    for row in result["rows"]:
        assert row["gflops"] > 0
        assert row["packed_ms"] > 0
        assert abs(row["gb_per_s"] / (4 * 64 * 3072 / row["packed_ms"] / 1e6) - 1) < 0.1
    assert json.loads(stem.with_suffix(".json").read_text()) == result
    assert "| 4 |" in stem.with_suffix(".md").read_text()


def test_impossible_sizes_are_refused():
    assert "expected numbers of at least 1" in run_in_own_process("eval/packing.py", "--rows", 0).error
