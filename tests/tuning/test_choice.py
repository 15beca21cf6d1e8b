"""Cost between measurements, prediction, choice, and the file beside the adapter."""

import json
import os
import tempfile
from dataclasses import replace

import pytest
import torch
from tiny_models import make_adapter, tiny_model

from pardec.adapters.files import save_adapter
from pardec.tuning.choice import (
    PLAIN,
    TUNED_FILE,
    Candidate,
    TunedChoice,
    Workload,
    choose,
    finalists,
    monotone_cost,
    predict,
    read_tuned,
    spread_over_rows,
    weights_of,
    write_tuned,
)


@pytest.fixture(scope="module")
def base():
    return tiny_model("llama")


@pytest.fixture
def folder(base, tmp_path):
    save_adapter(make_adapter(base, 2, lora_rank=2), tmp_path)
    return tmp_path


def choice_for(folder, **changes) -> TunedChoice:
    facts = {
        "device": "a device",
        "dtype": "float32",
        "compile": False,
        "block_lengths": (1, 2, 1),
        "weights": weights_of(folder),
        "ms_per_step": 1.5,
        "predicted_tokens_per_second": 100.0,
        "measured_tokens_per_second": 99.0,
        "plain_tokens_per_second": 60.0,
        "conditional_acceptance": [0.5, 0.25],
    }
    return TunedChoice(**{**facts, **changes})


# ---------------------------------------------------------------------- cost and prediction


@pytest.mark.parametrize(
    ("rows", "ms"),
    [(4, 1.0), (6, 1.5), (8, 2.0), (12, 3.0), (16, 3.0), (18, 4.5), (20, 6.0), (2, 1.0), (40, 6.0)],
)
def test_cost_is_linear_between_measurements_and_never_falls(rows, ms):
    # 12 rows measured dearer than 16: both take their mean, 3
    assert monotone_cost({20: 6.0, 4: 1.0, 8: 2.0, 12: 4.0, 16: 2.0}, rows) == pytest.approx(ms)


def test_prediction_of_certain_acceptance_is_counted_by_hand():
    work = Workload(new_tokens=[[31], [16]], prefill_ms=10, plain_prefill_ms=8)
    # 2 prefills, then 10 + 5 steps of 3 tokens each
    drafted = predict((2, 2, 2), [1.0, 1.0], 4.0, work)
    assert drafted.tokens_per_second == pytest.approx(47 / ((2 * 10 + 15 * 4) / 1000))
    plain = predict(PLAIN, [], 3.0, work)
    assert plain.tokens_per_second == pytest.approx(47 / ((2 * 8 + 45 * 3) / 1000))
    assert (plain.tokens_per_step, drafted.tokens_per_step) == (1.0, pytest.approx(3))


def test_prediction_of_a_batch_waits_for_its_longest_sequence():
    work = Workload(new_tokens=[[31, 11]], prefill_ms=10, plain_prefill_ms=8, waiting=1.5)
    assert predict(PLAIN, [], 3.0, work).tokens_per_second == pytest.approx(42 / ((8 + 30 * 3) / 1000))
    mean_steps = (10 + 4) / 2  # the fourth step emits two tokens too many
    assert predict((2, 2, 2), [1.0, 1.0], 4.0, work).tokens_per_second == pytest.approx(
        42 / ((10 + 1.5 * mean_steps * 4) / 1000)
    )


def test_finalists_are_the_best_of_their_k():
    speeds = {(1, 1): 7.0, (1, 0): 9.0, (2, 2, 2): 8.0, (2, 1, 1): 8.5, (3, 3, 3, 3): 5.0}
    candidates = [Candidate(shape, 1.5, 1.0, speed) for shape, speed in speeds.items()]
    assert [one.block_lengths for one in finalists(candidates, 2)] == [(1, 0), (2, 1, 1)]
    assert len(finalists(candidates, 9)) == 3


def test_cost_is_measured_from_the_fewest_rows_to_the_most():
    tables = {1: [0.5], 2: [0.5, 0.4]}
    shapes = [(1, 0), (1, 1), (2, 0, 0), (2, 1, 1), (1, 2, 1), (2, 2, 2)]
    found = spread_over_rows(shapes, tables, 3)  # type: ignore[arg-type]
    assert [len(shape) + sum(shape) for shape in found] == [3, 5, 9]
    assert len(spread_over_rows(shapes, tables, 50)) == 5  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("measured", "best"),
    [
        ({PLAIN: 10.0, (1, 1): 12.0, (2, 2, 2): 11.0}, (1, 1)),
        ({(1, 1): 9.9, PLAIN: 10.0, (2, 2, 2): 9.0}, PLAIN),
        ({(1, 1): 10.0, PLAIN: 10.0}, PLAIN),
        ({PLAIN: 10.0}, PLAIN),
    ],
)
def test_the_measured_best_is_chosen_and_nothing_below_plain(measured, best):
    assert choose(measured) == best


