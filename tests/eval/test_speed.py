"""The speed benchmark: its figures from hand-made calls, what every way decodes, and the script from end to end."""

import json
import shutil
from contextlib import contextmanager

import pytest
import speed
import torch
from programs import Ended, run
from reporting import speed_tables as tables
from timing import baselines
from timing import calls as timing
from timing.baselines import Decoded, Setting, Way
from timing.calls import Call, Timed
from timing.references import References
from tiny_models import make_adapter
from transformers import LlamaConfig, LlamaForCausalLM

from pardec.adapters.tuned import TunedChoice, weights_of, write_tuned
from pardec.data.benchmarks import Prompt
from pardec.decoding.engines import Engines
from pardec.measures.divergence import Divergence
from pardec.model import SelfSpeculativeModel
from pardec.run import device_name, written_aside
from pardec.target.base import eos_token_ids, neutral_generation_config

GREEDY = Setting("greedy", 12)
SAMPLED = Setting("sampled", 12, temperature=0.8, top_k=10)


def tuned(**choice) -> TunedChoice:
    """A choice for this device."""
    facts = {
        "device": device_name(torch.device("cpu")), "dtype": "float32", "compile": False, "weights": {},
        "ms_per_step": 1.0, "predicted_tokens_per_second": 1.0, "measured_tokens_per_second": 1.0,
        "plain_tokens_per_second": 1.0, "conditional_acceptance": [0.5, 0.5],
    }  # fmt: skip
    return TunedChoice(**{**facts, **choice})


