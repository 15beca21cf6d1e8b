"""Prompts that are run by graphs, without a GPU: a tape of tensor operations stands for a graph."""

from types import SimpleNamespace

import pytest
import torch
from covering import every_pair
from greedy_oracle import plain_generate, prompts
from recorded_steps import V, decoder_for, rerun, results, tape
from timing.launches import counted_step
from tiny_models import tiny_model
from without_numbers import tiny_decoder

from pardec.decoding import prompt_graphs
from pardec.decoding.engine import Engine
from pardec.decoding.sampling import TokenLaw
from pardec.target.cache import SlotCache

NEW = 6
NUM_LAYERS = 2


class Recorder:
    """A recorder that counts what it records, and refuses the first times with what `failures` holds."""

    def __init__(self, record=tape, failures=()):
        self.record, self.failures, self.num_recorded = record, list(failures), 0

    def __call__(self, run, generator, site):
        self.num_recorded += 1
        if self.failures:
            raise self.failures.pop(0)
        return self.record(run, generator, site)


def engine_for(model, recorder, mode: str = "fused", **options) -> Engine:
    decoder = decoder_for(model, mode, TokenLaw(True), new_tokens=NEW, **options)
    return Engine(decoder, 1, captured=True, recorder=recorder)


def run(engine: Engine, lengths) -> list:
    for _ in engine.run(prompts(V, lengths)):
        pass
    return results(engine.decoder, engine.state)[: len(lengths)]


@pytest.fixture
def no_steps(monkeypatch):
    """Steps are not captured, so that what is recorded are prompts."""
    monkeypatch.setattr("pardec.decoding.graphs.CapturedSteps.step", lambda self: self._uncaptured())


@pytest.mark.parametrize("record", [tape, rerun])
@pytest.mark.parametrize(
    ("family", "mode", "options"),
    [
        ("llama", "plain", {}),
        ("llama", "two_pass", {}),
        ("llama", "fused", {}),
        ("gemma3-mixed-windows", "fused", {}),
        ("gpt2", "fused", {}),
        ("llama-eager", "fused", {}),
        ("llama", "fused", {"head_width": 6}),
        ("gpt2", "fused", {"head_width": 6, "noise": True}),
        ("gemma3-mixed-windows", "fused", {"copy_tokens": 2, "noise": True}),
    ],
)
def test_one_graph_serves_prompts_of_other_lengths_as_if_each_ran_by_itself(family, mode, options, record, no_steps):
    """What is drafted behind them, too, by embeddings and LoRA: counts of accepted drafts are the same."""
    model, recorder = tiny_model(family), Recorder(record)
    plain = Engine(decoder_for(model, mode, TokenLaw(True), new_tokens=NEW, **options), 1)
    engine = engine_for(model, recorder, mode, **options)
    for lengths in ((30, 9), (1, 2), (32, 32), (17, 31), (30, 9)):
        assert run(engine, lengths) == run(plain, lengths)
    assert recorder.num_recorded == 1


@pytest.mark.parametrize(
    "calls",
    [
        [((90,), 1), ((5,), 2), ((31,), 2), ((33,), 3), ((64,), 3), ((65,), 3), ((1,), 3)],
        [((90, 1, 1), 1), ((5, 90, 7, 2), 2), ((9, 9, 32), 3), ((2, 2, 2), 3), ((60, 33, 8, 8), 4), ((3, 70, 1), 4)],
    ],
    ids=["one prompt", "three and four, which share a cache"],
)
def test_graphs_are_made_by_number_of_prompts_and_range_of_lengths(calls, no_steps):
    model, recorder = tiny_model("llama"), Recorder()
    engine = engine_for(model, recorder)
    for lengths, num_recorded in calls:
        found = [tokens for tokens, _, _ in run(engine, lengths)]
        assert found == [plain_generate(model, row, NEW) for row in prompts(V, lengths)]
        assert recorder.num_recorded == num_recorded


def test_prompts_of_many_tokens_run_as_they_are(no_steps, monkeypatch):
    monkeypatch.setattr(prompt_graphs, "MAX_TOKENS", 64)
    recorder = Recorder()
    engine = engine_for(tiny_model("llama"), recorder)
    for lengths, num_recorded in (((33, 2), 0), ((33,), 1), ((20, 9), 2), ((65,), 2)):
        run(engine, lengths)
        assert recorder.num_recorded == num_recorded


