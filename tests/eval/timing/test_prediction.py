"""Milliseconds on paper: bytes, operations and launches of a step by hand count, the model, the table beside a file."""

import json

import latency
import pytest
import torch
from programs import run
from reporting import prediction_tables
from timing.prediction import (
    SECONDS_PER_LAUNCH,
    SHARE_OF_BANDWIDTH,
    SHARE_OF_FLOPS,
    Counted,
    ShapeOnly,
    figures,
    predicted_seconds,
)
from timing.published_peaks import PEAKS, Peaks, peaks_of
from timing.shapes import config_of

from pardec.target import split_keys

PEAK = Peaks("a device", "DEVICE 1", bytes_per_second=1e9, flops_per_second=1e12)
TINY = ["--shape", "tiny", "--predict", "h100", "--contexts", "64", "--rows", "9"]


def step(**changes) -> Counted:
    plain = {"num_speculative_tokens": 0, "with_lora": False, "context": 64, "launches": 10}
    return Counted(**{**plain, "num_bytes": 10**6, "flops": 1e6, "least_bytes": 5 * 10**5, **changes})


@pytest.fixture(scope="module")
def llama_8b():
    return ShapeOnly(config_of("llama-8b"), torch.bfloat16, 16)


# ---------------------------------------------------------------------- what is counted


@pytest.mark.parametrize(
    ("num_drafted", "lora", "gigabytes"), [(0, False, 15.17), (4, False, 15.81), (8, False, 17.31), (4, True, 16.06)]
)
def test_bytes_of_a_large_model_are_those_of_an_independent_count(llama_8b, num_drafted, lora, gigabytes, monkeypatch):
    """Of whole keys; it took 1,024 slots where the engine's bucket has 1,280, and no copies of queries: 0.03 to 0.08 GB
    less."""
    monkeypatch.setattr(split_keys, "num_multiprocessors", lambda device: 1)
    assert llama_8b.count(num_drafted, lora, 1024).num_bytes / 1e9 == pytest.approx(gigabytes, abs=0.1)


