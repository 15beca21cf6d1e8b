"""Calls with arguments of every wrong kind: each is refused in one line, or decodes what the base alone does."""

import decimal
import inspect
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from greedy_oracle import plain_generate
from malformed import outcome_of
from tiny_models import make_adapter, tiny_model

import pardec
from pardec.adapters.files import save_adapter
from pardec.model import SelfSpeculativeModel

K = 3
PROMPT = [5, 9, 2, 7, 7, 1]


class Rude:
    def __repr__(self):
        raise RuntimeError("no words for it")


UNFIT = {
    "none": None,
    "false": False,
    "true": True,
    "negative": -1,
    "zero": 0,
    "one": 1,
    "two and a half": 2.5,
    "a whole float": 4.0,
    "huge": 10**400,
    "endless": 10**5000,
    "infinite": math.inf,
    "not a number": math.nan,
    "decimal": decimal.Decimal("0.5"),
    "complex": 1j,
    "no text": "",
    "text": "hot",
    "digits": "44",
    "lines": "a\nb\u2028c" * 50,
    "half a surrogate": "\ud800",
    "bytes": b"4",
    "list": [],
    "list of none": [None],
    "list of floats": [[0.5, 1.5]],
    "list of text and ids": ["a", [1]],
    "nested": [[[1]]],
    "object": {},
    "object of ids": {1: 2},
    "set": {"a"},
    "class": int,
    "function": len,
    "rude": Rude(),
    "numpy integer": np.int64(2),
    "numpy float": np.float32(0.5),
    "numpy array": np.zeros((2, 2)),
    "tensor": torch.zeros(2, 2),
    "tensor of a number": torch.tensor(3),
    "path": Path("x"),
    "dtype": torch.int8,
    "meta": torch.device("meta"),
}  # fmt: skip
INTEGERS = {"one", "numpy integer", "tensor of a number"}
# those of them that an argument takes
FIT = {
    "prompts": set(),
    "messages": {"none"},
    "template_options": {"none"},
    "max_new_tokens": INTEGERS,
    "temperature": {"zero", "one", "two and a half", "a whole float", "numpy integer", "numpy float"},
    "top_k": {"none", "huge", "endless", *INTEGERS},
    "top_p": {"none", "one", "numpy float"},
    "min_p": {"none", "zero", "one", "numpy float"},
    "seed": {"none", "zero", *INTEGERS},
    "num_speculative_tokens": {"none", "zero", *INTEGERS},
    "mode": {"none"},
    "num_return_sequences": INTEGERS,
    "block_lengths": {"none"},
    "use_head": {"none", "false"},
    "verification": set(),
    "copy_tokens": {"none", "zero", *INTEGERS},
    "tree": {"none"},
}
FIT_TO_STREAM = {name: fit for name, fit in FIT.items() if name not in ("prompts", "num_return_sequences")}
FIT_TO_STREAM["kept"] = {"none"}


@pytest.fixture(scope="module")
def base():
    return tiny_model("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def model(base):
    return SelfSpeculativeModel(base, None, make_adapter(base, K, lora_rank=2))


@pytest.fixture(scope="module")
def expected(base):
    return plain_generate(base, PROMPT, 6)


def refused(call, *begins: str) -> set[str]:
    """The kinds of values that `call` refuses, in one line that begins so; asserts that it fails in no other way."""
    found = {kind: outcome_of(partial(call, value), ValueError, *begins) for kind, value in UNFIT.items()}
    wrong = {kind: complaint for kind, (_, complaint) in found.items() if complaint}
    assert not wrong, wrong
    return {kind for kind, (is_refused, _) in found.items() if is_refused}


def test_every_argument_is_tried():
    assert FIT.keys() == inspect.signature(SelfSpeculativeModel.generate).parameters.keys() - {"self"}
    assert FIT_TO_STREAM.keys() == inspect.signature(SelfSpeculativeModel.stream).parameters.keys() - {"self", "prompt"}


@pytest.mark.parametrize("name", FIT)
def test_arguments_of_generate(model, expected, name):
    def call(value):
        drawn = {"temperature": 1.0} if name in ("top_k", "top_p", "min_p", "seed") else {}
        out = model.generate(**{"prompts": PROMPT, "max_new_tokens": 6, "seed": 0, **drawn, name: value})
        if name != "temperature" and not drawn:
            assert all(ids == expected[: len(ids)] for ids in out.token_ids)

    assert UNFIT.keys() - refused(call, "prompt" if name == "prompts" else name) == FIT[name]


@pytest.mark.parametrize("name", FIT_TO_STREAM)
def test_arguments_of_stream_are_refused_before_it_begins(model, name):
    def call(value):
        model.stream(PROMPT, **{"max_new_tokens": 6, name: value})

    assert UNFIT.keys() - refused(call, name) == FIT_TO_STREAM[name]


@pytest.mark.parametrize("name", ["mode", "num_speculative_tokens", "use_head", "verification", "copy_tokens"])
def test_arguments_of_the_door(base, model, name):
    def call(value):
        base.generate(torch.tensor([PROMPT]), max_new_tokens=6, custom_generate=model, **{name: value})

    assert UNFIT.keys() - refused(call, name) == FIT[name]


def test_what_no_streamer_is(model):
    assert refused(model.with_streamer, "streamer") == UNFIT.keys()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """An adapter whose own base is nowhere."""
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(model.adapter, folder)
    return folder


FIT_TO_LOAD = {
    "device": {"none"},
    "dtype": {"none"},
    "attn_implementation": {"none"},
    "compile": {"false", "true"},
    "trust_remote_code": {"false", "true"},
    "revision": {"none"},
}


@pytest.mark.parametrize("name", sorted(inspect.signature(pardec.load).parameters.keys() - {"directory", "base"}))
def test_arguments_of_load(folder, name):
    def call(value):
        try:
            pardec.load(folder, **{name: value})
        except ValueError as error:
            if not str(error).startswith("base 'tiny': expected a folder or hub name"):
                raise

    assert UNFIT.keys() - refused(call, name) == FIT_TO_LOAD[name]


def test_what_no_adapter_and_no_base_is(folder, base):
    assert refused(lambda value: pardec.load(value, base=base), "") == UNFIT.keys()
    assert refused(lambda value: pardec.load(folder, base=value), "base") == UNFIT.keys()


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps", "toaster", "meta", "cpu:x"])
def test_a_device_that_is_not_here(folder, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if device.startswith("cuda") and torch.cuda.device_count():
        pytest.skip("there is one")
    with pytest.raises(
        ValueError, match=f"device: expected a torch device of this machine, such as cpu, found '{device}'"
    ):
        pardec.load(folder, device=device)


@pytest.mark.parametrize(
    "dtype", ["bf16", "fp32", "torch.float32", "int8", torch.int8, torch.complex64, torch.float8_e5m2]
)
def test_a_dtype_that_models_are_not_run_in(folder, dtype):
    known = "float64, float32, float16, bfloat16"
    with pytest.raises(ValueError, match=f"dtype: expected a torch dtype, {known}, found '?{dtype}'?"):
        pardec.load(folder, dtype=dtype)