@pytest.fixture(scope="module")
def folder(tiny_base, adapters, tmp_path_factory):
    """Two adapters, one of them tuned, and two assistants, of which one has another vocabulary."""
    folder = tmp_path_factory.mktemp("speed")
    shutil.copytree(adapters, folder, dirs_exist_ok=True)
    directory = folder / "lora"
    write_tuned(directory, tuned(weights=weights_of(directory), block_lengths=(2, 1, 0)))
    for name, vocabulary in (("assistant", tiny_base.config.vocab_size), ("stranger", 100)):
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig(
            vocab_size=vocabulary, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0, **sizes
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
    return folder


@pytest.fixture
def call_speed(monkeypatch, folder):
    """Runs the program in the folder of the adapters."""

    def call(*arguments: object) -> Ended:
        monkeypatch.chdir(folder)
        return run(speed.main, *arguments)

    return call


def way(name="fused", **facts) -> Way:
    return Way(name, lambda prompts, seed: Decoded([[0]], 1, 1), **facts)


def calls(*seconds: float, tokens: int = 10, steps: int = 9, **counts) -> list[Call]:
    decoded = Decoded([[1] * tokens], steps, counts.pop("rows", steps), **counts)
    return [Call(decoded, one) for one in seconds]


# ---------------------------------------------------------------------- figures


def test_ratios_pair_the_calls_of_one_batch_and_repetition():
    # a machine that is twice as slow in the second pass: the ratio does not see it
    plain, fused = calls(1.0, 2.0), calls(0.5, 1.0)
    assert timing.ratios(fused, plain) == [2.0, 2.0]
    with pytest.raises(ValueError):
        timing.ratios(fused, plain[:1])


def test_quartiles_interpolate():
    assert timing.quartiles([4.0, 1.0, 3.0, 2.0]) == (1.75, 2.5, 3.25)


def test_figures_are_sums_over_sums_and_medians_of_ratios():
    counts = {"rows": 36, "num_drafts": 4, "num_accepted_tokens": 6}
    fused = Timed(way(adapter="lora", num_speculative_tokens=2, model_bytes=2**20), calls(0.5, 1.6, steps=4, **counts))
    plain = Timed(way("plain"), calls(1.0, 2.0))
    generate = Timed(way("generate"), calls(2.0, 1.6))
    row = timing.figures(fused, plain, generate)
    assert row["tokens_per_second"] == round(20 / 2.1, 2)
    assert row["mean_acceptance_length"] == 2.5
    assert row["ms_per_step"] == round(1000 * 2.1 / 8, 3)
    assert row["rows_per_step"] == 9
    assert (row["ratio_to_plain"], row["ratio_to_plain_quartiles"]) == (1.625, [1.4375, 1.8125])
    assert (row["ratio_to_generate"], row["ratio_to_generate_quartiles"]) == (2.5, [1.75, 3.25])
    assert (row["num_new_tokens"], row["num_steps"]) == (20, 8)
    assert row["peak_memory_mib"] is None
    fused.memory_bytes = 2**19
    assert timing.figures(fused, plain, generate)["peak_memory_mib"] == 1.5
    assert timing.figures(plain, plain, generate)["mean_acceptance_length"] == 1


def test_a_single_token_has_no_step_to_divide_by():
    plain = Timed(way("plain"), calls(1.0, tokens=1, steps=0))
    row = timing.figures(plain, plain, plain)
    assert (row["ms_per_step"], row["rows_per_step"], row["ratio_to_plain"]) == (None, None, 1)


def test_ratios_by_category_are_medians_within_it():
    plain = Timed(way("plain"), calls(1.0, 1.0, 1.0, 1.0))
    fused = Timed(way(), calls(0.5, 1.0, 0.25, 0.5))
    assert timing.ratio_by_category(fused, plain, ["code", "chat"]) == {"code": 3.0, "chat": 1.5}


def test_every_way_decodes_every_batch_in_turn_and_the_first_pass_does_not_count():
    seen = []

    def recorded(name):
        def decode(prompts, seed):
            seen.append((name, prompts[0][0], seed))
            return Decoded([[seed]], 1, 1)

        return Way(name, decode)

    ways = [recorded("a"), recorded("b"), recorded("c")]
    timed = timing.time_ways(ways, [[[7]], [[8]]], repetitions=2, device=torch.device("cpu"))
    assert [name for name, _, _ in seen] == list("abccba" * 3)[:6] + list("abccba" * 2)
    # the same prompts and seeds for every way, in the same order
    assert [[(p, s) for n, p, s in seen if n == name] for name in "abc"] == [[(7 + s % 2, s) for s in range(6)]] * 3
    assert [[call.decoded.token_ids for call in one.calls] for one in timed] == [[[[s]] for s in (2, 3, 4, 5)]] * 3


def test_fewer_batches_may_warm_up():
    seen = []
    ways = [Way("a", lambda prompts, seed: (seen.append(prompts[0][0]), Decoded([[seed]], 1, 1))[1])]
    (one,) = timing.time_ways(ways, [[[7]], [[8]], [[9]]], repetitions=1, device=torch.device("cpu"), num_warm_up=1)
    assert seen == [7, 7, 8, 9]
    assert len(one.calls) == 3


def test_ties_are_told_from_differences_and_counted_once():
    def divergence(explained):
        return Divergence("p", 3, (1, 2), 0.1, 0.01, 0.1, 0.1, 1e-4, explained)

    batches = [[Prompt([1], "code", "p")], [Prompt([2], "code", "q")]]
    timed = [Timed(way(name), calls(1.0, 1.0, 1.0, 1.0)) for name in ("plain", "fused", "generate")]
    tie = {2: divergence(True)}
    rows, problems = timing.rows_of(timed, batches, lambda prompt, ids: tie.get(prompt.token_ids[0]))
    assert [(row["identical"], row["num_ties"]) for row in rows] == [(True, 1)] * 3
    assert not problems
    wrong = {1: divergence(False)} | tie
    rows, problems = timing.rows_of(timed, batches, lambda prompt, ids: wrong.get(prompt.token_ids[0]))
    assert [(row["identical"], row["num_ties"]) for row in rows] == [(False, 1)] * 3
    assert "new token 3" in problems[0]
    rows, _ = timing.rows_of(timed, batches, None)
    assert "identical" not in rows[0]


# ---------------------------------------------------------------------- ways of decoding


def small_model(make_llama, **config) -> SelfSpeculativeModel:
    base = make_llama(**config)
    base.generation_config = neutral_generation_config(base, stop_at_eos=False)
    return SelfSpeculativeModel(base, None, make_adapter(base, 2, lora_rank=2))


PROMPTS = [[5, 6, 7, 8, 9], [11, 12]]


def test_all_ways_decode_the_same_greedy_tokens_and_as_many_sampled_ones(make_llama):
    model = small_model(make_llama)
    model.tuned = tuned(block_lengths=(2, 1, 0))
    for batch in (PROMPTS[:1], PROMPTS):
        ways, _ = baselines.ways_for({"a": model}, [1, 2], make_llama(seed=1), GREEDY, len(batch))
        found = {(one.name, one.num_speculative_tokens): one.decode(batch, 0).token_ids for one in ways}
        assert len(found) == len(ways)
        expected = [len(found), len(found["plain", None][0])]
        assert expected == [10 if len(batch) == 1 else 8, 12]
        assert all(tokens == found["plain", None] for tokens in found.values())
        ways, _ = baselines.ways_for({"a": model}, [1, 2], make_llama(seed=1), SAMPLED, len(batch))
        assert all([len(ids) for ids in one.decode(batch, 0).token_ids] == [12] * len(batch) for one in ways)
        again = [ways[0].decode(batch, seed).token_ids for seed in (3, 3, 4)]
        assert again[0] == again[1] != again[2]


def test_ways_that_are_not_asked_for_are_named_as_left_out(make_llama):
    base = make_llama()
    model = SelfSpeculativeModel(base, None, make_adapter(base, 2))
    found, left_out = baselines.ways_for({"a": model}, [1], None, GREEDY, 1, without=["two_pass", "prompt lookup"])
    assert [way.name for way in found] == ["plain", "copies", "fused", "fused + copies", "generate"]
    unasked = [one["way"] for one in left_out if one["reason"] == baselines.NOT_ASKED_FOR]
    assert unasked == ["two_pass", "prompt lookup"]
    assert speed.left_out_names(" two_pass, generate static,") == ["two_pass", "generate static"]
    with pytest.raises(ValueError, match=r"without: expected none of plain, generate, .* found 'plain'"):
        speed.left_out_names("plain")


def test_tuned_only_leaves_out_what_drafts_otherwise(make_llama):
    model = small_model(make_llama)
    model.tuned = tuned(block_lengths=(2, 1, 0))
    ways, _ = baselines.ways_for({"a": model}, [1, 2], None, GREEDY, 1, tuned_only=True)
    assert [one.name for one in ways] == ["plain", "fused tuned", "generate", "prompt lookup"]


def test_references_are_what_generate_gave_and_else_run_now(make_llama):
    model = small_model(make_llama)
    prompts = [Prompt(ids, "code", "p") for ids in PROMPTS]
    expected = [baselines.generated_alone(model.base_model, [ids], 12)[0] for ids in PROMPTS]
    references = References(model.base_model, 12)
    false = Decoded([[1] * 12], 1, 1)  # what was taken is believed
    references.take([Timed(Way("generate", lambda *_: false), [Call(false, 1.0)])], [[PROMPTS[0]]])
    assert references.compare(prompts[0], [1] * 12) is None
    assert references.compare(prompts[0], expected[0]) is not None
    assert references.compare(prompts[1], expected[1]) is None


def test_rows_and_rounds_of_every_way(make_llama):
    model = small_model(make_llama)
    model.tuned = tuned(block_lengths=(2, 1, 0))
    ways, left_out = baselines.ways_for({"a": model}, None, None, GREEDY, 1)
    rows = {}
    for one in ways:
        decoded = one.decode(PROMPTS[:1], 0)
        rows[one.name, one.num_speculative_tokens] = decoded.num_rows / decoded.num_steps
        drafts_and_tokens = (decoded.num_drafts, decoded.num_steps)
        if one.name in ("plain", "generate"):
            assert drafts_and_tokens == (0, 11)
    del rows["prompt lookup", None]
    fused = {("fused", 1): 4, ("fused", 2): 9, ("fused tuned", 2): 6, ("copies", 0): 9, ("fused + copies", 1): 12}
    assert rows == {("plain", None): 1, ("two_pass", 2): 6, **fused, ("generate", None): 1}
    assert [one["way"] for one in left_out] == ["generate static"]


@pytest.mark.parametrize(
    ("choice", "name", "rows"),
    [
        ({"mode": "two_pass", "block_lengths": (1, 1)}, "two_pass tuned", 4),
        ({"block_lengths": (0,)}, "plain tuned", 1),
    ],
)
def test_a_tuned_choice_of_another_mode_is_a_way_of_that_name(make_llama, choice, name, rows):
    model = small_model(make_llama)
    model.tuned = tuned(**choice)
    ways, _ = baselines.ways_for({"a": model}, [1], None, GREEDY, 1)
    (one,) = [way for way in ways if way.name.endswith("tuned")]
    decoded = one.decode(PROMPTS[:1], 0)
    assert (one.name, one.block_lengths) == (name, None)
    assert decoded.num_rows / decoded.num_steps == rows
    assert decoded.num_drafts == (decoded.num_steps if "two_pass" in name else 0)


def test_a_tuned_choice_with_copies_is_run_with_them(make_llama):
    model = small_model(make_llama)
    model.tuned = tuned(block_lengths=(0, 0, 0, 0), copy_tokens=3)
    ways, _ = baselines.ways_for({"a": model}, [1], None, GREEDY, 1)
    (one,) = [way for way in ways if way.name.endswith("tuned")]
    assert (one.name, one.block_lengths, one.num_speculative_tokens) == ("fused + copies tuned", (0, 0, 0, 0), 0)
    prompt = [5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]
    decoded = one.decode([prompt], 0)
    out = model.generate([prompt], max_new_tokens=GREEDY.max_new_tokens)
    assert out.stats.num_copied_tokens > 0
    assert decoded.num_accepted_tokens == out.stats.num_accepted_tokens + out.stats.num_accepted_copies
    assert decoded.num_rows / decoded.num_steps == 4


def test_what_cannot_run_is_left_out_with_its_reason(make_llama):
    model = small_model(make_llama)
    ways, left_out = baselines.ways_for({"a": model}, [2, 3], make_llama(seed=1), GREEDY, 4)
    assert [one.name for one in ways] == ["plain", "copies", "two_pass", "fused", "fused + copies", "generate"]
    reasons = {one["way"]: one["reason"] for one in left_out}
    assert list(reasons) == ["fused, K = 3", "tuned", "generate static", "prompt lookup", "assistant"]
    assert "2 mask tokens" in reasons["fused, K = 3"]
    assert "one prompt" in reasons["assistant"]


def test_an_assistant_that_is_the_base_has_all_its_drafts_accepted(make_llama):
    base = small_model(make_llama).base_model
    twin = make_llama()
    twin.generation_config = neutral_generation_config(twin, stop_at_eos=False)
    twin.generation_config.assistant_confidence_threshold = 0.0  # by default it stops drafting where it is unsure
    decoded = baselines.assisted_way(base, GREEDY, name="assistant", assistant=twin).decode(PROMPTS[:1], 0)
    assert (decoded.num_steps, decoded.num_rows) == (1, 12)
    assert (decoded.num_drafts, decoded.num_accepted_tokens) == (1, 11)
    assert not base._forward_pre_hooks


def test_prompt_lookup_counts_one_round_per_forward(make_llama):
    base = small_model(make_llama).base_model
    decoded = baselines.assisted_way(base, GREEDY, name="prompt lookup").decode([[5, 6, 7, 5, 6]], 0)
    assert decoded.num_steps + decoded.num_accepted_tokens == 12
    assert decoded.num_drafts >= 1
    assert decoded.num_rows >= decoded.num_steps + decoded.num_drafts


def test_eos_is_ignored_or_ends_every_way_alike(make_llama):
    model = small_model(make_llama)
    base = model.base_model
    plain = baselines.pardec_way(model, GREEDY, name="plain", mode="plain")
    tokens = plain.decode(PROMPTS, 0).token_ids
    base.generation_config.eos_token_id = [tokens[0][4]]
    base.generation_config.repetition_penalty = 1.5  # a checkpoint's own penalty is no part of any law here
    keep, ignore = (neutral_generation_config(base, stop) for stop in (True, False))
    ended = [ids[: ids.index(tokens[0][4]) + 1] if tokens[0][4] in ids else ids for ids in tokens]
    for config, expected in ((keep, ended), (ignore, tokens)):
        base.generation_config = config
        assert eos_token_ids(base) == ([tokens[0][4]] if config is keep else [])
        assert plain.decode(PROMPTS, 0).token_ids == expected
        assert baselines.generate_way(base, GREEDY, name="generate").decode(PROMPTS, 0).token_ids == expected
        alone = [baselines.assisted_way(base, GREEDY, name="").decode([one], 0).token_ids[0] for one in PROMPTS]
        assert alone == expected


def test_batches_for_generate_are_padded_on_the_left():
    ids, mask = baselines.left_padded([[1, 2, 3], [4]], pad_id=9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_static_cache_gives_the_same_tokens(make_llama):
    base = small_model(make_llama).base_model
    dynamic, static = (baselines.generate_way(base, GREEDY, name="", static_cache=static) for static in (False, True))
    assert static.decode(PROMPTS, 0).token_ids == dynamic.decode(PROMPTS, 0).token_ids


def test_batches_are_full_and_the_longest_comes_first():
    prompts = [Prompt([0] * length, "code", str(length)) for length in (3, 1, 5, 2, 9)]
    assert [[p.name for p in batch] for batch in speed.batches_of(prompts, 2)] == [["5", "2"], ["3", "1"]]


# ---------------------------------------------------------------------- tables


def a_result(**row) -> dict:
    figures = {
        "setting": "greedy", "batch_size": 1, "way": "fused", "adapter": "lora", "num_speculative_tokens": 2,
        "block_lengths": [2, 1, 0], "tokens_per_second": 123.456, "mean_acceptance_length": 1.5, "ms_per_step": 8.1234,
        "rows_per_step": 6.0, "peak_memory_mib": None, "ratio_to_plain": 1.25, "ratio_to_plain_quartiles": [1.2, 1.3],
        "ratio_to_generate": 1.4, "ratio_to_generate_quartiles": [1.3, 1.5], "identical": True, "num_ties": 0,
    } | row  # fmt: skip
    left_out = {"setting": "greedy", "batch_size": 4, "way": "assistant", "adapter": "", "reason": "batch 1 only"}
    return {
        "rows": [figures, figures | {"batch_size": 4}], "left_out": [left_out], "problems": [], "batch_sizes": [1, 4],
        "num_prompts": 6, "max_new_tokens": 12, "dtype": "float32", "device": "cpu", "compile": False,
        "stop_at_eos": False, "temperature": 0.8, "top_k": 10,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("identical", "num_ties", "text"),
    [(True, 0, "yes"), (True, 1, "yes, 1 tie"), (True, 2, "yes, 2 ties"), (False, 1, "NO")],
)
def test_cells_of_a_row(identical, num_ties, text):
    [table] = tables.tables_of(a_result(identical=identical, num_ties=num_ties))
    assert dict(zip(table.header, table.rows[0], strict=True)) == {
        "batch": "1", "way": "fused", "adapter": "lora", "K": "2", "tokens/s": "123.5",
        "mean acceptance length": "1.50", "ms/step": "8.12", "rows/step": "6", "x plain": "1.25 (1.20-1.30)",
        "x generate": "1.40 (1.30-1.50)",
        "peak MiB": "-", "identical": text,
    }  # fmt: skip


def test_what_was_left_out_is_dashes_with_a_footnote():
    result = a_result()
    [table] = tables.tables_of(result)
    assert table.rows[-1] == ["4", "assistant [1]", *["-"] * 10]
    notes = tables.notes_of(result)
    assert notes[0] == "[1] left out: batch 1 only"
    assert "batch 4: 2 of 6 prompts fill no batch and are left out" in notes
    assert "fused K=2, lora: mask tokens behind each real row 2, 1, 0" in notes


def test_categories_get_a_table_of_their_own():
    categories = tables.tables_of(a_result(ratio_to_plain_by_category={"code": 1.5, "chat": 1.0}))[1]
    assert categories.header == ["way", "code", "chat"]
    assert categories.rows[0] == ["fused K=2, lora", "1.50", "1.00"]


def test_a_file_is_replaced_only_when_it_is_whole(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")

    def killed() -> None:
        with written_aside(path) as aside:
            aside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
    assert path.read_text() == "old"


# ---------------------------------------------------------------------- the script


def test_quick_measures_all_ways_side_by_side(call_speed, tmp_path):
    stem = tmp_path / "speed"
    ended = call_speed("lora", "--quick", "--assistant", "assistant", "--max-new-tokens", 8, "--output", stem)
    assert ended.code == 0, ended.out + ended.err
    result = ended.result
    assert json.loads((tmp_path / "speed.json").read_text()) == result
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "speed.md").read_text()
    assert "| 2 | assistant [" in page
    assert "speed.py lora --quick" in page
    assert sorted(file.name for file in tmp_path.iterdir()) == ["speed.json", "speed.md", "speed.png"]
    common = ["plain", "copies", "two_pass", "fused", "fused", "fused + copies", "fused tuned", "generate"]
    ways = {(s, b): [] for s in ("greedy", "sampled") for b in (1, 2)}
    for row in result["rows"]:
        ways[row["setting"], row["batch_size"]].append(row["way"])
        assert row["num_new_tokens"] == 2 * 8  # two prompts, one counted pass
        assert row.get("identical") is (True if row["setting"] == "greedy" else None)
        assert row["peak_memory_mib"] is None
        if row["way"] == "plain":
            assert row["ratio_to_plain"] == row["mean_acceptance_length"] == row["rows_per_step"] == 1
        if row["way"] == "generate":
            assert row["ratio_to_generate"] == 1
    assert all(found == common + ["prompt lookup", "assistant"] * (b == 1) for (_, b), found in ways.items())
    assert {(one["batch_size"], one["way"]) for one in result["left_out"]} == {
        (1, "generate static"), (2, "generate static"), (2, "prompt lookup"), (2, "assistant"),
    }  # fmt: skip
    assert {"device", "versions", "command", "dtype"} <= result.keys()


def test_several_adapters_share_plain_and_benchmarks_are_told_by_category(call_speed, tmp_path):
    prompts = tmp_path / "questions.jsonl"
    rows = [{"question_id": i, "category": c, "turns": ["def f(x):"]} for i, c in enumerate(("coding", "math"))]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--prompts", str(prompts), "--greedy-only", "--batch-sizes", "1", "--num-speculative-tokens", "1")
    ended = call_speed("embeddings", "lora", "--quick", "--max-new-tokens", 4, *options, "--output", tmp_path / "x")
    assert ended.code == 0, ended.out + ended.err
    found = ended.result["rows"]
    assert [(row["way"], row["adapter"]) for row in found] == [
        ("plain", ""), ("copies", ""), ("two_pass", "embeddings"), ("fused", "embeddings"),
        ("fused + copies", "embeddings"), ("two_pass", "lora"), ("fused", "lora"), ("fused + copies", "lora"),
        ("fused tuned", "lora"), ("generate", ""), ("prompt lookup", ""),
    ]  # fmt: skip
    assert all(set(row["ratio_to_plain_by_category"]) == {"coding", "math"} for row in found)


def test_a_way_that_decodes_something_else_is_found_out(call_speed, monkeypatch, tmp_path):
    honest = SelfSpeculativeModel.generate

    def sabotaged(self, prompts, **options):
        out = honest(self, prompts, **options)
        if options["mode"] == "fused":
            out.token_ids[0][-1] = (out.token_ids[0][-1] + 1) % 4096
        return out

    monkeypatch.setattr(SelfSpeculativeModel, "generate", sabotaged)
    options = ("--greedy-only", "--max-new-tokens", "4", "--num-prompts", "1", "--batch-sizes", "1")
    ended = call_speed("embeddings", "--quick", *options, "--output", tmp_path / "x")
    assert ended.code == 1
    result = ended.result
    assert {row["way"] for row in result["rows"] if not row["identical"]} == {"copies", "fused", "fused + copies"}
    assert "new token 3" in result["problems"][0]
    assert "NO" in ended.out


def test_a_batch_size_without_enough_memory_is_left_out(call_speed, monkeypatch, tmp_path):
    def time_ways(ways, batches, **options):
        if len(batches[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return timing.time_ways(ways, batches, **options)

    monkeypatch.setattr(speed, "time_ways", time_ways)
    options = ("--quick", "--greedy-only", "--max-new-tokens", "4", "--output", str(tmp_path / "x"))
    ended = call_speed("embeddings", *options)
    assert ended.code == 0, ended.out + ended.err
    result = ended.result
    assert {row["batch_size"] for row in result["rows"]} == {1}
    assert speed.OUT_OF_MEMORY in {one["reason"] for one in result["left_out"]}
    assert call_speed("embeddings", *options, "--batch-sizes", "2").code == 2


def test_each_model_keeps_engines_for_all_ways_while_they_are_timed(call_speed, monkeypatch, tmp_path):
    rooms = []

    def time_ways(ways, batches, **options):
        rooms.append(len(ways))
        return timing.time_ways(ways, batches, **options)

    @contextmanager
    def room_for(self, number):
        asked.append(number)
        yield

    asked = []
    monkeypatch.setattr(speed, "time_ways", time_ways)
    monkeypatch.setattr(Engines, "room_for", room_for)
    options = ("--quick", "--greedy-only", "--max-new-tokens", "4", "--output", str(tmp_path / "x"))
    assert call_speed("embeddings", "lora", *options, "--batch-sizes", "1").code == 0
    assert asked == 2 * rooms


def test_a_run_that_is_cut_off_leaves_the_rows_that_it_had(call_speed, monkeypatch, tmp_path):
    def time_ways(ways, batches, **options):
        if len(batches[0]) > 1:
            raise KeyboardInterrupt
        return timing.time_ways(ways, batches, **options)

    monkeypatch.setattr(speed, "time_ways", time_ways)
    options = ("--quick", "--greedy-only", "--max-new-tokens", "4", "--output", str(tmp_path / "x"))
    assert call_speed("embeddings", *options).code != 0
    result, page = json.loads((tmp_path / "x.json").read_text()), (tmp_path / "x.md").read_text()
    assert {row["batch_size"] for row in result["rows"]} == {1}
    assert result["batch_sizes"] == [1, 2]
    assert "The run was cut off" in page
    monkeypatch.undo()
    assert call_speed("embeddings", *options).code == 0
    assert json.loads((tmp_path / "x.json").read_text())["is_complete"]
    assert "The run was cut off" not in (tmp_path / "x.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-sizes", "2,x"], "batch_sizes: expected integers >= 1"),
        (["--batch-sizes", "1,3"], "batch_sizes: expected at most 2, the number of prompts, found 3"),
        (["--num-speculative-tokens", "0"], "num_speculative_tokens: expected integers >= 1"),
        (["--repetitions", "0"], "repetitions: expected an integer >= 1, found 0"),
        (["--temperature", "0"], "temperature: expected more than 0"),
        (["--top-k", "0"], "top_k: expected"),
        (["--device", "abacus"], "device: expected a torch device of this machine, found 'abacus'"),
        (["--prompts", "none.jsonl"], "none.jsonl: expected"),
        (["--max-new-tokens", "2048"], "max_new_tokens: expected fewer than the model's 2048 positions"),
        (["--assistant", "stranger"], "assistant: expected the base's vocabulary of 4096 tokens, found 100"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(call_speed, options, message):
    ended = call_speed("embeddings", "--quick", *options)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"error: {message}")
    assert ended.err.count("\n") == 1