@pytest.mark.parametrize(("num_drafted", "parts"), [(0, 16), (4, 8), (8, 2)])
def test_parts_of_the_keys_add_what_is_written_of_each_and_read_again(llama_8b, num_drafted, parts, monkeypatch):
    """Half precision out of the kernel, single precision once weighed; then one sum, and its conversion for a copy."""
    with_parts = llama_8b.count(num_drafted, False, 1024)
    monkeypatch.setattr(split_keys, "num_multiprocessors", lambda device: 1)
    whole = llama_8b.count(num_drafted, False, 1024)
    layers, rows = 32, 4 * (num_drafted + 1) ** 2
    sums = parts * 8 * (4 + 4 + 4) * (-(-rows // 32) * 32) + parts * 8 * 4 * rows  # written, their softmax, read
    numbers = 8 * rows * 128 * (parts * (2 + 2 + 4 + 4) + (4 + 4 + 2) - (2 + 2 + 2))
    assert with_parts.num_bytes - whole.num_bytes == pytest.approx(layers * (numbers + sums), rel=1e-3)
    assert with_parts.launches - whole.launches == layers * 3


def test_launches_are_those_of_the_layers_and_a_graph_adds_the_copies_into_its_state(llama_8b):
    small = ShapeOnly(config_of("tiny"), torch.bfloat16, 4)
    for num_drafted, lora in ((0, False), (2, False), (2, True)):
        at_2, at_32 = (shape.count(num_drafted, lora, 64).launches for shape in (small, llama_8b))
        each = (at_32 - at_2) / 30
        assert each <= (61 if lora else 47 if num_drafted else 44)
        assert at_2 - 2 * each <= (54 + 10 if num_drafted else 39 + 8)


def test_weights_the_lora_and_the_context_must_be_read_by_hand_count():
    shape = ShapeOnly(config_of("tiny"), torch.bfloat16, 4)
    V, D, inner, layers, kv = 512, 64, 128, 2, 32
    weights = layers * (2 * D * D + 2 * D * kv + 3 * D * inner + 2 * D) + D + V * D
    lora = layers * 4 * (2 * (D + D) + 2 * (D + kv) + 3 * (D + inner))
    plain, with_lora = shape.count(0, False, 100), shape.count(2, True, 100)
    assert plain.least_bytes == 2 * (weights + layers * 2 * kv * 100)
    assert with_lora.least_bytes == plain.least_bytes + 2 * lora
    assert with_lora.num_bytes > with_lora.least_bytes
    assert with_lora.flops == 9 * plain.flops == 9 * (2 * weights + layers * 4 * D * 100)


def test_nothing_of_a_model_is_held_in_memory(llama_8b):
    assert all(parameter.is_meta for parameter in llama_8b.base.parameters())


def test_positions_that_the_model_has_not_are_refused(llama_8b):
    with pytest.raises(ValueError, match=r"at most the 131072 positions of the model, found 131074 in a step"):
        llama_8b.count(0, False, 131072)


# ---------------------------------------------------------------------- the model


def test_a_step_takes_the_longer_of_bytes_and_arithmetic_and_a_price_for_each_launch():
    launches = 10 * SECONDS_PER_LAUNCH
    assert predicted_seconds(step(), PEAK) == pytest.approx(1e-3 / SHARE_OF_BANDWIDTH + launches)
    assert predicted_seconds(step(flops=1e10), PEAK) == pytest.approx(1e-2 / SHARE_OF_FLOPS + launches)
    assert predicted_seconds(step(launches=1010), PEAK) - predicted_seconds(step(), PEAK) == pytest.approx(
        1000 * SECONDS_PER_LAUNCH
    )


def test_figures_stand_beside_the_plain_step_of_their_context():
    steps = [step(), step(context=128, num_bytes=3 * 10**6), step(context=128, num_speculative_tokens=1, flops=1e10)]
    rows = figures(steps, PEAK, 16)
    assert [row["rows"] for row in rows] == [1, 1, 4]
    assert [row["ratio_to_plain"] for row in rows[:2]] == [1, 1]
    assert rows[2]["ratio_to_plain"] == pytest.approx(rows[2]["predicted_ms"] / rows[1]["predicted_ms"], abs=1e-3)
    assert [row["busy_with"] for row in rows] == ["memory", "memory", "arithmetic"]
    assert rows[0]["bound_ms"] == 0.5


def test_peaks_are_in_bytes_and_operations_per_second():
    assert all(0.5e12 < peaks.bytes_per_second < 1e13 for peaks in PEAKS.values())
    assert all(1e14 < peaks.flops_per_second < 1e15 for peaks in PEAKS.values())
    assert [peaks.name for peaks in peaks_of("L40S, h100,l40s")] == ["L40S", "H100 SXM"]


# ---------------------------------------------------------------------- the script


def test_a_table_for_every_device_says_that_it_is_a_prediction_and_writes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = run(latency.main, "--shape", "tiny", "--predict", "h100,rtx4090", "--contexts", "64,128")
    assert ended.code == 0, ended.err[-2000:]
    devices = ended.result["devices"]
    assert [device["name"] for device in devices] == ["H100 SXM", "RTX 4090"]
    for device in devices:
        places = [(row["context"], row["lora"], row["rows"]) for row in device["rows"]]
        each = [(False, 1), *((lora, rows) for lora in (False, True) for rows in (9, 25, 49, 81))]
        assert places == [(context, *one) for context in (64, 128) for one in each]
        assert all(0 < row["bound_ms"] <= row["predicted_ms"] for row in device["rows"])
        assert all(row["measured_ms"] is None for row in device["rows"])
    for title in ("H100 SXM, context 64, bfloat16", "RTX 4090, context 128, bfloat16"):
        assert f"PREDICTED, not measured: {title}" in ended.out
    assert "nothing was run on a device" in ended.out
    assert "measured ms" not in ended.out
    assert not list(tmp_path.rglob("*"))


def measured_result(**changes) -> dict:
    place = {"context": 64, "compile": False, "attention": "grouped", "lora_rank": 16, "ratio_to_plain": 1.0}
    rows = [
        {**place, "rows": 1, "num_speculative_tokens": 0, "lora": False, "ms_per_step": 2.0},
        {**place, "rows": 9, "num_speculative_tokens": 2, "lora": True, "ms_per_step": 9.0, "compile": True},
        {**place, "rows": 9, "num_speculative_tokens": 2, "lora": True, "ms_per_step": 3.0, "ratio_to_plain": 1.5},
    ]
    facts = {"model": "tiny", "dtype": "bfloat16", "device": "NVIDIA H100 80GB HBM3", "weight_bytes_per_step": 1}
    return {**facts, "rows": rows, **changes}


def written(path, result) -> str:
    path.write_text(json.dumps(result))
    return str(path)


@pytest.mark.parametrize("given", [True, False])
def test_what_was_measured_stands_beside_what_is_predicted(tmp_path, monkeypatch, given):
    path = written(tmp_path / "latency_h100.json", measured_result())
    written(tmp_path / "latency_other.json", measured_result(device="NVIDIA H200", rows=[]))
    monkeypatch.setattr(latency, "RESULTS", tmp_path / "none" if given else tmp_path)
    ended = run(latency.main, *TINY, *(["--measured", path] if given else []))
    assert ended.code == 0, ended.err[-2000:]
    assert "context 64, bfloat16; measured on NVIDIA H100 80GB HBM3" in ended.out
    rows = ended.result["devices"][0]["rows"]
    assert [(row["rows"], row["lora"], row["measured_ms"]) for row in rows] == [
        (1, False, 2.0), (9, False, None), (9, True, 3.0)
    ]  # fmt: skip
    assert rows[2]["measured_ratio_to_plain"] == 1.5
    assert f"{3 / rows[2]['predicted_ms']:.2f}" in ended.out


@pytest.mark.parametrize(
    "changes",
    [{"model": "llama-8b"}, {"dtype": "float16"}, {"device": "NVIDIA H100 PCIe"}],
    ids=lambda one: next(iter(one)),
)
def test_results_of_something_else_are_not_found(tmp_path, changes):
    written(tmp_path / "latency_h100.json", measured_result(**changes))
    found = prediction_tables.matching_result("tiny", "bfloat16", "NVIDIA H100 80GB HBM3", tmp_path)
    assert found is None


def test_a_comparison_of_attention_routes_is_not_what_the_engine_takes(tmp_path):
    both = [row | {"attention": name} for name in ("grouped", "stock") for row in measured_result()["rows"]]
    written(tmp_path / "latency_attention.json", measured_result(rows=both))
    device = measured_result()["device"]
    assert prediction_tables.matching_result("tiny", "bfloat16", device, tmp_path) is None
    written(tmp_path / "latency_h100.json", measured_result())
    assert prediction_tables.matching_result("tiny", "bfloat16", device, tmp_path) == measured_result()


def test_results_that_are_kept_can_be_read():
    for path in latency.RESULTS.glob("latency_*.json"):
        assert prediction_tables.read_result(path)["rows"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--predict", "h100,b9000", "--shape", "tiny"],
            "predict: expected some of h100, h200, a100, l40s, rtx4090, f",
        ),
        (["--predict", "", "--shape", "tiny"], "predict: expected some of h100"),
        (["--predict", "h100"], "predict: expected a --shape, found none"),
        (["--predict", "h100", "--shape", "llama-9b"], "shape: expected one of tiny, llama-100m"),
        ([*TINY, "--rows", "1,5"], "rows: expected squares"),
        ([*TINY, "--contexts", "131072"], "contexts: expected at most the 131072 positions"),
        ([*TINY, "--lora-rank", "0"], "lora_rank: expected an integer >= 1, found 0"),
        ([*TINY, "--dtype", "float32"], "dtype: expected bfloat16 or float16"),
        ([*TINY, "--profile"], "predict: expected no options of steps that are timed, found profile"),
        (["runs/mine", *TINY], "predict: expected no options of steps that are timed, found directory"),
        ([*TINY, "--quick"], "predict: expected no options of steps that are timed, found quick"),
        (["--quick", "--measured", "x.json"], "measured: expected --predict beside it, found none"),
        ([*TINY, "--predict", "h100,h200", "--measured", "x.json"], "measured: expected a file beside one device"),
        ([*TINY, "--measured", "no-such.json"], "no-such.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message):
    ended = run(latency.main, *arguments)
    assert ended.code == 2
    assert message in ended.error
    assert ended.out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no JSON", "measured: expected a JSON file written by latency.py, found another"),
        ("[1]", "measured: expected a JSON file written by latency.py, found another"),
        ('{"rows": []}', "measured: expected a JSON file written by latency.py, found another"),
        (
            json.dumps(measured_result(model="llama-1b")),
            "measured: expected tiny in bfloat16, found llama-1b in bfloat16",
        ),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, message):
    (tmp_path / "file.json").write_text(content)
    ended = run(latency.main, *TINY, "--measured", tmp_path / "file.json")
    assert ended.code == 2
    assert message in ended.error
