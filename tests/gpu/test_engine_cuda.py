"""Captured steps on a GPU: what they bring, what they launch, what happens where they cannot be; `pytest -m gpu`."""

import gc
import itertools
import warnings

import pytest
import torch
from accelerate.utils.memory import clear_device_cache
from greedy_oracle import plain_generate, prompts
from recorded_steps import decoder_for, rerun, results, sampled, tensors_of
from tiny_models import make_adapter, tiny_model
from tree_samples import BRANCHING, DYNAMIC

from pardec.decoding import weight_watch
from pardec.decoding.engine import Engine
from pardec.decoding.sampling import TokenLaw
from pardec.model import SelfSpeculativeModel

pytestmark = pytest.mark.gpu

K = 3
V = 61
MODES = ["plain", "two_pass", "fused"]
LONG = {"max_position_embeddings": 2048}


@pytest.fixture(autouse=True)
def exact_matrix_products():
    torch.backends.cuda.matmul.allow_tf32 = False


def on_cuda(law: TokenLaw) -> TokenLaw:
    """The same law with a generator on the device."""
    generator = None if law.greedy else torch.Generator("cuda").manual_seed(0)
    return TokenLaw(law.greedy, law.processors, generator)


def engine_for(model, mode: str, law: TokenLaw, *, drafting=None, **options) -> Engine:
    decoder = decoder_for(model, mode, on_cuda(law), **(drafting or {}))
    return Engine(decoder, 1, captured=True, **options)


def run(engine: Engine, rows, new_tokens: int, *, seed: int = 0, repeats: int = 1) -> list:
    decoder = engine.decoder
    decoder.max_new_tokens = new_tokens
    decoder.eos_token_ids = torch.empty(0, dtype=torch.long, device="cuda")
    if decoder.law.generator is not None:
        decoder.law.generator.manual_seed(seed)
    for _ in engine.run(rows, repeats=repeats):
        pass
    return results(decoder, engine.state)[: len(rows) * repeats]


# ---------------------------------------------------------------------- captured and uncaptured


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("family", "mode", "law", "drafting"),
    [
        *[("llama", mode, TokenLaw(True), {}) for mode in MODES],
        *[("llama", mode, sampled(), {}) for mode in ("plain", "fused")],
        ("gemma3-mixed-windows", "fused", TokenLaw(True), {}),
        ("gemma3-mixed-windows", "fused", sampled(), {}),
        ("gpt2", "fused", TokenLaw(True), {}),
        ("llama-eager", "fused", TokenLaw(True), {}),
        ("llama", "fused", TokenLaw(True), {"head_width": 6}),
        ("gpt2", "fused", sampled(), {"head_width": 6}),
        ("llama", "two_pass", sampled(), {"head_width": 6, "noise": True}),
        ("llama", "fused", sampled(), {"verification": "block"}),
        ("gemma3-mixed-windows", "fused", TokenLaw(True), {"noise": True}),
        ("llama", "fused", TokenLaw(True), {"copy_tokens": 5}),
        ("gpt2", "two_pass", sampled(), {"copy_tokens": 5}),
        ("llama", "fused", sampled(), {"tree": BRANCHING, "copy_tokens": 5}),
        ("gemma3-mixed-windows", "fused", TokenLaw(True), {"tree": DYNAMIC["dynamic"], "copy_tokens": 2}),
    ],
)
def test_replayed_graphs_leave_bitwise_what_the_same_steps_leave_uncaptured(family, mode, law, drafting, batch):
    """Rows, padding and buckets are the same, so tokens, counts, draws and the drafts' law are too, in float32."""
    model = tiny_model(family, dtype=torch.float32).cuda()
    captured = engine_for(model, mode, law, drafting=drafting)
    uncaptured = engine_for(model, mode, law, drafting=drafting, recorder=rerun)
    for seed, lengths in enumerate(((11, 3, 17, 6, 9), (2, 20, 4, 7, 1))):
        rows = prompts(V, lengths)[:batch]
        expected = run(uncaptured, rows, 40, seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as that it cannot be captured
            assert run(captured, rows, 40, seed=seed) == expected
        n = len(rows)
        for name, tensor in tensors_of(uncaptured.state).items():
            if name not in ("prompts", "output", "marks"):  # what stands behind the end of these does not count
                assert torch.equal(getattr(captured.state, name)[:n], tensor[:n]), name


@pytest.mark.parametrize("mode", ["fused", "two_pass"])
def test_samples_of_one_prompt_copy_from_each_other_in_replayed_graphs_as_uncaptured(mode):
    model = tiny_model("llama", dtype=torch.float32).cuda()
    captured, uncaptured = (
        engine_for(model, mode, sampled(), drafting={"copy_tokens": 5}, **options)
        for options in ({}, {"recorder": rerun})
    )
    for seed, (lengths, repeats) in enumerate((((11,), 4), ((3, 5), 2), ((11,), 4), ((2, 7, 4), 1))):
        rows = prompts(V, lengths)
        expected = run(uncaptured, rows, 40, seed=seed, repeats=repeats)
        assert run(captured, rows, 40, seed=seed, repeats=repeats) == expected
        assert captured.state.sources.shape == (4, repeats)


@pytest.mark.parametrize("mode", MODES)
def test_generations_that_pass_several_buckets_give_generates_tokens(mode):
    model = tiny_model("llama", **LONG).cuda()
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2))
    for lengths in ((200, 3), (230, 250), (600, 1)):
        rows = prompts(V, lengths)
        expected = [plain_generate(model, row, 330) for row in rows]
        assert ours.generate(rows, max_new_tokens=330, mode=mode).token_ids == expected


