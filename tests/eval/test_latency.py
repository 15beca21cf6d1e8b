"""The step latency benchmark: the bound by hand count, what engines are timed, forced drafts, the script itself."""

import json
from dataclasses import replace
from itertools import product

import latency
import pytest
import torch
from programs import run
from reporting import latency_tables
from timing import bandwidth, shapes, step_groups, step_profile, steps
from timing.steps import GROUPED, STOCK, WHOLE, Runner, Subject, Variant
from tiny_models import make_adapter, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from pardec.adapters.files import save_adapter
from pardec.decoding.engine import Engine
from pardec.decoding.sampling import TokenLaw
from pardec.model import SelfSpeculativeModel
from pardec.target import attention, split_keys
from pardec.target.forward import TargetModel

CPU = torch.device("cpu")
PROMPT = list(range(3, 40))
WITH_LORA = Variant(compile=False, lora=True, attention=GROUPED)


@pytest.fixture(scope="module")
def subject():
    base = shapes.random_model(shapes.config_of("tiny"), CPU, torch.float32, seed=0)
    return Subject(TargetModel.wrap(base), shapes.random_mask_embeddings(base, 3, 0), shapes.random_lora(base, 4, 0))


def plan_for(subject, **changes):
    plan = step_groups.Plan([WITH_LORA], [16], [0, 1, 2], 2, 2, None, False, 0)
    return replace(plan, **changes)


def bound_for(subject):
    return bandwidth.StepBound(1e9, bandwidth.weight_bytes_per_step(subject.target.base), 64, 512)


# ---------------------------------------------------------------------- the bound


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_a_step_equal_a_count_by_hand(tied):
    V, D, inner, layers, kv = 50, 16, 24, 3, 8
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval().requires_grad_(False)
    weights = layers * (D * D + 2 * D * kv + D * D + 3 * D * inner + 2 * D) + D + V * D
    assert bandwidth.weight_bytes_per_step(base) == 4 * weights
    assert sum(p.numel() for p in base.parameters()) == weights + (0 if tied else V * D)
    lora = shapes.random_lora(base, 2, seed=0)
    lora_numbers = layers * 2 * (2 * (D + D) + 2 * (D + kv) + 3 * (D + inner))
    assert bandwidth.lora_bytes_per_step(lora, torch.bfloat16) == 2 * lora_numbers
    assert steps.survey(TargetModel.wrap(base)).bytes_per_slot == layers * 2 * kv * 4
    # two operations for each weight, four for each number of a query's width and token of context
    assert bandwidth.flops_per_step(base, 9, 100) == 9 * (2 * weights + layers * 4 * D * 100)


def test_the_bound_is_bytes_over_bandwidth():
    bound = bandwidth.StepBound(
        bytes_per_second=1e6, weight_bytes_per_step=2000, lora_bytes_per_step=300, bytes_per_slot=10
    )
    assert bound.ms(50, with_lora=False) == pytest.approx(2.5)
    assert bound.ms(50, with_lora=True) == pytest.approx(2.8)


def test_copy_bandwidth_counts_bytes_read_and_written(monkeypatch):
    assert bandwidth.copy_bandwidth(CPU, num_bytes=2**20, repetitions=3) > 0
    monkeypatch.setattr(bandwidth, "seconds_of", lambda copy, device: 0.5)
    assert bandwidth.copy_bandwidth(CPU, num_bytes=2**20) == 4 * 2**20


# ---------------------------------------------------------------------- shapes


def test_named_shapes_have_the_size_of_their_names():
    def millions(shape):
        with torch.device("meta"):
            return shapes.AutoModelForCausalLM.from_config(shapes.config_of(shape)).num_parameters() / 1e6

    # as the model cards count them
    expected = {"llama-100m": 100, "llama-1b": 1236, "llama-8b": 8030, "qwen3-0.6b": 596, "qwen3-8b": 8191}
    assert {shape: round(millions(shape)) for shape in expected} == expected


@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_a_random_model_continues_by_a_wide_margin(tied, dtype):
    config = shapes.config_of("tiny")
    config.tie_word_embeddings = tied
    model = shapes.random_model(config, CPU, dtype, seed=1)
    logits = model(torch.tensor([PROMPT])).logits[0].float()
    assert logits.argmax(dim=-1).tolist() == [token + (not tied) for token in PROMPT]
    best = logits.topk(2).values
    assert float((best[:, 0] - best[:, 1]).min()) > 0.1 * float(best[:, 0].max())


