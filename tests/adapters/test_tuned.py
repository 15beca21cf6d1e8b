"""The file beside the adapter that keeps what was chosen, by device."""

import json
import os
import re
import resource
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from tiny_models import make_adapter, tiny_model

from pardec.adapters import packaged, tuned
from pardec.adapters.files import save_adapter
from pardec.adapters.tuned import (
    TUNED_FILE,
    TunedChoice,
    check_writable,
    fastest_dtype,
    fresh_choices,
    nearest_choice,
    read_tuned,
    weights_of,
    write_tuned,
)
from pardec.layout import PLAIN

PAIR = {"parents": [0], "ranks": [0], "runs": [1, 1]}  # a tree of one node


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


def test_of_another_number_of_threads_the_last_choices_of_this_cpu_are_found(folder):
    for device, changes in {
        "a CPU, 1 threads": {},
        "a CPU, 4 threads": {"block_lengths": (2, 2, 2)},
        "another CPU, 2 threads": {},
        "a card": {},
    }.items():
        write_tuned(folder, choice_for(folder, device=device, **changes))
    write_tuned(folder, choice_for(folder, device="a CPU, 4 threads", batch_size=4))
    write_tuned(folder, choice_for(folder, device="a CPU, 8 threads", dtype="bfloat16"))
    found = read_tuned(folder, "a CPU, 2 threads", "float32")
    assert [(one.device, one.batch_size) for one in found] == [("a CPU, 4 threads", 1), ("a CPU, 4 threads", 4)]
    for device, options in {
        "a third CPU, 2 threads": {},
        "a CPU": {},
        "a cardboard, 2 threads": {},
        "a CPU, 2 threads": {"compile": True},
    }.items():
        assert read_tuned(folder, device, "float32", **options) == []


def test_a_choice_is_read_back_for_its_device_dtype_and_compile_only(folder):
    assert read_tuned(folder, "a device", torch.float32) == []
    choice = choice_for(folder, top_k=10, temperature=0.8, versions={"torch": "2"})
    assert write_tuned(folder, choice) == folder / TUNED_FILE
    assert read_tuned(folder, "a device", torch.float32) == [choice]
    assert read_tuned(str(folder), "a device", "float32", False) == [choice]
    assert choice.num_speculative_tokens == 2
    for other in (("b device", torch.float32, False), ("a device", torch.bfloat16, False)):
        assert read_tuned(folder, *other) == []
    assert read_tuned(folder, "a device", torch.float32, True) == []


def test_writing_replaces_the_same_device_and_keeps_the_others(folder):
    first, other = choice_for(folder), choice_for(folder, device="b device")
    compiled = choice_for(folder, compile=True)
    for one in (first, other, compiled):
        write_tuned(folder, one)
    again = replace(first, block_lengths=PLAIN)
    write_tuned(folder, again)
    assert read_tuned(folder, "a device", "float32") == [again]
    assert read_tuned(folder, "b device", "float32") == [other]
    assert read_tuned(folder, "a device", "float32", True) == [compiled]
    assert again.num_speculative_tokens == 0
    assert sorted(path.name for path in folder.glob("*tuned*")) == [TUNED_FILE]
    assert os.stat(folder / TUNED_FILE).st_mode & 0o044 == 0o044


def test_batch_sizes_and_ways_of_sampling_have_choices_of_their_own(folder):
    kinds = [(1, 0.0), (4, 0.0), (4, 0.8), (1, 0.0)]
    shapes = [(1, 1), PLAIN, (2, 1, 0), (2, 2, 2)]
    for (batch_size, temperature), shape in zip(kinds, shapes, strict=True):
        write_tuned(folder, choice_for(folder, block_lengths=shape, batch_size=batch_size, temperature=temperature))
    found = read_tuned(folder, "a device", "float32")
    assert {(one.batch_size, one.temperature): one.block_lengths for one in found} == dict(
        zip(kinds, shapes, strict=True)  # the last one stands in place of the first
    )
    write_tuned(folder, choice_for(folder, batch_size=4, temperature=0.5))
    assert len(read_tuned(folder, "a device", "float32")) == 3