@pytest.mark.parametrize("family", ["llama", "gemma3-mixed-windows", "gpt2"])
def test_calls_of_every_size_and_order_give_generates_tokens(family):
    """Batches that are padded, limits and prompts that grow and shrink, EOS ids that come and go."""
    model = tiny_model(family).cuda()
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2))
    rows = prompts(V, (11, 3, 17, 6, 9))
    reference = plain_generate(model, rows[0], 12)
    for batch, new_tokens, eos in (
        (1, 9, None),
        (5, 12, reference[3]),
        (3, 30, None),
        (1, 3, reference[1]),
        (2, 40, 7),
    ):
        model.generation_config.eos_token_id = eos
        expected = [plain_generate(model, row, new_tokens) for row in rows[:batch]]
        assert ours.generate(rows[:batch], max_new_tokens=new_tokens).token_ids == expected
    model.generation_config.eos_token_id = None
    repeated = ours.generate(rows[:2], max_new_tokens=9, num_return_sequences=3).token_ids
    assert repeated == [plain_generate(model, row, 9) for row in rows[:2] for _ in range(3)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma3-mixed-windows", "gpt2", "llama-eager"])
def test_prompts_of_every_length_that_share_a_graph_give_generates_tokens(family, mode):
    model = tiny_model(family, **LONG).cuda()
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2, head_width=6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that they cannot be captured
        for lengths in ((200,), (30,), (1,), (32,), (33,), (64,), (7,), (129,), (40, 3), (2, 63), (300, 300), (9, 4)):
            rows = prompts(V, lengths)
            expected = [plain_generate(model, row, 9) for row in rows]
            assert ours.generate(rows, max_new_tokens=9, mode=mode).token_ids == expected


@pytest.mark.filterwarnings("ignore:.*Profiler clears events at the end of each cycle")
def test_prompts_take_one_launch_whatever_the_number_of_layers():
    """Of 6 layers as of 1; what is launched beside the graph does not grow with the layers."""
    counts = []
    for num_layers in (1, 6):
        model = tiny_model("llama", dtype=torch.float32, num_hidden_layers=num_layers).cuda()
        engine = engine_for(model, "fused", TokenLaw(True))
        rows = prompts(V, (11,))
        for _ in range(2):
            run(engine, rows, 1)
        names = profiled(lambda engine=engine, rows=rows: run(engine, rows, 1))
        counts.append(sum(name in ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC") for name in names))
        assert sum("GraphLaunch" in name for name in names) == 1
    assert counts[1] <= counts[0] + 2 * 5  # the buffers of keys and values are zeroed


@pytest.mark.parametrize("draft_input", ["mask_embeddings", "uniform_noise"])
@pytest.mark.parametrize("mode", ["two_pass", "fused"])
def test_heads_and_noise_give_generates_tokens(mode, draft_input):
    model = tiny_model("llama", **LONG).cuda()
    adapter = make_adapter(model, K, lora_rank=2, head_width=6, draft_input=draft_input)
    ours = SelfSpeculativeModel(model, None, adapter)
    for lengths in ((11, 3, 17), (200,), (6,)):
        rows = prompts(V, lengths)
        expected = [plain_generate(model, row, 60) for row in rows]
        counts = {}
        for use_head in (True, False, True):
            out = ours.generate(rows, max_new_tokens=60, mode=mode, use_head=use_head)
            assert out.token_ids == expected
            accepted = [one.accepted for one in out.counts]
            assert counts.setdefault(use_head, accepted) == accepted  # graphs of each are kept apart


def test_sampled_calls_with_one_seed_are_the_same_before_and_after_others():
    model = tiny_model("llama", dtype=torch.float32).cuda()
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K))
    options = {"max_new_tokens": 40, "temperature": 0.9, "top_k": 20, "top_p": 0.95, "min_p": 0.01}
    rows = prompts(V, (11, 3, 6))
    first = ours.generate(rows, seed=1, **options).token_ids
    state = torch.cuda.get_rng_state()
    other = ours.generate(rows, seed=2, **options).token_ids
    ours.generate(prompts(V, (30,)), seed=1, **options)
    assert torch.equal(torch.cuda.get_rng_state(), state)  # nobody else's generator is drawn from
    assert ours.generate(rows, seed=1, **options).token_ids == first != other
    ours.capture = False
    again = ours.generate(prompts(V, (11, 3)), seed=1, **options).token_ids
    ours.capture = True
    assert ours.generate(prompts(V, (11, 3)), seed=1, **options).token_ids == again  # not padded: the same draws


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.9, "seed": 4}, {"mode": "two_pass"}, {"mode": "plain"}], ids=str
)
def test_streams_bring_what_generate_brings_alone_and_in_turn(options):
    model = tiny_model("llama", dtype=torch.float32).cuda()
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2))
    rows = prompts(V, (11, 6))
    whole = [ours.generate([row], max_new_tokens=30, **options).token_ids[0] for row in rows]
    chunks = list(ours.stream(rows[0], max_new_tokens=30, **options))
    assert [token for chunk in chunks for token in chunk.token_ids] == whole[0]
    found = [[], []]
    for pair in itertools.zip_longest(*(ours.stream(row, max_new_tokens=30, **options) for row in rows)):
        for tokens, chunk in zip(found, pair, strict=True):
            tokens += [] if chunk is None else chunk.token_ids
    assert found == whole
    abandoned = ours.stream(rows[1], max_new_tokens=30, **options)
    next(abandoned)
    next(abandoned)
    abandoned.close()  # a step is still running
    assert ours.generate([rows[0]], max_new_tokens=30, **options).token_ids == [whole[0]]