# ---------------------------------------------------------------------- what is timed


@pytest.mark.parametrize("num_drafted", [0, 2])
@pytest.mark.parametrize("compile", [False, True])
def test_engines_are_put_together_as_the_public_model_does(subject, num_drafted, compile):
    base = subject.target.base
    adapter = replace(make_adapter(base, 3), lora=subject.lora)
    public = SelfSpeculativeModel(base, None, adapter, compile=compile)
    drafting = public.engines.drafting("fused" if num_drafted else "plain", num_drafted, None, None)
    mine = subject.engine(num_drafted, replace(WITH_LORA, compile=compile), 8)
    with public.engines.lend([PROMPT], TokenLaw(greedy=True), 8, drafting, eos=[]) as theirs:
        for name in ("mode", "num_speculative_tokens", "law", "max_new_tokens"):
            assert getattr(mine.decoder, name) == getattr(theirs.decoder, name), name
        ours, its = mine.decoder.forward, theirs.decoder.forward
        assert ours.query_group == its.query_group
        for name in ("gate", "mask_embeddings", "compile_step"):
            assert (getattr(ours, name) is None) == (getattr(its, name) is None), name
        assert mine.decoder.rows_per_step == theirs.decoder.rows_per_step == (num_drafted + 1) ** 2
        packed = [
            0 if d.forward.linears is None else len(d.forward.linears.modules) for d in (mine.decoder, theirs.decoder)
        ]
        assert packed[0] == packed[1]
        assert mine._bytes_per_slot == theirs._bytes_per_slot
        assert (mine._graphs is None) == (theirs._graphs is None)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("num_accepted", [0, 1, 3])
def test_forced_acceptance_emits_exactly_one_token_more_per_step(subject, captured, num_accepted):
    plain = steps.plain_continuation(subject, WITH_LORA, PROMPT, 64)
    engine = subject.engine(3, WITH_LORA, 64)
    steps.force_acceptance(engine.decoder, torch.nn.functional.pad(plain, (0, 3)), num_accepted)
    if captured:  # a recorder that runs the step again stands for the graph
        engine = Engine(engine.decoder, 512, captured=True, recorder=lambda run, generator, pool: run)
    seen = list(engine.run([PROMPT]))
    assert {step.num_accepted[0] for step in seen[1:-1]} == {num_accepted}
    assert [token for step in seen for token in step.tokens[0]] == plain.tolist()


def test_more_drafts_than_there_are_cannot_be_forced(subject):
    with pytest.raises(ValueError, match=r"expected 0 to 2 accepted drafts, found 3"):
        steps.force_acceptance(subject.engine(2, WITH_LORA, 8).decoder, torch.zeros(16, dtype=torch.long), 3)


def test_a_runner_begins_anew_before_its_tokens_run_out(subject):
    num_new = steps.tokens_needed(3, 1, 1)
    runner = Runner(subject.engine(0, WITH_LORA, num_new), PROMPT, 1)
    runner.begin()
    blocks = [runner.block(3) for _ in range(6)]
    runner.close()
    assert {block.tokens_per_step for block in blocks} == {1}
    assert max(block.num_new[1] for block in blocks) < num_new
    assert blocks[-1].num_new[0] <= blocks[0].num_new[1] + 3


def test_row_counts_take_turns_and_plain_is_compared_with_itself(subject):
    turns = []

    class Recorded(Runner):
        def block(self, num_steps):
            turns.append(self.engine.decoder.num_speculative_tokens)
            return steps.Block(float(len(turns)), (1, 2), 1, 64)

    runners = [Recorded(subject.engine(K, WITH_LORA, 8), PROMPT, 1) for K in (0, 1, 2)]
    blocks = steps.time_blocks(runners, num_steps=1, repetitions=2)
    assert turns == [0, 1, 2, 2, 1, 0, 0, 1, 2]
    assert [len(mine) for mine in blocks] == [2, 2, 2]
    by_drafted = dict(zip((0, 1, 2), blocks, strict=True))
    row = step_groups._figures(subject, 0, by_drafted, 16, bound_for(subject), WITH_LORA)
    assert row["ratio_to_plain"] == 1
    row = step_groups._figures(subject, 2, by_drafted, 16, bound_for(subject), WITH_LORA)
    assert row["ratio_to_plain"] == pytest.approx((4 / 6 + 9 / 7) / 2, abs=1e-4)  # each beside its own repetition
    assert row["committed_tokens"] == 16.5
    assert row["share_of_bound"] == pytest.approx(row["bound_ms"] / row["ms_per_step"], rel=1e-2)