@pytest.mark.parametrize(
    ("num_sequences", "is_greedy", "expected"),
    [
        (1, True, (2, 0.0)),  # none so small
        (2, True, (2, 0.0)),
        (7, True, (2, 0.0)),
        (8, True, (8, 0.0)),
        (99, True, (8, 0.0)),
        (1, False, (4, 0.8)),
        (64, False, (4, 0.8)),
    ],
)
def test_the_nearest_choice_is_of_the_same_law_and_of_the_largest_batch_that_is_not_larger(
    folder, num_sequences, is_greedy, expected
):
    choices = [choice_for(folder, batch_size=size, temperature=heat) for size, heat in ((8, 0.0), (4, 0.8), (2, 0.0))]
    found = nearest_choice(choices, num_sequences, is_greedy)
    assert (found.batch_size, found.temperature) == expected
    assert nearest_choice([], num_sequences, is_greedy) is None
    assert nearest_choice(choices[1:2], num_sequences, is_greedy) == choices[1]  # the only one serves all


def test_the_fastest_dtype_is_that_of_the_last_comparison_on_the_device(folder):
    write_tuned(folder, choice_for(folder))
    assert fastest_dtype(folder, "a device") is None
    speeds = {"float32": 50.0, "bfloat16": 70.0}
    for dtype in speeds:
        write_tuned(folder, choice_for(folder, dtype=dtype, by_dtype=speeds))
    write_tuned(folder, choice_for(folder, device="b device", by_dtype={"float32": 2.0, "bfloat16": 1.0}))
    assert fastest_dtype(folder, "a device") == "bfloat16"
    assert fastest_dtype(folder, "b device") == "float32"
    assert fastest_dtype(folder, "a device", compile=True) is None
    write_tuned(folder, choice_for(folder, dtype="bfloat16", by_dtype={"bfloat16": 1.0, "float16": 2.0}))
    assert fastest_dtype(folder, "a device") == "float16"


def test_a_file_from_before_modes_and_heads_is_read(folder):
    for shape, mode in (((1, 2, 1), "fused"), (PLAIN, "plain")):
        write_tuned(folder, choice_for(folder, block_lengths=shape))
        content = json.loads((folder / TUNED_FILE).read_text())
        for name in ("mode", "use_head", "copy_tokens", "by_dtype"):
            del content["choices"][0][name]
        (folder / TUNED_FILE).write_text(json.dumps(content))
        (found,) = read_tuned(folder, "a device", "float32")
        assert found.copy_tokens == 0
        assert (found.block_lengths, found.mode, found.use_head, found.by_dtype) == (shape, mode, True, None)


@pytest.mark.parametrize("change", ["masks", "lora", "no lora"])
def test_a_choice_for_other_weights_is_ignored_and_then_dropped(folder, base, change):
    write_tuned(folder, choice_for(folder, device="b device"))
    new = make_adapter(base, 2, lora_rank=0 if change == "no lora" else 2, seed=1 if change == "no lora" else 5)
    if change == "lora":
        new = replace(new, mask_embeddings=make_adapter(base, 2, lora_rank=2).mask_embeddings)
    save_adapter(new, folder)
    assert (folder / TUNED_FILE).exists()
    assert read_tuned(folder, "b device", "float32") == []
    write_tuned(folder, choice_for(folder))
    assert len(json.loads((folder / TUNED_FILE).read_text())["choices"]) == 1


def test_the_choice_of_a_packaged_adapter_is_kept_in_the_users_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(packaged, "_packaged", lambda name: folder)
    before = {path.name for path in folder.iterdir()}
    choice = choice_for(folder, by_dtype={"float32": 1.0})
    assert read_tuned("smollm2", "a device", "float32") == []
    kept = tmp_path / "cache" / "pardec" / "tuned" / "smollm2" / TUNED_FILE
    assert write_tuned("smollm2", choice) == kept
    assert read_tuned("smollm2", "a device", "float32") == [choice]
    assert fastest_dtype("smollm2", "a device") == "float32"
    assert {path.name for path in folder.iterdir()} - before == {"cache"}


