"""The script that times packed products runs, and its page holds what was measured."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*options):
    command = [sys.executable, str(ROOT / "eval" / "packing.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_a_quick_run_writes_its_table(tmp_path):
    stem = tmp_path / "packing"
    done = run("--quick", "--rows", "1,4", "--repetitions", "2", "--in-features", "64", "--output", str(stem))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert [row["rows"] for row in result["rows"]] == [1, 4]
    for row in result["rows"]:
        assert row["gflops"] > 0
        assert row["packed_ms"] > 0
        assert abs(row["gb_per_s"] / (4 * 64 * 3072 / row["packed_ms"] / 1e6) - 1) < 0.1
    assert json.loads(stem.with_suffix(".json").read_text()) == result
    assert "| 4 |" in stem.with_suffix(".md").read_text()


def test_impossible_sizes_are_refused():
    done = run("--rows", "0")
    assert done.returncode == 2
    assert "expected numbers of at least 1" in done.stderr