# ---------------------------------------------------------------------- the file


def test_a_choice_is_read_back_for_its_device_dtype_and_compile_only(folder):
    assert read_tuned(folder, "a device", torch.float32) is None
    choice = choice_for(folder, top_k=10, temperature=0.8, versions={"torch": "2"})
    assert write_tuned(folder, choice) == folder / TUNED_FILE
    assert read_tuned(folder, "a device", torch.float32) == choice
    assert read_tuned(str(folder), "a device", "float32", False) == choice
    assert choice.num_speculative_tokens == 2
    for other in (("b device", torch.float32, False), ("a device", torch.bfloat16, False)):
        assert read_tuned(folder, *other) is None
    assert read_tuned(folder, "a device", torch.float32, True) is None


def test_writing_replaces_the_same_device_and_keeps_the_others(folder):
    first, other = choice_for(folder), choice_for(folder, device="b device")
    compiled = choice_for(folder, compile=True)
    for one in (first, other, compiled):
        write_tuned(folder, one)
    again = replace(first, block_lengths=PLAIN)
    write_tuned(folder, again)
    assert read_tuned(folder, "a device", "float32") == again
    assert read_tuned(folder, "b device", "float32") == other
    assert read_tuned(folder, "a device", "float32", True) == compiled
    assert again.num_speculative_tokens == 0
    assert sorted(path.name for path in folder.glob("*tuned*")) == [TUNED_FILE]
    assert os.stat(folder / TUNED_FILE).st_mode & 0o044 == 0o044


@pytest.mark.parametrize("change", ["masks", "lora", "no lora"])
def test_a_choice_for_other_weights_is_ignored_and_then_dropped(folder, base, change):
    write_tuned(folder, choice_for(folder, device="b device"))
    new = make_adapter(base, 2, lora_rank=0 if change == "no lora" else 2, seed=1 if change == "no lora" else 5)
    if change == "lora":
        new = replace(new, mask_embeddings=make_adapter(base, 2, lora_rank=2).mask_embeddings)
    save_adapter(new, folder)
    assert (folder / TUNED_FILE).exists()
    assert read_tuned(folder, "b device", "float32") is None
    write_tuned(folder, choice_for(folder))
    assert len(json.loads((folder / TUNED_FILE).read_text())["choices"]) == 1


def broken(folder, **changes) -> str:
    write_tuned(folder, choice_for(folder))
    content = json.loads((folder / TUNED_FILE).read_text())
    content["choices"][0].update(changes)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "expected JSON, found"),
        ("[]", "expected format_version 1, found None"),
        ('{"format_version": 2, "choices": []}', "expected format_version 1, found 2"),
        ('{"format_version": 1}', "choices: Input should be a valid list, found 'None'"),
        ('{"format_version": 1, "choices": [{}]}', r"choices\.0\.device: Field required"),
        ({"block_lengths": [2, 2]}, "block_lengths: expected K . 1 numbers"),
        ({"ms_per_step": "slow"}, r"choices\.0\.ms_per_step: Input should be a valid number"),
    ],
)
def test_a_malformed_file_is_an_error_of_one_line_that_names_it(folder, text, words):
    (folder / TUNED_FILE).write_text(broken(folder, **text) if isinstance(text, dict) else text)
    for act in (lambda: read_tuned(folder, "a device", "float32"), lambda: write_tuned(folder, choice_for(folder))):
        with pytest.raises(ValueError, match=words) as error:
            act()
        assert str(folder / TUNED_FILE) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_written_to_is_named(folder, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match="expected an adapter folder that can be written to, found Permission denied"):
        write_tuned(folder, choice_for(folder))


def test_a_write_that_fails_leaves_what_was_there(folder, monkeypatch):
    first = choice_for(folder)
    write_tuned(folder, first)

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_tuned(folder, choice_for(folder, block_lengths=PLAIN))
    monkeypatch.undo()
    assert read_tuned(folder, "a device", "float32") == first
    assert sorted(path.name for path in folder.glob("*tuned*")) == [TUNED_FILE]