def test_groups_say_why_rows_are_left_out(subject):
    plan, bound = plan_for(subject, drafted=[0, 1, 5]), bound_for(subject)
    group = step_groups.measure_group(subject, WITH_LORA, 16, plan, bound)
    assert [row["rows"] for row in group["rows"]] == [1, 4]
    assert [(one["rows"], one["reason"]) for one in group["left_out"]] == [
        (36, "the adapter has 3 mask tokens, and these rows take 5")
    ]
    group = step_groups.measure_group(subject, WITH_LORA, 131070, plan, bound)
    assert "131072 positions" in group["left_out"][0]["reason"]
    assert "rows" not in group
    without = Subject(subject.target, subject.mask_embeddings, None)
    group = step_groups.measure_group(without, WITH_LORA, 16, plan, bound)
    assert group["left_out"] == [
        {
            "context": 16, "compile": False, "lora": True, "attention": GROUPED, "head": False,
            "reason": "the adapter has no LoRA",
        }
    ]  # fmt: skip
    group = step_groups.measure_group(subject, replace(WITH_LORA, head=True), 16, plan, bound)
    assert group["left_out"][0]["reason"] == "the adapter has no sampler head"


def test_rows_whose_kernel_cannot_be_compiled_are_left_out_alone(subject, monkeypatch):
    begin = Runner.begin

    def no_kernel_for_nine_rows(self):
        if self.engine.decoder.num_speculative_tokens == 2:
            raise RuntimeError("no configuration is valid\nfor this device")
        begin(self)

    monkeypatch.setattr(Runner, "begin", no_kernel_for_nine_rows)
    group = step_groups.measure_group(subject, WITH_LORA, 16, plan_for(subject), bound_for(subject))
    assert [row["rows"] for row in group["rows"]] == [1, 4]
    assert [(one["rows"], one["reason"]) for one in group["left_out"]] == [(9, "no configuration is valid")]


def test_weights_are_packed_before_any_engine_runs(subject):
    fresh = Subject(subject.target, subject.mask_embeddings, subject.lora)
    group = step_groups.measure_group(fresh, WITH_LORA, 16, plan_for(subject), bound_for(subject))
    assert len(group["rows"]) == 3
    assert len(fresh._packed[True].modules) == len(fresh._packed[False].modules)
    if torch.backends.mkldnn.is_available():
        assert len(fresh._packed[True].modules) == 2 * 7 + 1  # linear layers of two decoder layers, and the head


def test_a_cache_that_does_not_fit_is_left_out(subject, monkeypatch):
    monkeypatch.setattr("pardec.decoding.engine.psutil.virtual_memory", lambda: type("Memory", (), {"available": 100}))
    fresh = Subject(subject.target, subject.mask_embeddings, subject.lora)
    group = step_groups.measure_group(fresh, WITH_LORA, 16, plan_for(subject), bound_for(subject))
    assert group["left_out"][0]["reason"].startswith("cache: expected at most 0.00 GiB")


# ---------------------------------------------------------------------- attention


@pytest.fixture(scope="module")
def sensitive():
    """A base in which attention matters."""
    base = tiny_model("llama", dtype=torch.float32, head_dim=16)
    masks = shapes.random_mask_embeddings(base, 3, 0)
    return Subject(TargetModel.wrap(base), masks, shapes.random_lora(base, 2, 0))


