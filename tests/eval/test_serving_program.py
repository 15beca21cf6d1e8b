"""eval/serving.py: what is counted of a call, and a run with a stand-in for vLLM that knows its answers."""

import json
import sys
from pathlib import Path

import pytest
import serving
import torch
from greedy_oracle import plain_generate
from programs import run
from timing.serving_ways import Way, decode_in_turn, row_of
from timing.vllm_process import Served, VllmProcess

from pardec.adapters.files import save_adapter
from pardec.data.benchmarks import read_prompts

NEW = 6
# has vLLM's counters, in which a first drafted token is always accepted and a second one every other time
STAND_IN = """
import json, time
from pathlib import Path
from types import SimpleNamespace

__version__ = "0.0.1"
ANSWERS = {tuple(ids): new for ids, new in json.loads(Path(__file__).with_name("answers.json").read_text())}

class SamplingParams(SimpleNamespace):
    pass

class LLM:
    def __init__(self, model, dtype, max_model_len, max_num_seqs, speculative_config, enforce_eager=False, **rest):
        print("vLLM prints", model)
        if max_num_seqs > 8:
            raise ValueError("max_num_seqs: too many")
        self.draft, self.rounds, self.began = speculative_config, 100, None
        if self.draft is not None:
            config = json.loads((Path(self.draft["model"]) / "config.json").read_text())
            assert (self.draft["method"], self.draft["parallel_drafting"]) == ("draft_model", True)
            print(config["pard_token"])

    def collective_rpc(self, function):
        return [(3, 5)]

    def generate(self, prompts, law, use_tqdm):
        assert (law.temperature, law.ignore_eos) == (0.0, True)
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass
        self.rounds += 4
        tokens = [ANSWERS[tuple(prompt["prompt_token_ids"])][: law.max_tokens] for prompt in prompts]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=new)]) for new in tokens]

    def get_metrics(self):
        K = self.draft["num_speculative_tokens"] if self.draft else 0
        by_position = [self.rounds, self.rounds // 2, *[0] * K][:K]
        found = {"num_drafts": self.rounds, "num_accepted_tokens": sum(by_position)} if K else {}
        numbers = [SimpleNamespace(name=f"vllm:spec_decode_{name}", value=value) for name, value in found.items()]
        lists = [SimpleNamespace(name="vllm:spec_decode_num_accepted_tokens_per_pos", values=by_position)] if K else []
        return [*numbers, *lists, SimpleNamespace(name="vllm:requests", value=7)]
"""
ASKED = {"model": "m", "dtype": "float32", "max_model_len": 64, "max_num_seqs": 2}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory, tiny_base, tokenizer) -> Path:
    """A python that has the stand-in as its vLLM."""
    folder = tmp_path_factory.mktemp("vllm")
    prompts = read_prompts("python-stdlib", tokenizer, split="test", num_prompts=2, max_prompt_tokens=None)
    rows = [[1, 2], [3]] + [prompt.token_ids for prompt in prompts]
    answers = [[ids, plain_generate(tiny_base, ids, NEW, min_new_tokens=NEW)] for ids in rows]
    (folder / "answers.json").write_text(json.dumps(answers))
    (folder / "vllm.py").write_text(STAND_IN)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


@pytest.fixture(scope="module")
def shared(packaged_adapter, tmp_path_factory) -> Path:
    """An adapter that the plugin and stock vLLM take."""
    folder = tmp_path_factory.mktemp("adapters") / "shared"
    save_adapter(packaged_adapter(2, mask_sharing="shared"), folder)
    return folder


def served(num_tokens: int, seconds: float, num_drafts: int = 0, accepted: tuple[int, ...] = ()) -> Served:
    return Served([[0] * num_tokens], seconds, num_drafts, list(accepted))


def test_a_call_has_the_counts_of_itself_alone(stand_in):
    with VllmProcess(stand_in, ASKED) as plain:
        found = plain.decode([[1, 2], [3]], NEW)
        assert (plain.version, plain.own_parameters, plain.target_parameters) == ("0.0.1", 3, 5)
    assert [len(new) for new in found.tokens] == [NEW, NEW]
    assert (found.acceptance_length, found.rates) == (1.0, [])
    assert found.cpu_seconds >= 0.02


def test_counters_of_drafts_are_what_a_call_added(stand_in, tmp_path):
    (tmp_path / "config.json").write_text('{"pard_token": 1}')
    with VllmProcess(stand_in, ASKED | {"draft": str(tmp_path), "num_speculative_tokens": 3}) as drafting:
        for _ in range(2):
            found = drafting.decode([[3]], 2)
            assert (found.num_drafts, found.accepted_by_position) == (4, [4, 2, 0])
            assert (found.acceptance_length, found.rates) == (2.5, [1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"max_num_seqs": 9}, "vllm: expected an engine that answers, found exit code 1: ValueError: max_num_seqs: t"),
        ({"draft": "/nowhere", "num_speculative_tokens": 2}, "found exit code 1: FileNotFoundError: "),
    ],
)
def test_an_engine_that_does_not_start_is_told_with_its_last_line(stand_in, asked, words):
    with pytest.raises(ValueError, match=words) as caught, VllmProcess(stand_in, ASKED | asked):
        pass
    assert "\n" not in str(caught.value)


