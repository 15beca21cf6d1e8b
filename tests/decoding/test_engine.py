"""The loop around the step: what it brings, slots that attention must see, memory that is refused; no GPU needed."""

import itertools
import threading
from types import SimpleNamespace

import psutil
import pytest
import torch
from greedy_oracle import plain_generate, prompts, tokens_of_generate
from recorded_steps import decoder_for, rerun, results, sampled, tape
from tiny_models import make_adapter, tiny_model
from torch import Tensor

from pardec.decoding import engine as engine_module
from pardec.decoding.engine import Engine, bucket, check_memory
from pardec.decoding.reports import Reports
from pardec.decoding.sampling import TokenLaw
from pardec.decoding.state import DecodeState
from pardec.model import SelfSpeculativeModel

K = 3
V = 61
NEW = 16
MODES = ["plain", "two_pass", "fused"]
RAGGED = (2, 11, 5)


def small_bucket(num_slots: int, *, few: bool, coarse: bool) -> int:
    return -(-num_slots // 4) * 4


@pytest.fixture
def small_buckets(monkeypatch):
    """Multiples of four: several in a generation, and none with much room to spare."""
    monkeypatch.setattr(engine_module, "bucket", small_bucket)


def run(engine: Engine, rows, *, repeats: int = 1, new_tokens: int = NEW, eos=()) -> list:
    """What a call brings, for each sequence: its tokens, accepted and drafted counts."""
    engine.decoder.max_new_tokens = new_tokens
    engine.decoder.eos_token_ids = torch.tensor(list(eos), dtype=torch.long)
    for _ in engine.run(rows, repeats=repeats):
        pass
    return results(engine.decoder, engine.state)[: len(rows) * repeats]


# ---------------------------------------------------------------------- captured or not


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("recorder", [rerun, tape])
def test_captured_steps_bring_what_uncaptured_steps_bring_whatever_came_before(mode, recorder, small_buckets):
    """Other prompts, numbers of them, lengths, limits and EOS ids than in the call before, shorter and longer."""
    model = tiny_model("gemma3-mixed-windows")
    plain = Engine(decoder_for(model, mode, TokenLaw(True)), 1)
    captured = Engine(decoder_for(model, mode, TokenLaw(True)), 1, captured=True, recorder=recorder)
    calls = [((6,), 9, ()), ((9, 2, 5), 6, (1, 2)), ((1, 3, 2), 12, (3, 4)), ((4,), 1, ()), ((12, 1), 5, (7, 7))]
    for shift, (lengths, new_tokens, eos) in enumerate(calls):
        rows = [[(token + shift) % V for token in row] for row in prompts(V, lengths)]
        options = {"new_tokens": new_tokens, "eos": eos}
        expected = run(plain, rows, **options)
        assert run(captured, rows, **options) == expected
        assert [len(tokens) for tokens, _, _ in expected] == [
            len(plain_generate(model, row, new_tokens, eos_token_id=list(eos) or None)) for row in rows
        ]


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("mode", ["plain", "fused"])
def test_captured_steps_draw_the_numbers_that_uncaptured_steps_draw(mode, batch, small_buckets):
    """Batches that are not padded: padding draws numbers too."""
    model = tiny_model("llama")
    plain = Engine(decoder_for(model, mode, sampled()), 1)
    captured = Engine(decoder_for(model, mode, sampled()), 1, captured=True, recorder=tape)
    rows = prompts(V, (5, 2, 7, 3))[:batch]
    seen = []
    for seed in (1, 2, 1):
        for engine in (plain, captured):
            engine.decoder.law.generator.manual_seed(seed)
        seen.append(run(plain, rows, new_tokens=9))
        assert run(captured, rows, new_tokens=9) == seen[-1]
        states = [engine.decoder.law.generator.get_state() for engine in (plain, captured)]
        assert torch.equal(*states)  # neither has drawn more than the other
    assert seen[0] == seen[2] != seen[1]


@pytest.mark.parametrize("batch", [3, 5])
def test_padded_batches_of_captured_steps_sample_for_real_rows_only(batch):
    model = tiny_model("llama")
    engine = Engine(decoder_for(model, "fused", sampled()), 1, captured=True, recorder=rerun)
    found = run(engine, prompts(V, (5, 2, 7, 3, 4))[:batch])
    assert len(found) == batch
    assert all(len(tokens) == NEW for tokens, _, _ in found)
    assert engine.state.num_new.tolist() == [NEW] * batch + [0] * (engine.state.lengths.shape[0] - batch)


def test_tensors_of_captured_steps_stay_where_they_are_while_calls_fit():
    model = tiny_model("llama")
    engine = Engine(decoder_for(model, "fused", TokenLaw(True)), 1, captured=True, recorder=rerun)
    run(engine, prompts(V, (9, 9)), new_tokens=20)
    state = engine.state

    def addresses() -> list[int]:
        tensors = [state.lengths, state.drafts, state.output, state.num_new, state.done, state.bonus]
        return [t.data_ptr() for t in (*tensors, *(layer.keys for layer in state.cache.layers))]

    before = addresses()
    for lengths, new_tokens in (((3, 1), 4), ((9, 2), 20), ((1, 12), 7)):
        rows = prompts(V, lengths)
        found = run(engine, rows, new_tokens=new_tokens)
        assert [tokens for tokens, _, _ in found] == [plain_generate(model, row, new_tokens) for row in rows]
        assert engine.state is state
        assert addresses() == before
    rows = prompts(V, (100, 2))
    found = run(engine, rows, new_tokens=60)  # more than was allocated
    assert [tokens for tokens, _, _ in found] == [plain_generate(model, row, 60) for row in rows]


def test_an_engine_that_was_left_half_way_starts_afresh():
    model = tiny_model("llama")
    engine = Engine(decoder_for(model, "fused", TokenLaw(True)), 1, captured=True, recorder=tape)
    rows = prompts(V, (9, 2))
    steps = engine.run(prompts(V, (7, 12)))
    engine.decoder.max_new_tokens = NEW
    for _ in range(3):
        next(steps)
    steps.close()
    assert [tokens for tokens, _, _ in run(engine, rows)] == [plain_generate(model, row, NEW) for row in rows]


def test_where_recording_fails_tokens_are_right_all_the_same():
    def refuses(run, generator, pool):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    model = tiny_model("llama")
    engine = Engine(decoder_for(model, "fused", TokenLaw(True)), 1, captured=True, recorder=refuses)
    rows = prompts(V, (5, 2, 7))
    expected = [plain_generate(model, row, NEW) for row in rows]
    with pytest.warns(UserWarning, match="cannot be captured as a CUDA graph .*not permitted") as caught:
        assert [tokens for tokens, _, _ in run(engine, rows)] == expected
    assert [str(one.message).split(" cannot")[0] for one in caught] == [
        "prompts",
        "a step of 4 sequences and 16 rows",
    ]
    assert [tokens for tokens, _, _ in run(engine, rows)] == expected  # a second warning would be an error


# ---------------------------------------------------------------------- what a step sees of the cache


class Planted(Engine):
    """Drafts the truth, as many tokens of it as the row's number says, and checks the slots that each step writes.

    With `says_cuda` the loop believes that it runs on a GPU, and reads every step after the next was launched.
    """

    def __init__(self, decoder, references, num_true, *, says_cuda: bool = False):
        super().__init__(decoder, 1)
        self.references, self.num_true, self.says_cuda = references, num_true, says_cuda
        self.spare: list[int] = []
        self.seen: list[int] = []

    def _begin(self, prompts, repeats, kept, num_kept):
        state = super()._begin(prompts, repeats, kept, num_kept)
        if self.says_cuda:
            self.lengths, state.lengths = state.lengths, SimpleNamespace(device=torch.device("cuda"))
        return state

    def _step(self, state: DecodeState):
        if not isinstance(state.lengths, Tensor):
            state.lengths = self.lengths
        if self.decoder.mode == "fused":
            state.drafts = torch.tensor([self.draft(b, int(n)) for b, n in enumerate(state.num_new)])
        live = ~state.done
        result = super()._step(state)
        if live.any():
            self.spare.append(state.cache.num_used - 1 - int(state.cache.slots[live].max()))
            self.seen.append(state.cache.num_used)
        return result

    def draft(self, b: int, start: int) -> list[int]:
        truth = (self.references[b] + [0] * K)[start : start + K]
        return [token if i < self.num_true[b] else (token + 1) % V for i, token in enumerate(truth)]


@pytest.mark.parametrize("num_true", [(0, 3, 1), (3, 3, 3), (0, 0, 0), (3, 0, 2)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_every_slot_that_a_live_row_writes_is_seen(mode, num_true, small_buckets):
    """Also where rows are accepted raggedly and the longest one is done first."""
    model = tiny_model("llama")
    rows, truth = prompts(V, RAGGED), tokens_of_generate("llama", V, NEW + K + 2, RAGGED)
    engine = Planted(decoder_for(model, mode, TokenLaw(True)), truth, num_true)
    found = run(engine, rows)
    assert [tokens for tokens, _, _ in found] == [reference[:NEW] for reference in truth]
    assert min(engine.spare) >= 0
    assert max(engine.spare) <= 4 + 1  # a bucket's rounding, and what two_pass needs beside
    assert len(set(engine.seen)) > 2
    if mode == "fused":
        assert [max(accepted) for _, accepted, _ in found] == list(num_true)


@pytest.mark.parametrize("num_true", [(0, 3, 1), (3, 3, 3), (3, 0, 2)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_reading_one_step_behind_brings_the_same_and_still_covers_every_slot(
    mode, num_true, small_buckets, monkeypatch
):
    model = tiny_model("llama")
    rows, truth = prompts(V, RAGGED), tokens_of_generate("llama", V, NEW + K + 2, RAGGED)
    brought = []
    for says_cuda in (False, True):
        decoder = decoder_for(model, mode, TokenLaw(True), new_tokens=NEW)
        engine = Planted(decoder, truth, num_true, says_cuda=says_cuda)
        if says_cuda:
            monkeypatch.setattr(engine_module, "Reports", _ReportsOnCpu)
        brought.append([])
        ahead = 0
        for progress in engine.run(rows):
            brought[-1].append(progress)
            ahead += engine.state.num_new.tolist() != progress.num_new
        assert min(engine.spare) >= 0
        assert (ahead > 0) == says_cuda  # while a step is read the next has run
    behind, now = brought[1], brought[0]
    assert behind == now
    for b, reference in enumerate(truth):
        assert list(itertools.chain(*(progress.tokens[b] for progress in behind))) == reference[:NEW]


class _ReportsOnCpu(Reports):
    """Reads as on a CPU although the loop believes that it is on a GPU."""

    def post(self, state, *report):
        lengths, state.lengths = state.lengths, torch.empty(0)
        super().post(state, *report)
        state.lengths = lengths


# ---------------------------------------------------------------------- progress


@pytest.mark.parametrize("mode", MODES)
def test_progress_says_what_each_step_emitted(mode):
    model = tiny_model("llama")
    rows = prompts(V, (5, 2))
    engine = Engine(decoder_for(model, mode, TokenLaw(True), new_tokens=NEW), 1)
    emitted, before = [[], []], [0, 0]
    steps = list(engine.run(rows))
    for progress in steps:
        for b in range(2):
            emitted[b] += progress.tokens[b]
            assert len(emitted[b]) == progress.num_new[b] == before[b] + len(progress.tokens[b])
            before[b] = progress.num_new[b]
            assert progress.done[b] == (progress.num_new[b] == NEW)
    assert emitted == [plain_generate(model, row, NEW) for row in rows]
    assert steps[0].num_accepted == [0, 0]
    assert [not all(progress.done) for progress in steps] == [True] * (len(steps) - 1) + [False]


def test_nothing_is_run_after_prefill_where_one_token_is_asked_for():
    model = tiny_model("llama")
    for captured in (False, True):
        engine = Engine(decoder_for(model, "fused", TokenLaw(True), new_tokens=1), 1, captured=captured, recorder=rerun)
        rows = prompts(V, (5, 2, 3))
        (progress,) = engine.run(rows)
        assert progress.done == [True] * 3
        assert progress.tokens == [plain_generate(model, row, 1) for row in rows]


@pytest.mark.parametrize("captured", [False, True])
def test_repeats_stand_next_to_each_other(captured):
    model = tiny_model("llama")
    rows = prompts(V, (5, 2, 3))
    engine = Engine(decoder_for(model, "fused", TokenLaw(True)), 1, captured=captured, recorder=rerun)
    found = run(engine, rows, repeats=2)
    assert [tokens for tokens, _, _ in found] == [plain_generate(model, row, NEW) for row in rows for _ in range(2)]


def test_the_loras_hooks_are_on_the_base_only_while_the_loop_runs():
    model = tiny_model("llama")
    engine = Engine(decoder_for(model, "fused", TokenLaw(True)), 1)

    def hooked() -> bool:
        return any(module._forward_hooks for module in model.modules())

    for between in ("nothing", "reads", "writes"):  # whoever looks at the base between two steps finds no hooks there
        steps = engine.run(prompts(V, (5,)), between=between)
        assert not hooked()
        next(steps)
        next(steps)
        assert hooked() is (between == "nothing")
        steps.close()
        assert not hooked()
    with pytest.raises(KeyError):
        fails_in_the_middle(engine)
    assert not hooked()


def fails_in_the_middle(engine: Engine) -> None:
    step, engine.decoder.step = engine.decoder.step, None
    calls = iter((step, step))

    def broken(state):
        next(calls, raising)(state)

    def raising(state):
        raise KeyError

    engine.decoder.step = broken
    for _ in engine.run(prompts(V, (5,))):
        pass


def test_two_threads_of_one_model_get_their_own_tokens():
    model = tiny_model("llama", dtype=torch.float32)
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2))
    rows = prompts(V, (9, 2, 5))
    expected = [plain_generate(model, row, NEW) for row in rows]
    wrong = []

    def work(b: int, mode: str) -> None:
        for _ in range(6):
            found = ours.generate([rows[b]], max_new_tokens=NEW, mode=mode).token_ids[0]
            wrong.extend([mode] if found != expected[b] else [])

    threads = [threading.Thread(target=work, args=(b, mode)) for b, mode in enumerate(MODES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())


# ---------------------------------------------------------------------- buckets


@pytest.mark.parametrize(("few", "coarse"), [(False, False), (False, True), (True, False), (True, True)])
def test_buckets_cover_what_is_needed_and_are_few(few, coarse):
    sizes = [bucket(n, few=few, coarse=coarse) for n in range(1, 40_000)]
    assert all(size >= n for n, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert all(bucket(size, few=few, coarse=coarse) == size for size in set(sizes))
    if few:
        assert set(sizes) == {2**power for power in range(8, 16)} | {3 * 2**power for power in range(8, 15)}
    elif coarse:
        assert all(size % 256 == 0 for size in sizes)
        assert all(size - n < max(256, n / 4) for n, size in enumerate(sizes, 1))
        assert len(set(sizes)) < 50
    else:
        assert all(size % 64 == 0 and size - n < 64 for n, size in enumerate(sizes, 1))


# ---------------------------------------------------------------------- memory


class Memory:
    def __init__(self, available: int):
        self.available = available


def test_a_cache_that_does_not_fit_is_refused_with_what_would(monkeypatch):
    gib = 2**30
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(3 * gib))
    cpu = torch.device("cpu")
    check_memory(cpu, 2**20, 3, 1024)  # just fits
    with pytest.raises(ValueError) as error:
        check_memory(cpu, 2**20, 8, 1024)
    assert str(error.value) == (
        "cache: expected at most 3.00 GiB, free on cpu, found 8.00 GiB for 8 sequences of 1024 tokens; "
        "3 such sequences or 384 tokens for each would fit"
    )
    check_memory(cpu, 2**20, 8, 384)
    check_memory(torch.device("meta"), 2**20, 10**9, 10**9)  # nothing is known about other devices


@pytest.mark.parametrize("captured", [False, True])
def test_memory_is_refused_before_anything_is_allocated_or_run(captured, monkeypatch):
    model = tiny_model("llama")
    engine = Engine(decoder_for(model, "fused", TokenLaw(True)), 768, captured=captured, recorder=rerun)
    ran = []
    handle = model.register_forward_pre_hook(lambda *args: ran.append(args))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(10_000))
    with pytest.raises(ValueError, match=r"cache: expected at most 0\.00 GiB, free on cpu, found"):
        run(engine, prompts(V, (5, 2)))
    assert ran == []
    monkeypatch.undo()
    handle.remove()
    rows = prompts(V, (5, 2))
    assert [tokens for tokens, _, _ in run(engine, rows)] == [plain_generate(model, row, NEW) for row in rows]


def test_the_estimate_counts_prompt_new_tokens_rows_and_sequences(monkeypatch):
    """One sequence of the tiny Llama takes 2 (keys, values) x 3 layers x 2 heads x 8 x 8 bytes = 768 for a token."""
    model = tiny_model("llama")
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K))
    tokens = 5 + 20 + 1 + (K + 1) ** 2
    options = {"max_new_tokens": 20, "num_return_sequences": 2}
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(2 * 768 * tokens))
    ours.generate(prompts(V, (5, 2)), max_new_tokens=20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(2 * 768 * tokens - 1))
    with pytest.raises(
        ValueError, match=f"for 2 sequences of {tokens} tokens; 1 such sequences or {tokens - 1} tokens"
    ):
        ours.generate(prompts(V, (5, 2)), max_new_tokens=20)
    with pytest.raises(ValueError, match=f"for 2 sequences of {tokens} tokens"):
        ours.generate(prompts(V, (5,)), **options)
