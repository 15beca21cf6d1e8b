"""Acceptance counted with the real decoder, and one figure for one adapter: in training, in evals, on the command line.

The training script runs for a few steps; what it logged and stored is compared with what its adapter gives afterwards.
"""

import hashlib
import json
from pathlib import Path

import programs
import pytest
import train_adapter
from adapter_runs import brief
from data_samples import code_text
from tiny_models import make_adapter, tiny_model
from typer.testing import CliRunner

import pardec
from pardec.cli.program import app
from pardec.data.corpus import held_out_prompts
from pardec.decoding.stats import SequenceCounts, pool
from pardec.measures.acceptance import bootstrap_interval, digest, measure_acceptance, summarise
from pardec.measures.held_out import measure_again, measure_held_out
from pardec.model import SelfSpeculativeModel

PROMPTS = [[5, 9, 2, 4, 7], [3], [11, 12, 10, 1, 2, 3], [8, 8], [1, 2]]
NEW_TOKENS, SAMPLING = 20, {"temperature": 0.8, "top_k": 10}


@pytest.fixture(scope="module")
def model():
    base = tiny_model("llama", vocab_size=13)
    return SelfSpeculativeModel(base, None, make_adapter(base, 3, lora_rank=2, head_width=8))


def within_2_percent(value: float):
    return pytest.approx(value, rel=0.02)


# ---------------------------------------------------------------------- counting


def test_each_batch_is_a_call_of_generate_with_a_seed_of_its_own(model):
    found = measure_acceptance(model, PROMPTS, max_new_tokens=9, batch_size=2, seed=7, **SAMPLING)
    calls = [
        model.generate(PROMPTS[start : start + 2], max_new_tokens=9, seed=7 + start, **SAMPLING) for start in (0, 2, 4)
    ]
    assert found.token_ids == [ids for out in calls for ids in out.token_ids]
    pooled = pool([one for out in calls for one in out.counts], seconds=1.0)
    assert found.mean_acceptance_length == pooled.mean_acceptance_length
    assert found.stats.acceptance_rate_per_position == pooled.acceptance_rate_per_position


def test_greedy_figures_do_not_depend_on_the_batch(model):
    alone = measure_acceptance(model, PROMPTS, max_new_tokens=30, batch_size=1, seed=3)
    together = measure_acceptance(model, PROMPTS, max_new_tokens=30)
    assert alone.to_dict() == together.to_dict()
    assert alone.mean_acceptance_length > 1


def test_sampled_figures_of_other_batches_follow_one_law():
    """They differ in nothing but their random numbers, of which there are enough to differ by less than 2 %."""
    base = tiny_model("llama", vocab_size=13)
    model = SelfSpeculativeModel(base, None, make_adapter(base, 1))
    prompts = [[a, b] for a in range(13) for b in range(13)] * 2
    found = [
        measure_acceptance(model, prompts, max_new_tokens=24, batch_size=size, seed=size, **SAMPLING)
        for size in (338, 26)
    ]
    assert min(one.stats.num_drafts for one in found) > 4000
    assert found[0].mean_acceptance_length == within_2_percent(found[1].mean_acceptance_length)
    assert found[0].token_ids != found[1].token_ids


def test_the_sampler_head_can_be_left_out(model):
    options = {"max_new_tokens": 30, "batch_size": 5}
    found = [measure_acceptance(model, PROMPTS, use_head=use, **options).to_dict() for use in (None, True, False)]
    same_otherwise = make_adapter(model.base_model, 3, lora_rank=2)
    without_head = SelfSpeculativeModel(model.base_model, None, same_otherwise)
    assert found[0] == found[1]
    assert found[2] != found[0]
    assert found[2] == measure_acceptance(without_head, PROMPTS, **options).to_dict()


def test_categories_are_their_prompts_alone():
    counts = [
        SequenceCounts([3, 0, 1], [3, 3, 3], 8),
        SequenceCounts([0, 1], [0, 3], 4),  # a round without a draft
        SequenceCounts([2, 2], [3, 2], 7),
    ]
    prompts, outputs = [[1], [2], [3]], [[1] * 8, [2] * 4, [3] * 7]
    found = summarise(prompts, outputs, counts, 1.0, ["code", "text", "code"]).by_category
    assert list(found) == ["code", "text"]
    assert found["code"].mean_acceptance_length == 1 + (4 + 4) / (3 + 2)
    assert (found["code"].num_prompts, found["code"].num_drafts) == (2, 5)
    assert found["text"].to_dict() == {
        "mean_acceptance_length": 2.0,
        "interval": [2.0, 2.0],
        "num_prompts": 1,
        "num_drafts": 1,
    }
    assert found["code"].interval == bootstrap_interval([(4, 3), (4, 2)])
    assert "by_category" not in summarise(prompts, outputs, counts, 1.0).to_dict()


def test_what_was_emitted_per_step_is_told_beside_the_acceptance_length():
    """Two steps have emitted five tokens of the eight that they would have without the cut."""
    figures = summarise([[1]], [[1] * 6], [SequenceCounts([3, 3], [3, 3], 6)], 1.0).to_dict()
    assert (figures["mean_acceptance_length"], figures["tokens_per_step"]) == (4.0, 2.5)


@pytest.mark.parametrize("size", [0, -1, 1.5, None, "4"])
def test_a_batch_is_a_number_of_prompts(model, size):
    with pytest.raises(ValueError, match=f"batch_size: expected an integer >= 1, found {size!r}"):
        measure_acceptance(model, PROMPTS, max_new_tokens=4, batch_size=size)


def test_the_digest_is_that_of_the_token_ids():
    assert digest([[1, 2], (3,)]) == hashlib.sha256(b"[[1, 2], [3]]").hexdigest()
    assert digest([[1, 2, 3]]) != digest([[1, 2], [3]])