def test_an_engine_that_ends_within_a_call_is_told(stand_in):
    with VllmProcess(stand_in, ASKED) as plain, pytest.raises(ValueError, match="exit code 1: KeyError: "):
        plain.decode([[9, 9, 9]], 1)


def test_ways_take_turns_on_every_batch_and_the_first_pass_is_not_counted():
    order = []

    def way(name: str) -> Way:
        def decode(prompts, max_new_tokens):
            order.append((name, prompts[0][0]))
            return served(max_new_tokens, 1.0)

        return Way("vLLM", name, decode)

    ways = [way("a"), way("b")]
    decode_in_turn(ways, [[[1]], [[2]]], max_new_tokens=3, repetitions=1)
    once = [("a", 1), ("b", 1), ("b", 2), ("a", 2)]
    assert order == [*once, ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert [len(one.calls) for one in ways] == [2, 2]


def test_ratios_are_those_of_neighbours_and_exact_tokens_are_no_accepted_drafts():
    plain = Way("vLLM", "plain", served, calls=[served(10, 1.0), served(10, 2.0)])
    ours = Way("pardec", "plain", served, calls=[served(10, 2.0), served(10, 2.0)])
    calls = [served(10, 0.5, 4, (4, 3, 1)), served(10, 4.0, 6, (6, 0, 0))]
    plugin = Way("vLLM", "plugin", served, "mine", 2, exact_tokens=1, calls=calls)
    row = row_of(plugin, [plain, ours, plugin])
    assert row["tokens_per_cpu_second"] == round(20 / 4.5, 2)
    assert (row["ratio_to_vllm_plain"], row["ratio_to_vllm_plain_quartiles"]) == (1.25, [0.875, 1.625])
    assert row["ratio_to_pardec_plain"] == 2.25
    assert row["accepted_per_round"] == 0.4
    assert row_of(ours, [plain, ours])["accepted_per_round"] is None


def test_a_run_compares_both_engines_by_every_door_that_takes_the_adapter(stand_in, shared, adapters, tmp_path):
    options = ("--vllm-python", stand_in, "--num-prompts", 2, "--max-new-tokens", NEW, "--batch-sizes", "1,2")
    options += ("--repetitions", 1, "--threads", torch.get_num_threads(), "--output", tmp_path / "found")
    ended = run(serving.main, shared, adapters / "lora", "--num-speculative-tokens", 2, *options)
    assert ended.code == 0, ended.err[-2000:]
    result = ended.result
    assert json.loads((tmp_path / "found.json").read_text()) == result
    assert "| 1 | vLLM | stock draft | shared | 2 |" in (tmp_path / "found.md").read_text()
    ways = [(row["engine"], row["way"], row["adapter"]) for row in result["rows"] if row["batch_size"] == 2]
    assert ways == [
        ("vLLM", "plain", None), ("pardec", "plain", None),
        ("pardec", "fused", "shared"), ("pardec", "two_pass", "shared"),
        ("vLLM", "plugin", "shared"), ("vLLM", "stock draft", "shared"),
        ("pardec", "fused", "lora"), ("pardec", "two_pass", "lora"), ("vLLM", "plugin", "lora"),
    ]  # fmt: skip
    assert all(row["identical"] and row["tokens_per_cpu_second"] > 0 for row in result["rows"])
    drafted = [row["accepted_per_round"] for row in result["rows"] if row["adapter"] and row["engine"] == "vLLM"]
    assert drafted == [0.5] * 6
    (refused,) = result["left_out"]
    assert (refused["way"], refused["adapter"]) == ("stock draft", "lora")
    assert "found a LoRA" in refused["reason"]
    assert (result["versions"]["vllm"], result["base"], result["threads"]) == ("0.0.1", "tiny-python", 1)


def test_tokens_that_are_not_those_of_generate_are_told(stand_in, shared, tmp_path):
    answers = stand_in.with_name("answers.json")
    before = answers.read_text()
    answers.write_text(json.dumps([[ids, [new[0], new[1] + 1, *new[2:]]] for ids, new in json.loads(before)]))
    options = ("--vllm-python", stand_in, "--quick", "--max-new-tokens", NEW, "--num-speculative-tokens", 1)
    try:
        ended = run(serving.main, shared, *options, "--output", tmp_path / "found")
    finally:
        answers.write_text(before)
    assert ended.code == 1
    assert len(ended.result["problems"]) == 6  # of three ways of vLLM
    assert "batch 1, vLLM plain: python-stdlib/test/" in ended.result["problems"][0]
    assert "token 1" in ended.result["problems"][0]
    assert {row["engine"] for row in ended.result["rows"] if not row["identical"]} == {"vLLM"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--vllm-python", "/no/python"), "vllm: expected a python, found /no/python (No such file or directory)"),
        (("--vllm-python", "x", "--repetitions", 0), "repetitions: expected an integer >= 1, found 0"),
        (("--vllm-python", "x", "--batch-sizes", "3"), "batch_sizes: expected at most 2, the number of prompts, found"),
        (("--vllm-python", "x", "--num-speculative-tokens", "0"), "num_speculative_tokens: expected integers >= 1"),
        (("--vllm-python", "x", "--max-new-tokens", 5000), "expected fewer than the model's 2048 positions, found 500"),
    ],
)
def test_bad_input_is_one_line(shared, options, words, tmp_path):
    ended = run(serving.main, shared, "--quick", "--output", tmp_path / "found", *options)
    assert words in ended.error
    assert not (tmp_path / "found.json").exists()
