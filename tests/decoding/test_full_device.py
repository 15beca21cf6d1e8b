"""What an engine does where the device is full or fails: it makes room once, and tells what came first."""

import gc
import weakref

import pytest
import torch
from greedy_oracle import plain_generate, prompts
from recorded_steps import decoder_for, rerun, results, sampled, tape
from tiny_models import tiny_model

from pardec.decoding import prompt_graphs
from pardec.decoding.engine import Engine
from pardec.decoding.sampling import TokenLaw
from pardec.decoding.state import DecodeState

V = 61
NEW = 16


def run(engine: Engine, rows) -> list[list[int]]:
    """The tokens of each row."""
    engine.decoder.max_new_tokens = NEW
    for _ in engine.run(rows):
        pass
    return [tokens for tokens, _, _ in results(engine.decoder, engine.state)[: len(rows)]]


class DeviceError(RuntimeError):
    """Stands for torch.AcceleratorError, which only an accelerator raises."""

    def __init__(self, error_code: int):
        super().__init__(f"CUDA error {error_code}")
        self.error_code = error_code


def test_a_capture_that_fails_for_a_reason_of_captures_is_told_by_its_first_cause():
    def refuses(run, generator, site):
        try:
            raise DeviceError(900)  # not permitted when stream is capturing
        except DeviceError:
            raise DeviceError(901)  # noqa: B904 - what the end of the capture says

    model = tiny_model("llama")
    engine = Engine(decoder_for(model, "fused", TokenLaw(True)), 1, captured=True, recorder=refuses)
    rows = prompts(V, (5, 2))
    with pytest.warns(UserWarning, match=r"cannot be captured as a CUDA graph \(CUDA error 900\)"):
        assert run(engine, rows) == [plain_generate(model, row, NEW) for row in rows]


def test_a_device_that_has_broken_down_is_no_reason_to_go_on_without_capturing():
    def breaks(run, generator, site):
        raise DeviceError(700)  # an illegal memory access

    engine = Engine(decoder_for(tiny_model("llama"), "fused", TokenLaw(True)), 1, captured=True, recorder=breaks)
    with pytest.raises(DeviceError, match="700"):
        run(engine, prompts(V, (5, 2)))


@pytest.mark.parametrize("failures", [1, 2])
def test_a_step_whose_capture_runs_out_of_memory_is_tried_again_once_there_is_room(failures, monkeypatch):
    monkeypatch.setattr(prompt_graphs, "MAX_TOKENS", 0)  # which are not worth the room
    room, tries = [], []

    def runs_out(run, generator, site):
        tries.append(len(room))
        if len(tries) <= failures:
            try:
                raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
            except torch.OutOfMemoryError as error:
                raise DeviceError(901) from error
        return run

    model = tiny_model("llama")
    decoder = decoder_for(model, "fused", TokenLaw(True))
    engine = Engine(decoder, 1, captured=True, recorder=runs_out, make_room=lambda: room.append(1))
    rows = prompts(V, (5, 2))
    if failures == 1:
        assert run(engine, rows) == [plain_generate(model, row, NEW) for row in rows]
    else:
        with pytest.raises(DeviceError, match="901"):
            run(engine, rows)
    assert tries[:2] == [0, 1]


@pytest.mark.parametrize("captured", [False, True])
def test_prefill_that_runs_out_of_memory_is_begun_anew_once_there_is_room(captured):
    model, room = tiny_model("llama"), []

    def runs_out(module, args, kwargs):
        if not room:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    rows = prompts(V, (5, 2))
    expected = [plain_generate(model, row, NEW) for row in rows]
    decoder = decoder_for(model, "fused", TokenLaw(True))
    engine = Engine(decoder, 1, captured=captured, recorder=rerun, make_room=lambda: room.append(1))
    model.register_forward_pre_hook(runs_out, with_kwargs=True)
    assert run(engine, rows) == expected
    assert room == [1]


@pytest.mark.parametrize("captured", [False, True])
def test_a_seed_brings_the_same_tokens_where_prefill_runs_out_of_memory_late(captured, monkeypatch):
    rows, found, fails = prompts(V, (5, 2)), [], []
    begin = DecodeState.emit

    def emit(*args):
        if fails:
            raise torch.OutOfMemoryError(fails.pop())
        return begin(*args)

    monkeypatch.setattr(DecodeState, "emit", emit)
    for failure in ([], ["Tried to allocate 2.00 GiB"]):
        engine = Engine(decoder_for(tiny_model("llama"), "fused", sampled(3)), 1, captured=captured, recorder=rerun)
        fails += failure
        found.append(run(engine, rows))
        assert not fails
    assert found[0] == found[1]


def test_an_engine_that_is_let_go_frees_its_cache_at_once():
    """On a GPU nothing calls Python's cycle collector when memory is short."""
    engine = Engine(decoder_for(tiny_model("llama"), "fused", TokenLaw(True)), 1, captured=True, recorder=tape)
    run(engine, prompts(V, (5, 2)))
    cache = weakref.ref(engine.state.cache.buffers[0])
    gc.disable()
    try:
        del engine
        assert cache() is None
    finally:
        gc.enable()
