"""Recorded steps against steps that run, without a GPU: a tape of tensor operations stands for a CUDA graph."""

import dataclasses
import warnings

import pytest
import torch
from greedy_oracle import plain_generate, prompts
from recorded_steps import K, V, decoder_for, rerun, results, sampled, tape, tensors_of
from tiny_models import make_adapter, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TypicalLogitsWarper,
)
from tree_samples import BRANCHING, CROOKED, DYNAMIC, WIDE

from pardec.adapters.gated_lora import LoraGate
from pardec.adapters.noise import NoiseTokens
from pardec.decoding.drafting import HeadDrafter
from pardec.decoding.graphs import CapturedSteps
from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw
from pardec.decoding.step import Decoder
from pardec.target.cache import SlotCache
from pardec.target.forward import TargetModel

MODES = ["plain", "two_pass", "fused"]


def decode(
    steps: CapturedSteps | None, decoder: Decoder, rows, cache: SlotCache, *, capacity: int = 20, bucket: int = 16
):
    """The final state of steps that run through `steps`, or as they are."""
    with decoder.attached():
        state = decoder.prefill(rows, cache=cache, capacity=capacity)
        if steps is not None:
            state = steps.take_over(state)
        while not state.done.all():
            needed = int(state.lengths[~state.done].max()) + decoder.num_slots_per_step
            cache.num_used = min(-(-needed // bucket) * bucket, cache.num_slots)
            if steps is None:
                decoder.step(state)
            else:
                steps.step()
    return state


# ---------------------------------------------------------------------- what is recorded is what runs


@pytest.mark.parametrize(
    ("family", "mode", "greedy", "batch", "options"),
    [
        ("llama", "plain", True, 1, {}),
        ("llama", "plain", False, 2, {}),
        ("llama", "two_pass", True, 2, {}),
        ("llama", "fused", True, 1, {}),
        ("llama", "fused", False, 1, {}),
        ("llama", "fused", False, 2, {}),
        ("gemma3-mixed-windows", "fused", True, 2, {}),
        ("gemma3-mixed-windows", "two_pass", True, 1, {}),
        ("gpt2", "fused", False, 2, {}),
        ("llama-eager", "fused", True, 2, {}),
        ("llama", "fused", True, 2, {"head_width": 6}),
        ("llama", "fused", False, 1, {"head_width": 6}),
        ("gemma3-mixed-windows", "fused", False, 2, {"head_width": 6, "noise": True}),
        ("gpt2", "two_pass", False, 2, {"head_width": 6}),
        ("llama", "fused", True, 1, {"noise": True}),
        ("llama", "two_pass", True, 2, {"noise": True}),
        ("llama", "fused", False, 2, {"verification": "block"}),
        ("gpt2", "two_pass", False, 1, {"verification": "block", "head_width": 6}),
        ("llama", "fused", True, 1, {"tree": BRANCHING}),
        ("llama", "fused", False, 2, {"tree": CROOKED}),
        ("gemma3-mixed-windows", "fused", True, 2, {"tree": BRANCHING, "head_width": 6}),
        ("gpt2", "two_pass", True, 2, {"tree": CROOKED, "noise": True}),
        ("llama", "two_pass", False, 2, {"tree": WIDE, "head_width": 6}),
        ("llama", "fused", True, 2, {"tree": DYNAMIC["dynamic"], "head_width": 6}),
        ("gemma3-mixed-windows", "fused", False, 2, {"tree": DYNAMIC["dynamic"]}),
        ("gpt2", "two_pass", True, 1, {"tree": DYNAMIC["dynamic, few"], "head_width": 6}),
        ("llama", "fused", True, 2, {"copy_tokens": 3}),
        ("gpt2", "two_pass", True, 1, {"copy_tokens": 3}),
        ("gemma3-mixed-windows", "fused", False, 2, {"copy_tokens": 2, "head_width": 6}),
        ("llama", "fused", False, 1, {"copy_tokens": 2, "verification": "block"}),
        ("llama", "fused", False, 2, {"tree": CROOKED, "copy_tokens": 5}),
        ("gemma3-mixed-windows", "fused", True, 2, {"tree": BRANCHING, "copy_tokens": 2, "head_width": 6}),
        ("gpt2", "two_pass", False, 1, {"tree": WIDE, "copy_tokens": 3}),
        ("llama", "fused", True, 2, {"tree": DYNAMIC["dynamic"], "copy_tokens": 4, "head_width": 6}),
        ("gemma3-mixed-windows", "fused", False, 1, {"tree": DYNAMIC["dynamic"], "copy_tokens": 2}),
    ],
)
def test_recorded_steps_bring_the_tokens_counts_and_draws_of_steps_that_run(family, mode, greedy, batch, options):
    """Prompts, the seed and EOS ids change from call to call, and there are several buckets."""
    model = tiny_model(family)
    plain, recorded = (decoder_for(model, mode, TokenLaw(True) if greedy else sampled(), **options) for _ in range(2))
    plain.is_recorded = True  # does not look at its numbers either: it would leave out rows, and what they draw
    cache, recordings = SlotCache(3, 64, batch), []

    def counting(*args):
        recordings.append(cache.num_used)
        return tape(*args)

    steps = CapturedSteps(recorded, counting)
    for call, lengths in enumerate(((9, 3), (2, 6), (13, 13))):
        rows = [[(token + call) % V for token in row] for row in prompts(V, lengths)][:batch]
        for decoder in (plain, recorded):
            decoder.eos_token_ids = torch.tensor([call, 50 - call])
            if not greedy:
                decoder.law.generator.manual_seed(call)
        expected = decode(None, plain, rows, SlotCache(3, 64, batch))
        found = decode(steps, recorded, rows, cache)
        assert results(recorded, found) == results(plain, expected)
        for name, tensor in tensors_of(expected).items():
            assert torch.equal(getattr(found, name), tensor), name  # drafts and their law, lengths, what is reported
    assert len(recordings) == len(set(recordings)) > 1


@pytest.mark.parametrize("recorder", [rerun, tape])
def test_recorded_greedy_steps_give_generates_tokens(recorder):
    model = tiny_model("qwen3-mixed-windows")
    rows = prompts(V)
    decoder = decoder_for(model, "fused", TokenLaw(True))
    state = decode(CapturedSteps(decoder, recorder), decoder, rows, SlotCache(3, 64, 4))
    assert state.output[:, :12].tolist() == [plain_generate(model, row, 12) for row in rows]


def test_the_tape_notices_values_of_the_host_and_memory_that_is_freed():
    """What the tests above rely on."""
    held = {"x": torch.zeros(2), "scale": 1}
    replay = tape(lambda: held["x"].add_(torch.ones(2) * held["scale"]), None, None)
    held["scale"] = 5
    replay()
    assert held["x"].tolist() == [2.0, 2.0]  # recorded once, replayed once, with the scale of the recording
    del held["x"]
    with pytest.raises(AssertionError, match="memory that has been freed"):
        replay()


# ---------------------------------------------------------------------- where tensors stay


@pytest.mark.parametrize("greedy", [True, False])
def test_tensors_stay_where_they_are_from_step_to_step_and_call_to_call(greedy):
    model = tiny_model("llama")
    decoder = decoder_for(model, "fused", TokenLaw(True) if greedy else sampled())
    steps, cache = CapturedSteps(decoder, rerun), SlotCache(3, 64, 2)
    addresses = set()
    for lengths in ((11, 3), (2, 6)):
        with decoder.attached():
            state = steps.take_over(decoder.prefill(prompts(V, lengths), cache=cache, capacity=20))
            for _ in range(4):
                steps.step()
                fixed = {name: t.data_ptr() for name, t in tensors_of(steps.state).items() if name != "prompts"}
                buffers = [t.data_ptr() for layer in cache.layers for t in (layer.keys, layer.values)]
                addresses.add((*fixed.items(), *buffers))
                assert steps.state is state
    assert len(addresses) == 1


def test_graphs_are_kept_while_the_state_fits_and_made_anew_when_it_does_not():
    model = tiny_model("llama")
    decoder = decoder_for(model, "fused", TokenLaw(True))
    recorded = []

    def count(run, generator, pool):
        recorded.append(run)
        return run

    steps, cache = CapturedSteps(decoder, count), SlotCache(3, 64, 2)
    rows = prompts(V, (5, 5))
    decode(steps, decoder, rows, cache, bucket=64)
    decode(steps, decoder, rows, cache, bucket=64)
    assert len(recorded) == 1
    decode(steps, decoder, rows, cache, bucket=8)
    num_buckets = len(recorded)
    assert num_buckets > 2
    decode(steps, decoder, rows, cache, bucket=8)
    assert len(recorded) == num_buckets
    for other_cache, capacity in ((SlotCache(3, 64, 2), 20), (SlotCache(3, 128, 2), 30)):
        state = decode(steps, decoder, rows, other_cache, capacity=capacity, bucket=64)
        assert state.output[:, :12].tolist() == [plain_generate(model, row, 12) for row in rows]
    assert len(recorded) == num_buckets + 2


def test_fits_says_which_states_can_be_taken_over():
    decoder = decoder_for(tiny_model("llama"), "fused", TokenLaw(True))
    steps = CapturedSteps(decoder, rerun)
    assert not steps.fits(2, 1, 1)  # nothing has been taken over yet
    steps.take_over(decoder.prefill(prompts(V, (5, 5)), cache=SlotCache(3, 64, 2), capacity=20))
    assert steps.fits(2, 64, 20)
    assert steps.fits(2, 10, 3)
    assert not steps.fits(2, 65, 20)
    assert not steps.fits(2, 64, 21)
    assert not steps.fits(1, 64, 20)
    assert not steps.fits(4, 64, 20)


# ---------------------------------------------------------------------- recording leaves no trace


@pytest.mark.parametrize(("mode", "greedy"), [("plain", False), ("fused", True), ("fused", False), ("two_pass", True)])
def test_warming_up_and_recording_leave_no_trace(mode, greedy):
    model = tiny_model("llama")
    law = TokenLaw(True) if greedy else sampled()
    decoder = decoder_for(model, mode, law)
    cache, checked = SlotCache(3, 64, 2), []
    with decoder.attached():
        state = decoder.prefill(prompts(V, (11, 3)), cache=cache)
        before = {name: tensor.clone() for name, tensor in tensors_of(state).items()}
        committed = [[t[b, :, :n].clone() for b, n in enumerate((11, 3))] for t in buffers_of(cache)]
        draws = None if greedy else law.generator.get_state()

        def recorder(run, generator, pool):
            assert generator is law.generator
            run()  # nothing of a recording is kept

            def check():
                assert all(torch.equal(getattr(steps.state, name), tensor) for name, tensor in before.items())
                for buffer, kept in zip(buffers_of(cache), committed, strict=True):
                    assert all(torch.equal(buffer[b, :, : kept[b].shape[1]], kept[b]) for b in range(2))
                assert greedy or torch.equal(law.generator.get_state(), draws)
                checked.append(cache.num_used)

            return check

        steps = CapturedSteps(decoder, recorder)
        steps.take_over(state)
        for num_used in (64, 48, 64):
            cache.num_used = num_used
            steps.step()
    assert checked == [64, 48, 64]


def buffers_of(cache: SlotCache) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


# ---------------------------------------------------------------------- where recording fails


def refuses(run, generator, pool):
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nSearch for it in the manual")


def refuses_afterwards(run, generator, pool):
    run()
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def not_implemented(run, generator, pool):
    raise NotImplementedError("operation not permitted on this device")


@pytest.mark.parametrize("recorder", [refuses, refuses_afterwards, not_implemented])
@pytest.mark.parametrize("greedy", [True, False])
def test_where_recording_fails_steps_run_after_one_warning_that_says_why(recorder, greedy):
    model = tiny_model("llama")
    plain, failing = (decoder_for(model, "fused", TokenLaw(True) if greedy else sampled()) for _ in range(2))
    steps, cache = CapturedSteps(failing, recorder), SlotCache(3, 64, 2)
    for call, lengths in enumerate(((11, 3), (2, 6))):
        rows = prompts(V, lengths)
        expected = decode(None, plain, rows, SlotCache(3, 64, 2))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = decode(steps, failing, rows, cache)
        assert results(failing, found) == results(plain, expected)
        assert len(caught) == (call == 0)
        if caught:
            text = str(caught[0].message)
            assert text.startswith("a step of 2 sequences and 16 rows cannot be captured as a CUDA graph (")
            assert "operation not permitted" in text
            assert "steps run uncaptured" in text
            assert "\n" not in text


def test_a_bug_in_a_recorder_is_not_taken_for_a_device_that_cannot_record():
    def broken(run, generator, pool):
        raise KeyError("draft_probs")

    decoder = decoder_for(tiny_model("llama"), "fused", TokenLaw(True))
    with pytest.raises(KeyError):
        decode(CapturedSteps(decoder, broken), decoder, prompts(V, (5,)), SlotCache(3, 64, 1))


# ---------------------------------------------------------------------- what a graph could not hold


class _HostTensors(TorchDispatchMode):
    """Operations that touch a tensor on the host."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.num_calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.found.append(str(func))
        self.num_calls += 1
        return out


def step_without_values(
    family: str, mode: str, law: TokenLaw, *, batch: int = 2, dtype=torch.float32, **options
) -> _HostTensors:
    """Two steps on the meta device, where tensors have no values: whatever asks for one raises."""
    model = tiny_model(family, dtype=dtype)
    here = decoder_for(model, mode, law, eos=[1, 2], **options)
    state = here.prefill(prompts(V, (5, 3))[:batch])
    if mode == "two_pass" and not law.greedy:
        state.draft_probs = torch.zeros(batch, K, V)
    adapter = make_adapter(model, K, lora_rank=2, head_width=options.get("head_width", 0))
    model.to("meta")
    target = TargetModel.wrap(model)
    head, rows = None if here.head is None else HeadDrafter.of(adapter, target), here.forward
    forward = RowForward(
        target,
        mask_embeddings=None if rows.mask_embeddings is None else rows.mask_embeddings.to("meta"),
        gate=None if rows.gate is None else LoraGate(model, adapter.lora),
        query_group=rows.query_group,
        noise=None if rows.noise is None else NoiseTokens(rows.noise.table.to("meta")),
        tap=head and head.tap,
    )
    decoder = dataclasses.replace(here, forward=forward, head=head)
    cache = SlotCache(3, 64, batch)
    cache.num_used = 32
    moved = {name: tensor.to("meta") for name, tensor in tensors_of(state).items()}
    state = dataclasses.replace(state, cache=cache, **moved)
    with decoder.attached(), _HostTensors() as host:
        for _ in range(2):
            decoder.step(state)
    return host


LAWS = {
    "greedy": lambda: TokenLaw(True),
    "all-warpers": lambda: dataclasses.replace(sampled(), generator=None),
    "typical": lambda: TokenLaw(False, (TypicalLogitsWarper(0.9), EpsilonLogitsWarper(0.01))),
}


@pytest.mark.parametrize(
    ("family", "mode", "law", "options"),
    [
        *[("llama", mode, law, {}) for mode in MODES for law in LAWS],
        *[("gemma3-mixed-windows", mode, "all-warpers", {}) for mode in MODES],
        *[("gpt2", mode, "greedy", {}) for mode in MODES],
        ("llama-eager", "fused", "greedy", {}),
        ("opt", "fused", "greedy", {}),
        ("phi3-window", "fused", "greedy", {}),
        ("llama", "fused", "all-warpers", {"batch": 1}),
        ("llama", "two_pass", "greedy", {"batch": 1}),
        ("llama", "plain", "greedy", {"batch": 1}),
        ("llama", "fused", "greedy", {"dtype": torch.float64}),
        ("llama", "fused", "all-warpers", {"dtype": torch.bfloat16}),
        *[("llama", mode, law, {"head_width": 6}) for mode in ("two_pass", "fused") for law in LAWS],
        ("gpt2", "fused", "all-warpers", {"head_width": 6, "noise": True, "batch": 1}),
        ("llama", "fused", "greedy", {"head_width": 6, "dtype": torch.float64}),
        *[("llama", mode, "greedy", {"noise": True}) for mode in ("two_pass", "fused")],
        *[("llama", mode, "all-warpers", {"verification": "block"}) for mode in ("two_pass", "fused")],
        ("llama", "fused", "typical", {"verification": "block", "head_width": 6, "batch": 1}),
        *[("llama", mode, law, {"copy_tokens": 3}) for mode in ("two_pass", "fused") for law in LAWS],
        ("gpt2", "fused", "all-warpers", {"copy_tokens": 3, "head_width": 6, "batch": 1}),
    ],
)
def test_a_step_asks_for_no_value_and_touches_no_tensor_on_the_host(family, mode, law, options):
    host = step_without_values(family, mode, LAWS[law](), **options)
    assert host.found == []
    assert host.num_calls > 100


def test_a_step_that_asks_for_a_value_or_for_the_host_would_be_noticed():
    """What the test above relies on."""
    with pytest.warns(UserWarning, match="row by row on the host"):
        law = TokenLaw(True, (RepetitionPenaltyLogitsProcessor(1.2),))
    with pytest.raises(RuntimeError, match="meta"):
        step_without_values("llama", "fused", law)
    with _HostTensors() as host:
        torch.ones(3, device="meta") * torch.tensor(2.0)
    assert "aten.mul.Tensor" in host.found