@pytest.mark.parametrize(
    ("prompts", "categories", "words"),
    [
        ([], None, "prompts: expected at least one prompt, found none"),
        (PROMPTS, ["a"] * 4, "categories: expected 5, one for each prompt, found 4"),
    ],
)
def test_what_cannot_be_counted_is_refused(model, prompts, categories, words):
    with pytest.raises(ValueError, match=words):
        measure_acceptance(model, prompts, max_new_tokens=4, categories=categories)


# ---------------------------------------------------------------------- one figure everywhere


@pytest.fixture(scope="module")
def texts():
    return [f"def area_{n}(width, height):\n    return width * height + {n}\n\n\ndef " for n in range(4)]


@pytest.fixture(scope="module")
def run(texts, tokenizer, tmp_path_factory):
    """A short run of the training script, LoRA and head in bf16 autocast, whose validation prompts are `texts`."""
    folder = tmp_path_factory.mktemp("truth")
    train = folder / "code.txt"
    train.write_text(code_text(400))
    rows = [(ids, len(ids)) for ids in tokenizer(texts).input_ids]
    lines = [json.dumps({"input_ids": [*ids, 5, 6, 7], "loss_mask": [0] * n + [1, 1, 1]}) for ids, n in rows]
    (folder / "validation.jsonl").write_text("\n".join(lines) + "\n")
    recipe = {
        "base": "tiny-python",
        "output_dir": str(folder / "run"),
        "data": {"path": str(train), "validation_path": str(folder / "validation.jsonl"), "max_length": 64},
        "adapter": {
            "num_speculative_tokens": 3,
            "lora": {"r": 4},
            "head": {"width": 16, "shortlist": 16},
        },
        "train": {
            "steps": 8,
            "batch_size": 2,
            "anchors_per_sequence": 16,
            "warmup_steps": 0,
            "mixed_precision": "bf16",
        },
        "eval": {"every": 4, "num_prompts": 4, "max_new_tokens": NEW_TOKENS, **SAMPLING},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    with pytest.MonkeyPatch.context() as patch:
        brief(patch)
        ended = programs.run(train_adapter.main, folder / "recipe.yaml")
    assert ended.code == 0, ended.err[-2000:]
    return folder / "run"


@pytest.fixture(scope="module")
def trained(run):
    return pardec.load(run)


def test_what_training_logs_is_what_it_stores(run, trained):
    metadata = trained.adapter.metadata
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if "acceptance/sampled" in row]
    assert [row["step"] for row in measured] == [0, 4, 8]
    (row,) = (row for row in measured if row["step"] == metadata.training["step"])
    for name in ("sampled", "greedy"):
        assert metadata.measured[name]["mean_acceptance_length"] == round(row[f"acceptance/{name}"], 4)
    assert row["acceptance/sampled"] == max(row["acceptance/sampled"] for row in measured)


def test_the_saved_adapter_gives_what_training_has_stored(trained):
    stored = trained.adapter.metadata.measured
    found, rows = measure_again(trained)
    assert [row.figure for row in rows] == ["sampled", "greedy", "sampled_without_head"]
    assert all(row.agrees for row in rows)
    assert rows[1].same_tokens
    for name in ("sampled", "greedy", "sampled_without_head"):
        now = found.to_dict()[name]
        assert now["num_drafts"] == stored[name]["num_drafts"]
        assert now["mean_acceptance_length"] == within_2_percent(stored[name]["mean_acceptance_length"])
        assert now["acceptance_rate_per_position"] == stored[name]["acceptance_rate_per_position"]
    assert stored["greedy"]["mean_acceptance_length"] == found.to_dict()["greedy"]["mean_acceptance_length"]
    assert stored["greedy"]["mean_acceptance_length"] > 1


def test_the_command_line_gives_what_training_has_stored(run, trained, texts, tmp_path):
    """`pardec generate` has a call, and so a stream of random numbers, for each prompt."""
    stored, path = trained.adapter.metadata.measured, tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    arguments = ("--prompt-file", str(path), "--max-new-tokens", str(NEW_TOKENS))
    assert generated(run, *arguments) == round_4(stored["greedy"]["mean_acceptance_length"])
    # sampled with the same draws: prompt by prompt, seeds as they are counted on
    ids = trained.tokenizer(texts).input_ids
    alone = measure_held_out(trained, ids, max_new_tokens=NEW_TOKENS, seed=0, batch_size=1, **SAMPLING)
    sampling = ("--temperature", "0.8", "--top-k", "10", "--max-new-tokens", str(NEW_TOKENS))
    one_by_one = [("--prompt", text, "--seed", str(seed), *sampling) for seed, text in enumerate(texts)]
    assert generated(run, *one_by_one) == within_2_percent(alone.sampled.mean_acceptance_length)


def generated(run: Path, *calls) -> float:
    """Mean acceptance length pooled over the objects that `pardec generate --json` prints."""
    accepted = drafts = 0
    for arguments in calls if isinstance(calls[0], tuple) else [calls]:
        done = CliRunner().invoke(app, ["generate", str(run), "--json", *arguments])
        assert done.exit_code == 0, done.output
        for line in done.stdout.splitlines():
            stats = json.loads(line)["stats"]
            accepted, drafts = accepted + stats["num_accepted_tokens"], drafts + stats["num_drafts"]
    assert drafts > 20
    return round_4(1 + accepted / drafts)


def round_4(value: float) -> float:
    return round(value, 4)


def test_evals_take_the_same_prompts_from_the_same_file(trained, texts):
    data = trained.adapter.metadata.training["recipe"]["data"]["validation_path"]
    assert held_out_prompts(trained.tokenizer, "validation", data) == trained.tokenizer(texts).input_ids