def prompt_of(num_tokens):
    return torch.randint(61, (num_tokens,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize(("num_drafted", "num_prompt_tokens"), [(0, 127), (2, 128), (3, 130)])
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_every_route_gives_the_same_logits(sensitive, num_drafted, num_prompt_tokens, multiprocessors, monkeypatch):
    monkeypatch.setattr(split_keys, "num_multiprocessors", lambda device: multiprocessors)
    calls, parts, found, split = [], {}, {}, attention.attention_by_parts
    monkeypatch.setattr(
        attention, "attention_by_parts", lambda *args, **rest: calls.append(args) or split(*args, **rest)
    )
    for name in (WHOLE, STOCK, GROUPED):
        decoder = sensitive.engine(num_drafted, Variant(compile=False, lora=False, attention=name), 40).decoder
        state = decoder.prefill([prompt_of(num_prompt_tokens)])
        state.cache.num_used = 160  # two parts of 80
        calls.clear()
        found[name] = decoder.step_logits(state)
        parts[name] = len(calls)
    assert parts == {WHOLE: 0, STOCK: 0, GROUPED: sensitive.target.num_layers if multiprocessors > 1 else 0}
    for name in (STOCK, WHOLE):
        torch.testing.assert_close(found[name], found[GROUPED], rtol=0, atol=1e-5)
    assert sensitive.target.base.config._attn_implementation == "sdpa"


def test_every_route_drafts_with_the_lora(sensitive):
    found = {}
    for lora, name in ((True, GROUPED), (True, STOCK), (True, WHOLE), (False, GROUPED)):
        engine = sensitive.engine(3, Variant(compile=False, lora=lora, attention=name), 8)
        drafts = [(step.tokens, engine.state.drafts.tolist()) for step in engine.run([prompt_of(40)])]
        found[lora, name] = drafts
    assert found[True, GROUPED] == found[True, STOCK] == found[True, WHOLE] != found[False, GROUPED]


# ---------------------------------------------------------------------- the profile


def test_a_trace_is_summed_up_per_step():
    def event(cat, name, ts, dur, **args):
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}

    events = [{"ph": "M", "name": "process_name"}]
    for start in (0, 1000):
        events += [
            event("cuda_runtime", "cudaGraphLaunch", start - 50, 10),
            event("cuda_runtime", "cudaMemcpyAsync", start - 30, 5),
            event("kernel", "gemm", start, 600),
            event("kernel", "gemm", start + 600, 100),
            event("kernel", "softmax", start + 650, 100),  # beside the one before
            event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", start + 800, 20, bytes=4096),
            event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", start + 900, 50, bytes=96),
        ]
    found = step_profile.summarise(events, 2)
    assert found["graph_launches_per_step"] == found["copies_to_host_per_step"] == 1
    assert found["bytes_to_host_per_step"] == 96
    assert found["kernel_launches_by_host_per_step"] == found["copies_to_device_per_step"] == 0
    assert found["kernels_per_step"] == 3
    assert found["kernel_ms_per_step"] == pytest.approx(0.8)
    assert found["wall_ms_per_step"] == pytest.approx(1.950 / 2)
    assert found["busy_share"] == pytest.approx(2 * (750 + 20 + 50) / 1950)
    assert found["top_kernels"][0] == {"name": "gemm", "ms_per_step": 0.7, "calls_per_step": 2}
    assert step_profile.summarise([], 2)["busy_share"] == 0


# ---------------------------------------------------------------------- the script


def test_quick_writes_every_file_and_ends_with_the_json_line(tmp_path):
    ended = run(latency.main, "--quick", "--attention", "grouped,stock", "--output", tmp_path / "out")
    assert ended.code == 0, ended.err[-2000:]
    result = ended.result
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert result["is_complete"]
    assert result["model"] == "tiny"
    assert not result["left_out"]
    places = {(r["context"], r["lora"], r["attention"], r["rows"]) for r in result["rows"]}
    assert places == set(product((64, 128), (False, True), (GROUPED, STOCK), (1, 4, 9)))
    assert len(places) == len(result["rows"])
    for row in result["rows"]:
        assert row["rows"] == (row["num_speculative_tokens"] + 1) ** 2
        assert 0 < row["bound_ms"] < row["ms_per_step"]
        assert row["slots_attended"] >= row["committed_tokens"] > row["context"]
    assert result["bytes_per_second"] > 0
    page = (tmp_path / "out.md").read_text()
    assert "## context 64, not compiled, stock attention, float32" in page
    assert "| share of bound |" in page
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_an_adapter_with_a_head_is_measured_with_it_and_without(tmp_path, packaged_adapter):
    save_adapter(packaged_adapter(2, head_width=8), tmp_path / "head")
    options = ["--quick", "--contexts", "32", "--rows", "1,9", "--repetitions", "1", "--lora", "no"]
    ended = run(latency.main, tmp_path / "head", *options, "--output", tmp_path / "out")
    assert ended.code == 0, ended.err[-2000:]
    rows = [(row["rows"], row["head"]) for row in ended.result["rows"]]
    assert rows == [(1, False), (9, False), (1, True), (9, True)]
    page = (tmp_path / "out.md").read_text()
    assert "## context 32, not compiled, grouped attention, drafts drawn by the head" in page
    ended = run(latency.main, tmp_path / "head", *options, "--head", "no", "--output", tmp_path / "out")
    assert {row["head"] for row in ended.result["rows"]} == {False}


def test_engines_draft_with_the_head_where_that_is_asked(subject):
    base = subject.target.base
    public = SelfSpeculativeModel(base, None, make_adapter(base, 2, head_width=8))
    mine = Subject(subject.target, subject.mask_embeddings, None, public.engines.head)
    for has_head in (True, False):
        decoder = mine.engine(2, Variant(False, False, GROUPED, has_head), 8).decoder
        assert (decoder.head is public.engines.head) == has_head
    assert mine.engine(0, Variant(False, False, GROUPED, True), 8).decoder.head is None


def test_an_adapter_is_measured_with_forced_drafts(tmp_path, adapters):
    options = ["--quick", "--contexts", "32", "--rows", "1,4,9", "--repetitions", "2", "--forced-acceptance", "2"]
    ended = run(latency.main, adapters / "embeddings", *options, "--output", tmp_path / "out")
    assert ended.code == 0, ended.err[-2000:]
    result = ended.result
    assert result["model"] == "tiny-python"
    # 4 rows hold one draft, which cannot make two; the adapter has no LoRA
    assert [(row["rows"], row["tokens_per_step"]) for row in result["rows"]] == [(1, 1), (9, 3)]
    assert [one["reason"] for one in result["left_out"]] == ["the adapter has no LoRA"]
    assert "tokens/s x plain" in ended.out
    for row in result["rows"]:  # the median of two rates, however far apart the two are on a busy machine
        one, other = (2 * quartile - row["ms_per_step"] for quartile in row["ms_per_step_quartiles"])
        expected = 1000 * row["tokens_per_step"] * (1 / one + 1 / other) / 2
        assert row["tokens_per_second"] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/no-such-adapter"], "expected an adapter directory or a hub name, found no folder of that name"),
        ([], "expected an adapter directory, --shape or --quick"),
        (["--quick", "--rows", "1,5"], "rows: expected squares"),
        (["--quick", "--rows", "1,1000000"], "rows: expected at most 4225, found 1,1000000"),
        (["--quick", "--contexts", "many"], "contexts: expected integers"),
        (["--quick", "--repetitions", "0"], "repetitions: expected an integer >= 1, found 0"),
        (["--quick", "--forced-acceptance", "3"], "forced_acceptance: expected 0 to 2"),
        (
            ["--quick", "--attention", "stock,flash"],
            "attention: expected some of grouped, whole, stock, found 'stock,flash'",
        ),
        (["--quick", "--device", "abacus"], "device: expected a CPU or CUDA device"),
        (["--quick", "--device", "cpu", "--profile"], "profile: expected a CUDA device, found cpu"),
        (["a", "--shape", "tiny"], "expected no --shape beside an adapter directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message):
    ended = run(latency.main, *arguments)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert message in ended.err
    assert ended.out == ""


def test_weights_that_do_not_fit_are_refused_before_they_are_made(monkeypatch):
    monkeypatch.setattr(shapes.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2**30}))
    with pytest.raises(ValueError, match=r"at most 1.0 GiB, which are free on cpu, found 29.9 GiB in float32"):
        shapes.random_model(shapes.config_of("llama-8b"), CPU, torch.float32, seed=0)


def test_notes_name_what_was_left_out_and_what_warned():
    place = {"compile": True, "lora": True, "attention": GROUPED, "head": False}
    notes = latency_tables._by_text(
        [
            {"context": 64, "rows": 9, "reason": "no", **place},
            {"context": 32, "rows": 4, "reason": "no", **place},
            {"context": 64, "reason": "never", **place, "lora": False},
        ],
        "reason",
    )
    assert notes == {
        "no": "rows 4, 9 at context 32, 64 with LoRA compiled",
        "never": "all rows at context 64 compiled",
    }
