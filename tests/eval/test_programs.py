"""The eval scripts: a table for people, one JSON object as the last line, pictures."""

import json

import acceptance
import demo
import pytest
from programs import run, run_in_own_process
from reporting import plots

import pardec
from pardec.data.corpus import held_out_prompts

ROW_KEYS = {
    "adapter", "mode", "num_speculative_tokens", "mean_acceptance_length", "tokens_per_forward", "tokens_per_second",
    "ratio_to_plain",
}  # fmt: skip


def test_demo_measures_every_mode_and_ends_with_the_json_line(adapters, tmp_path):
    few = ("--output", tmp_path, "--num-prompts", 2, "--max-new-tokens", 10)
    ended = run(demo.main, adapters / "embeddings", adapters / "lora", *few)
    assert ended.code == 0, ended.err[-2000:]
    result = ended.result
    assert json.loads((tmp_path / "demo.json").read_text()) == result
    assert all(set(row) == ROW_KEYS | {"identical"} for row in result["rows"])
    assert all(set(row) == ROW_KEYS for row in result["sampled_rows"])
    assert all(row["identical"] for row in result["rows"])
    modes = {(row["adapter"], row["mode"]) for row in result["rows"]}
    assert modes == {(a, m) for a in ("embeddings", "lora") for m in ("plain", "two_pass", "fused")}
    assert {r["num_speculative_tokens"] for r in result["rows"] if r["adapter"] == "lora"} == {0, 1, 2}
    for row in result["rows"] + result["sampled_rows"]:
        if row["mode"] == "fused":
            assert row["tokens_per_forward"] == pytest.approx(row["mean_acceptance_length"], abs=1e-3)
        if row["mode"] == "plain":
            assert row["tokens_per_forward"] == 1
            assert row["ratio_to_plain"] == 1
    assert (tmp_path / "acceptance_by_position.png").read_bytes().startswith(b"\x89PNG")
    assert "torch" in result["versions"]


def test_acceptance_reports_what_the_public_api_counts(adapters):
    ended = run(acceptance.main, adapters / "lora", "--num-prompts", 2, "--max-new-tokens", 10)
    assert ended.code == 0, ended.err[-2000:]
    result = ended.result
    model = pardec.load(adapters / "lora")
    prompts = held_out_prompts(model.tokenizer, "test", num_prompts=2)
    calls = {"greedy": {}, "sampled": {"temperature": 0.8, "top_k": 10, "seed": 0}}
    for name, options in calls.items():
        stats = model.generate(prompts, max_new_tokens=10, **options).stats
        assert result[name]["mean_acceptance_length"] == pytest.approx(stats.mean_acceptance_length, abs=1e-4)
        for kind, rates in stats.acceptance_rate_per_position.items():
            assert result[name]["acceptance_rate_per_position"][kind] == pytest.approx(rates, abs=1e-4)
        shares = result[name]["ranks"]["unconditional"]
        assert all(0 <= a <= b <= c <= 1 for a, b, c in zip(*(shares[f"top{n}"] for n in (1, 5, 10)), strict=True))
        assert set(result[name]["by_category"]) == {"code"}
    assert (result["split"], result["num_prompts"], result["max_new_tokens"]) == ("test", 2, 10)
    assert "by category" not in ended.out


def test_acceptance_by_category_of_a_benchmark(adapters, tmp_path):
    rows = [
        {"question_id": n, "category": category, "turns": [f"Please explain {category} to me."]}
        for n, category in enumerate(("maths", "writing", "maths"))
    ]
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--prompts", tmp_path / "bench.jsonl", "--max-new-tokens", 8, "--num-speculative-tokens", 1)
    ended = run(acceptance.main, adapters / "lora", "--head", "off", *options)
    assert ended.code == 0, ended.err[-2000:]
    result = ended.result
    assert {name: one["num_prompts"] for name, one in result["greedy"]["by_category"].items()} == {
        "maths": 2,
        "writing": 1,
    }
    assert result["split"] is None
    assert len(result["sampled"]["acceptance_rate_per_position"]["conditional"]) == 1
    assert "by category" in ended.out


@pytest.mark.parametrize("script", ["demo.py", "acceptance.py"])
def test_bad_input_is_one_line_and_exit_code_2(script, tmp_path):
    directories = [str(tmp_path / "none")] * (2 if script == "demo.py" else 1)
    assert "expected an adapter directory" in run_in_own_process(f"eval/{script}", *directories).error


def test_the_picture_of_the_layout_is_drawn(tmp_path):
    plots.plot_fused_step(2, tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 10_000