def test_bfloat16_captured_and_uncaptured_steps_give_one_anothers_tokens():
    model = tiny_model("llama", dtype=torch.bfloat16, **LONG).cuda()
    for mode in MODES:
        engines = engine_for(model, mode, TokenLaw(True)), engine_for(model, mode, TokenLaw(True), recorder=rerun)
        rows = prompts(V, (200, 3, 17))
        captured, uncaptured = (run(engine, rows, 200) for engine in engines)
        assert captured == uncaptured


# ---------------------------------------------------------------------- what a step does to the device


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("law", ["greedy", "sampled"])
@pytest.mark.parametrize("copy_tokens", [0, 5])
@pytest.mark.parametrize("tree", [None, BRANCHING, DYNAMIC["dynamic"]], ids=["chain", "constant", "dynamic"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma3-mixed-windows", "gpt2", "llama-eager"])
def test_a_step_never_waits_for_the_device(family, mode, tree, copy_tokens, law):
    model = tiny_model(family, dtype=torch.float32).cuda()
    asked = on_cuda(TokenLaw(True) if law == "greedy" else sampled())
    decoder = decoder_for(model, mode, asked, tree=tree, copy_tokens=copy_tokens)
    decoder.eos_token_ids = torch.tensor([1, 2], device="cuda")
    with decoder.attached():
        state = decoder.prefill(prompts(V, (11, 3)), repeats=2)
        decoder.step(state)  # whatever is made once is made here
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            decoder.step(state)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def profiled(call) -> list[str]:
    """Names of everything that `call` does on the host and on the device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events()]


@pytest.mark.filterwarnings("ignore:.*Profiler clears events at the end of each cycle")
@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 0}, {"mode": "plain"}], ids=str)
def test_a_step_is_one_graph_launch_and_at_most_one_copy_to_the_host(options):
    """Beside them a call launches the graph of its prompts and the one that compares packed weights."""
    model = tiny_model("llama", dtype=torch.float32).cuda()
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2))
    rows = prompts(V, (11,))
    rest = []
    for new_tokens in (12, 60):
        for _ in range(3):  # packs and captures; weights are compared from the second on, captured from the third
            ours.generate(rows, max_new_tokens=new_tokens, **options)
        found = []
        names = profiled(lambda n=new_tokens, out=found: out.append(ours.generate(rows, max_new_tokens=n, **options)))
        steps = found[0].stats.num_steps
        launches = sum("GraphLaunch" in name for name in names)
        assert steps <= launches - 2 <= steps + 1  # one is launched before the last is known to be the last
        rest.append(sum("Memcpy DtoH" in name for name in names) - launches)
    assert rest[0] == rest[1]  # what prefill and the end read does not grow with the number of steps


# ---------------------------------------------------------------------- memory that graphs read


def test_graphs_read_no_memory_that_has_been_freed(monkeypatch):
    """As torch checks it, where it can: every tensor that a graph reads from outside is alive at each replay."""
    original = torch.cuda.graph

    class Checked(original):
        def __init__(self, *args, **options):
            super().__init__(*args, **options, check_input_liveness=True)

    if "check_input_liveness" not in original.__init__.__code__.co_varnames:
        pytest.skip("this torch cannot check")
    monkeypatch.setattr(torch.cuda, "graph", Checked)
    model = tiny_model("gemma3-mixed-windows", dtype=torch.float32, **LONG).cuda()
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for lengths, new_tokens in (((5, 2), 20), ((300, 2), 250), ((5, 2), 20), ((700,), 300), ((5, 2), 20)):
            for options in ({}, {"temperature": 0.9, "seed": 1}, {"mode": "plain"}):
                ours.generate(prompts(V, lengths), max_new_tokens=new_tokens, **options)


def test_the_graphs_of_one_engine_survive_those_of_another():
    """Matrix products of graphs may share a workspace, which must not go with the first of them."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "head_dim": 64, "num_attention_heads": 16} | LONG
    model = tiny_model("llama", dtype=torch.float32, **sizes).cuda()
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K))
    rows = prompts(V, (11, 3))
    expected = {mode: ours.generate(rows, max_new_tokens=40, mode=mode).token_ids for mode in MODES}
    for victim in MODES:
        ours.generate(prompts(V, (500, 3)), max_new_tokens=300, mode=victim)  # too small: its graphs are made anew
        torch.cuda.empty_cache()
        scribbles = [torch.full((2**20,), float("nan"), device="cuda") for _ in range(64)]
        for mode in MODES:
            assert ours.generate(rows, max_new_tokens=40, mode=mode).token_ids == expected[mode]
        assert all(bool(scribble.isnan().all()) for scribble in scribbles)  # nobody has written into them