def broken(folder, **changes) -> str:
    write_tuned(folder, choice_for(folder))
    content = json.loads((folder / TUNED_FILE).read_text())
    content["choices"][0].update(changes)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "expected JSON, found"),
        ("[]", r"expected a JSON object, found \[\]"),
        ("[" * 100_000, "expected JSON, found some that is nested too deep"),
        ('{"format_version": 2, "choices": []}', "expected format_version 1, found 2"),
        ('{"format_version": 1}', "choices: expected a valid list, found None"),
        ('{"format_version": 1, "choices": [{}]}', "expected key 'choices.0.device', found none"),
        ({"block_lengths": [2, 2]}, "block_lengths: expected K . 1 numbers"),
        ({"batch_size": 0}, "batch_size: expected an integer >= 1, found 0"),
        ({"plain_tokens_per_second": 0}, "plain_tokens_per_second: expected a finite number > 0, found 0"),
        ({"measured_tokens_per_second": float("nan")}, "measured_tokens_per_second: expected a finite number > 0"),
        ({"ms_per_step": float("inf")}, "ms_per_step: expected a finite number > 0, found inf"),
        ({"temperature": "nan"}, "temperature: expected a number >= 0, found nan"),
        (
            {"block_lengths": [1, 1], "copy_tokens": 4, "tree": PAIR},
            "block_lengths: expected K . 1 . 4 numbers from 0 to K",
        ),
        (
            {"tree": {**PAIR, "ranks": [0.5]}, "block_lengths": [1, 1]},
            r"choices\.0\.tree\.ranks\.0: expected a valid integer",
        ),
        ({"mode": "tree"}, r"choices\.0\.mode: expected"),
        ({"mode": "two_pass"}, r"block_lengths: expected those of two_pass, found \[1, 2, 1\]"),
        ({"mode": "plain"}, r"block_lengths: expected those of plain, found \[1, 2, 1\]"),
        ({"by_dtype": {"float32": float("nan")}}, "by_dtype: float32: expected a finite number > 0, found nan"),
        ({"by_dtype": {"fast": 3.0}}, "dtype: expected a torch dtype, .*, found 'fast'"),
        ({"by_dtype": {"float32": "fast"}}, r"choices\.0\.by_dtype\.float32: expected a valid number"),
        ({"ms_per_step": "slow"}, r"choices\.0\.ms_per_step: expected a valid number"),
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
    assert read_tuned(folder, "a device", "float32") == [first]
    assert sorted(path.name for path in folder.glob("*tuned*")) == [TUNED_FILE]


def test_choices_that_several_write_at_once_are_all_kept(folder):
    choices = [choice_for(folder, device=f"device {n}") for n in range(24)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda choice: write_tuned(folder, choice), choices))
    assert sorted(one.device for one in fresh_choices(folder)) == sorted(one.device for one in choices)
    assert {path.name for path in folder.iterdir() if "tuned" in path.name} == {TUNED_FILE}


def test_that_a_choice_cannot_be_kept_on_a_full_disk_is_known_before_anything_is_measured(folder):
    path = write_tuned(folder, choice_for(folder))
    kept = path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2, before[1]))  # writing more fails, as on a full disk
    try:
        with pytest.raises(OSError, match=rf"^{re.escape(str(path))}: expected an adapter folder .*, found File too l"):
            check_writable(folder)
        with pytest.raises(OSError, match=rf"^{re.escape(str(path))}: expected a file that can be written, found File"):
            tuned._write(folder, [choice_for(folder)] * 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == kept
    assert not list(folder.glob(".tuned*"))


def test_what_a_killed_tuning_left_goes_when_a_choice_is_kept(folder):
    old, fresh = folder / ".tuned.json-abc", folder / ".tuned.json-def"
    for leftover in (old, fresh):
        leftover.write_text("{")
    os.utime(old, (0, 0))
    write_tuned(folder, choice_for(folder))
    assert [one.name for one in folder.glob(".tuned*")] == [fresh.name]  # somebody may be at it