def test_so_many_graphs_are_kept_and_the_one_that_was_used_last_stays(no_steps, monkeypatch):
    monkeypatch.setattr(prompt_graphs, "_MAX_GRAPHS", 2)
    recorder = Recorder()
    engine = engine_for(tiny_model("llama"), recorder)
    for length, num_recorded in ((90, 1), (60, 2), (90, 2), (30, 3), (90, 3), (60, 4), (90, 4)):
        run(engine, (length,))
        assert recorder.num_recorded == num_recorded


def test_what_stood_behind_a_longer_prompt_is_not_seen_by_a_shorter_one(no_steps):
    """In a model whose every token changes what the next ones are."""
    model, recorder = tiny_model("gemma3-mixed-windows"), Recorder()
    engine, fresh = engine_for(model, recorder), engine_for(model, Recorder())
    run(engine, (31,))
    logits = []
    for one in (engine, fresh):
        run(one, (4,))
        logits.append(one._prompt_graphs._graphs[1, 32].logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300, 511, 513, 1000, 1024])
def test_padding_is_less_than_a_quarter_of_the_next_power_of_two(length):
    width = prompt_graphs.PromptGraphs().width(1, length)
    assert length <= width <= max(length + 32, 1.5 * length)
    assert prompt_graphs.PromptGraphs().width(1, width) == width


def test_where_prompts_cannot_be_captured_they_run_after_one_warning_that_says_why(no_steps):
    model, recorder = tiny_model("llama"), Recorder(failures=[RuntimeError("operation not permitted")])
    engine = engine_for(model, recorder)
    expected = [plain_generate(model, row, NEW) for row in prompts(V, (5, 2))]
    with pytest.warns(UserWarning, match="prompts cannot be captured as a CUDA graph .*not permitted") as caught:
        assert [tokens for tokens, _, _ in run(engine, (5, 2))] == expected
    assert len(caught) == 1
    assert [tokens for tokens, _, _ in run(engine, (5, 2))] == expected
    assert recorder.num_recorded == 1


def test_where_memory_runs_out_for_it_prompts_run_uncaptured(no_steps):
    model, recorder = tiny_model("llama"), Recorder(failures=[torch.OutOfMemoryError("Tried to allocate 2.00 GiB")])
    engine = engine_for(model, recorder)
    expected = [plain_generate(model, row, NEW) for row in prompts(V, (5, 2))]
    for _ in range(2):
        assert [tokens for tokens, _, _ in run(engine, (5, 2))] == expected
    assert recorder.num_recorded == 1


def test_a_prompt_that_is_begun_already_runs_uncaptured(no_steps):
    """Of a kept cache, whose tokens are not run again."""
    model, recorder = tiny_model("llama"), Recorder()
    engine = engine_for(model, recorder)
    [row] = prompts(V, (20,))
    for _ in engine.run([row]):
        pass
    kept = engine.state.cache.stretched(torch.arange(12), 12)
    engine = engine_for(model, recorder)
    for _ in engine.run([row], kept=kept, num_kept=12):
        pass
    assert results(engine.decoder, engine.state)[0][0] == plain_generate(model, row, NEW)
    assert recorder.num_recorded == 1


@pytest.mark.parametrize(
    ("family", "mode", "options", "batch_size"),
    every_pair(
        ["llama", "gemma3-mixed-windows", "gpt2"],
        ["plain", "two_pass", "fused"],
        [{}, {"lora": True}, {"lora": True, "packed": True}, {"head": True}],
        [1, 2],
    ),
    ids=str,
)
def test_what_is_captured_waits_for_no_value_and_brings_nothing_from_the_host(family, mode, options, batch_size):
    """On tensors without numbers, in bfloat16, as on a GPU."""
    decoder = tiny_decoder(family, mode, NUM_LAYERS, **({} if mode == "plain" else options))
    cache = SlotCache(NUM_LAYERS, 64, batch_size)
    padded = torch.zeros(batch_size, 32, dtype=torch.long, device="meta")
    lengths = torch.zeros(batch_size, dtype=torch.long, device="meta")
    counts = []

    def look(compute, padded, lengths, cache, held):
        for _ in range(2):  # the first allocates
            with counted_step() as count:
                found = compute(padded, lengths)
            counts.append(count)
        return found

    with torch.no_grad():
        decoder._prefill._by(SimpleNamespace(run=look), padded, lengths, cache)
    assert counts[1].num_launches > 10 * NUM_LAYERS
    assert not counts[1].asked
    assert not counts[1].on_host