def test_graphs_do_not_use_workspaces_that_others_may_free():
    """torch's own graph trees, and so torch.compile with reduce-overhead, free those of all streams."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "head_dim": 64, "num_attention_heads": 16} | LONG
    model = tiny_model("llama", dtype=torch.float32, **sizes).cuda()
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K))
    rows = prompts(V, (11, 3))
    expected = ours.generate(rows, max_new_tokens=40).token_ids
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    scribbles = [torch.full((2**20,), float("nan"), device="cuda") for _ in range(64)]
    assert ours.generate(rows, max_new_tokens=40).token_ids == expected
    assert all(bool(scribble.isnan().all()) for scribble in scribbles)


def test_memory_that_runs_out_in_prefill_is_taken_from_engines_that_wait():
    model = tiny_model("llama", dtype=torch.float32, **LONG).cuda()
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K))
    rows = prompts(V, (11,))
    expected = ours.generate(rows, max_new_tokens=40).token_ids
    failed = []

    def runs_out(module, args, kwargs):
        if not failed:
            failed.append(torch.cuda.memory_allocated())
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    handle = model.register_forward_pre_hook(runs_out, with_kwargs=True)
    assert ours.generate(rows, max_new_tokens=40, mode="plain").token_ids == expected
    handle.remove()
    assert failed


def test_engines_are_given_up_with_their_memory():
    model = tiny_model("llama", dtype=torch.float32).cuda()
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K))
    used = []
    for number in range(24):  # as many laws; the pool keeps eight
        ours.generate(prompts(V, (5,)), max_new_tokens=8, temperature=0.5 + number / 100, seed=0)
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert max(used[16:]) <= max(used[8:16]) * 1.05


# ---------------------------------------------------------------------- where steps cannot be captured


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 3}], ids=str)
def test_a_base_that_waits_for_the_device_runs_uncaptured_after_a_warning_for_prompts_and_one_for_steps(options):
    model = tiny_model("llama").cuda()
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2))
    rows = prompts(V, (11, 3))
    ours.capture = False
    expected = ours.generate(rows, max_new_tokens=20, **options).token_ids
    ours.capture = True
    seen = []
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output.sum().item()))
    with pytest.warns(UserWarning, match="cannot be captured as a CUDA graph") as caught:
        assert ours.generate(rows, max_new_tokens=20, **options).token_ids == expected
    told = [str(one.message) for one in caught if "cannot be captured" in str(one.message)]
    assert [text.split(" cannot")[0] for text in told] == ["prompts", "a step of 2 sequences and 16 rows"]
    assert ours.generate(rows, max_new_tokens=20, **options).token_ids == expected  # and no further warning
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours.generate(rows, max_new_tokens=20, **options).token_ids == expected  # captured again
    assert torch.rand(3, device="cuda").shape == (3,)  # torch's own generator serves as before


@pytest.mark.parametrize("mode", MODES)
def test_weights_that_change_between_calls_are_those_of_the_next_call(mode):
    """Graphs read copies of weights that share an input; PEFT merges past what counts versions."""
    model = tiny_model("llama").cuda()
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2))
    rows, layer = prompts(V, (11, 3)), model.model.layers[0]
    for weight in (None, layer.self_attn.k_proj.weight, layer.mlp.up_proj.weight):
        if weight is not None:
            weight.data[:3] += 0.5
        expected = [plain_generate(model, row, 30) for row in rows]
        for _ in range(2):
            assert ours.generate(rows, max_new_tokens=30, mode=mode).token_ids == expected


def test_garbage_that_is_collected_while_a_step_is_captured_does_no_harm():
    """Graphs and pinned memory in cycles of references, which Python frees whenever it likes."""
    model = tiny_model("llama", dtype=torch.float32).cuda()
    rows, layer = prompts(V, (11, 3)), model.model.layers[1]
    expected = SelfSpeculativeModel(model, None, make_adapter(model, K)).generate(rows, max_new_tokens=20).token_ids
    threshold = gc.get_threshold()
    for _ in range(3):
        ours = SelfSpeculativeModel(model, None, make_adapter(model, K))
        ours.itself = ours  # nothing but the collector frees it
        handle = layer.register_forward_hook(lambda *_: [[] for _ in range(100)] and None)
        gc.set_threshold(10, 1, 1)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert ours.generate(rows, max_new_tokens=20).token_ids == expected
        finally:
            gc.set_threshold(*threshold)
            handle.remove()


def test_memory_that_is_not_there_is_refused_with_what_would_fit():
    model = tiny_model("llama", dtype=torch.float32, max_position_embeddings=2**40).cuda()
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K))
    with pytest.raises(ValueError, match=r"cache: expected at most .* GiB, free on cuda.*tokens for each would fit"):
        ours.generate(prompts(V, (5,)), max_new_tokens=2**30)
    assert ours.generate(prompts(V, (5,)), max_new_tokens=4).stats.num_new_tokens == 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_model_on_another_device_than_the_current_one_is_captured_there():
    model = tiny_model("llama").to("cuda:1")
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2))
    row = prompts(V, (11,))[0]
    ids = torch.tensor([row], device="cuda:1")
    expected = model.generate(ids, max_new_tokens=30, do_sample=False)[0, 11:].tolist()
    for _ in range(2):
        assert ours.generate([row], max_new_tokens=30).token_ids == [expected]
    assert [t for chunk in ours.stream(row, max_new_tokens=30) for t in chunk.token_ids] == expected


# ---------------------------------------------------------------------- compiled


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.filterwarnings("ignore:(?s).*Online softmax is disabled")  # inductor's, over the parts of split keys
@pytest.mark.parametrize(("mode", "head_width"), [("plain", 0), ("fused", 0), ("fused", 6)])
def test_compiled_steps_give_generates_tokens_up_to_ties(mode, head_width):
    model = tiny_model("llama", dtype=torch.float32, num_hidden_layers=2).cuda()
    adapter = make_adapter(model, 2, lora_rank=2, head_width=head_width)
    ours = SelfSpeculativeModel(model, None, adapter, compile=True)
    rows = prompts(V, (11, 3))
    found = ours.generate(rows, max_new_tokens=24, mode=mode).token_ids
    for row, tokens in zip(rows, found, strict=True):
        reference = plain_generate(model, row, 24)
        if tokens == reference:
            continue
        first = next(i for i, (a, b) in enumerate(zip(reference, tokens, strict=True)) if a != b)
        ids = torch.tensor([row + reference[:first]], device="cuda")
        best = model(ids).logits[0, -1].topk(2).values
        assert float(best[0] - best[1]) < 1e-4
    assert ours.generate(rows, max_new_tokens=24, mode=mode).token_ids == found


# ---------------------------------------------------------------------- weights that others write to


def test_weights_are_compared_by_one_graph(monkeypatch):
    weights = [torch.randn(n, m, device="cuda", dtype=torch.bfloat16) for n, m in ((64, 48), (2048, 4100), (7, 6))]
    watch = weight_watch.WeightWatch(weights)
    for _ in range(2):  # the second time it is captured
        assert watch.holds(weights)

    def launched_again(*_):
        raise AssertionError("the comparison was not captured")

    monkeypatch.setattr(weight_watch.WeightWatch, "_differ_now", launched_again)
    for weight in weights:
        assert watch.holds(weights)
        kept = weight.clone()
        weight.data.view(-1)[-1:].add_(1)
        assert not watch.holds(weights)
        weight.data.copy_(kept)
    clear_device_cache()
    torch.empty(2**26, device="cuda").fill_(float("nan"))  # where whatever was freed lay
    assert watch.holds(weights)
