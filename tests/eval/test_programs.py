"""The eval scripts: a table for people, one JSON object as the last line, pictures."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import acceptance
import demo
import pytest
from programs import run, run_as_scripts
from reporting import plots

import pardec
from pardec.data.corpus import held_out_prompts

ROW_KEYS = {
    "adapter", "mode", "num_speculative_tokens", "mean_acceptance_length", "tokens_per_step", "tokens_per_forward",
    "tokens_per_second", "ratio_to_plain",
}  # fmt: skip


SHAPES = {"embeddings": (0,), "lora": (2, 1, 0)}


def choosing(tune):
    """The same tuning, with another choice at its end."""

    def chosen(model, directory, prompts, **options):
        assert prompts == held_out_prompts(model.tokenizer, "validation", num_prompts=2)
        report = tune(model, directory, prompts, **options)
        shape = SHAPES[Path(directory).name]
        way = {"block_lengths": shape, "mode": "plain" if shape == (0,) else "fused", "use_head": True}
        way |= {"tree": None, "copy_tokens": 0}
        return replace(report, choice=replace(report.choice, **way))

    return chosen


@pytest.fixture(scope="module")
def demo_run(adapters, tmp_path_factory):
    """A run of the demo with little of everything, on adapters that may be tuned, and its folder."""
    folder = tmp_path_factory.mktemp("demo")
    shutil.copytree(adapters, folder, dirs_exist_ok=True)
    few = ("--output", folder, "--num-prompts", 2, "--max-new-tokens", 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "TUNING_PROMPTS", 2)
        patch.setattr(demo, "TUNING_TOKENS", 6)
        patch.setattr(demo, "TUNING_EFFORT", replace(demo.TUNING_EFFORT, repetitions=1, num_trees=1))
        patch.setattr(demo, "tune", choosing(demo.tune))
        ended = run(demo.main, folder / "embeddings", folder / "lora", *few)
    assert ended.code == 0, ended.err[-2000:]
    return ended, folder


def test_demo_measures_every_mode_and_ends_with_the_json_line(demo_run):
    ended, folder = demo_run
    result = ended.result
    assert json.loads((folder / "demo.json").read_text()) == result
    assert all(set(row) == ROW_KEYS | {"identical"} for row in result["rows"])
    assert all(set(row) == ROW_KEYS for row in result["sampled_rows"])
    assert all(row["identical"] for row in result["rows"])
    modes = {(row["adapter"], row["mode"]) for row in result["rows"]}
    assert modes == {(a, m) for a in ("embeddings", "lora") for m in ("plain", "two_pass", "fused")}
    assert {r["num_speculative_tokens"] for r in result["rows"] if r["adapter"] == "lora"} == {0, 1, 2}
    for row in result["rows"] + result["sampled_rows"]:
        if row["mode"] == "fused":
            assert row["tokens_per_forward"] == pytest.approx(row["mean_acceptance_length"], abs=1e-3)
            assert 1 <= row["tokens_per_step"] <= row["mean_acceptance_length"]  # which counts beyond the last token
        if row["mode"] == "plain":
            assert row["tokens_per_step"] == row["tokens_per_forward"] == 1
            assert row["ratio_to_plain"] == 1
    assert (folder / "acceptance_by_position.png").read_bytes().startswith(b"\x89PNG")
    assert "torch" in result["versions"]
    assert result["command"].startswith("demo.py ")
    assert "git_commit" in result


def test_demo_ends_with_what_tuning_chose_for_each_adapter(demo_run):
    ended, folder = demo_run
    model = pardec.load(folder / "lora")
    model.tuned = None
    prompts = held_out_prompts(model.tokenizer, "test", num_prompts=2)
    for name, law in (("tuned_rows", {}), ("tuned_sampled_rows", {"temperature": 0.8, "top_k": 10})):
        plain, nothing, chosen = ended.result[name]
        assert [(row["adapter"], row["mode"]) for row in (plain, nothing, chosen)] == [
            ("none", "plain"), ("embeddings", "plain"), ("lora", "tuned: fused")
        ]  # fmt: skip
        assert (plain["ratio_to_plain"], nothing["ratio_to_plain"]) == (1, 1)
        assert (chosen["num_speculative_tokens"], chosen["block_lengths"]) == (2, [2, 1, 0])
        seeded = [
            model.generate(prompt, max_new_tokens=10, block_lengths=(2, 1, 0), seed=seed, **law).stats
            for seed, prompt in enumerate(prompts, start=1)
        ]
        accepted, drafts = (
            sum(getattr(one, f"num_{what}") for one in seeded) for what in ("accepted_tokens", "drafts")
        )
        assert chosen["mean_acceptance_length"] == pytest.approx(1 + accepted / drafts, abs=1e-4)
    assert all(row["identical"] for row in ended.result["tuned_rows"])
    assert ended.result["choices"]["lora"]["block_lengths"] == [2, 1, 0]
    assert (folder / "lora" / "tuned.json").exists()
    assert "2 (2 1 0)" in ended.out
    assert "fastest here, greedy: " in ended.out
    last = ended.out[ended.out.index("measured on the test split, greedy") :]
    assert "K = 2 has 9 rows, took" in last


def test_demo_says_at_once_that_a_choice_cannot_be_kept(adapters, monkeypatch):
    def full(directory):
        raise OSError(f"{directory}: expected an adapter folder that can be written to, found read-only")

    monkeypatch.setattr(demo, "check_writable", full)
    monkeypatch.setattr(demo, "timed_runs", None)
    ended = run(demo.main, adapters / "embeddings", adapters / "lora")
    assert "embeddings: expected an adapter folder that can be written to" in ended.error


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


# what cannot be used, and what is said of it
REFUSED = {
    "eval/demo.py": (["none", "none"], "expected an adapter directory"),
    "eval/acceptance.py": (["none"], "expected an adapter directory"),
    "eval/recording.py": (["none"], "expected an adapter directory"),
    "eval/exactness.py": (["none"], "expected an adapter directory"),
    "eval/speed.py": (["none", "--quick"], "expected an adapter directory"),
    "eval/latency.py": (["--shape", "llama-9b"], "shape: expected one of tiny, llama-100m, llama-1b, llama-8b"),
    "eval/ablate.py": (["none.yaml"], "none.yaml: expected a study file, found nothing"),
    "train/pretrain_base.py": (["none.yaml"], "none.yaml: expected a recipe file, found nothing"),
    "train/generate_responses.py": (["none.yaml"], "none.yaml: expected a recipe file, found nothing"),
}


@pytest.fixture(scope="module")
def refused():
    """By script, programs that were started with what they cannot use."""
    lines = [[script, *arguments] for script, (arguments, _) in REFUSED.items()]
    return dict(zip(REFUSED, run_as_scripts(*lines), strict=True))


@pytest.mark.parametrize("script", REFUSED)
def test_as_a_script_a_program_tells_in_one_line_what_it_cannot_use_and_ends_with_2(refused, script):
    assert REFUSED[script][1] in refused[script].error
    assert refused[script].err.startswith("error: ")
    assert refused[script].out == ""


def test_the_picture_of_the_layout_is_drawn(tmp_path):
    plots.plot_fused_step(2, tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 10_000
