"""Adapters that are changed by rule: each is refused in one line, or decodes what the base alone does."""

import hashlib
import json
import math
import shutil

import pytest
import torch
from greedy_oracle import plain_generate
from malformed import UNFIT, damaged_files, is_one_line, keys_of, with_text, without
from safetensors.torch import load_file, save_file
from tiny_models import make_adapter, tiny_model

import pardec.loading
from pardec.adapters.files import save_adapter
from pardec.adapters.tuned import TUNED_FILE, TunedChoice, weights_of, write_tuned
from pardec.decoding.probing.probe import probe
from pardec.run import device_name
from pardec.target.forward import TargetModel

K = 3
PROMPT = [5, 9, 2, 7, 7, 1]
METADATA, LORA_CONFIG = "pardec.json", "lora/adapter_config.json"
MASKS, LORA, HEAD = "mask_embeddings.safetensors", "lora/adapter_model.safetensors", "head.safetensors"
FILES = (METADATA, LORA_CONFIG, MASKS, LORA, HEAD, TUNED_FILE)


@pytest.fixture(scope="module")
def base():
    return tiny_model("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def expected(base):
    return plain_generate(base, PROMPT, 6)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A whole adapter with a LoRA, a head and a tuned choice."""
    folder = tmp_path_factory.mktemp("whole")
    save_adapter(make_adapter(base, K, lora_rank=2, head_width=4), folder)
    speeds = dict.fromkeys(("ms_per_step", "predicted_tokens_per_second", "measured_tokens_per_second"), 1.0)
    choice = TunedChoice(
        device=device_name(torch.device("cpu")),
        dtype="float32",
        compile=False,
        block_lengths=(2, 1, 0),
        weights=weights_of(folder),
        plain_tokens_per_second=1.0,
        conditional_acceptance=[0.5, 0.5],
        **speeds,
    )
    write_tuned(folder, choice)
    return folder


@pytest.fixture
def probed_once(base, monkeypatch):
    """The base is probed for the first adapter only, as it stays the same."""
    found = probe(TargetModel.wrap(base))
    monkeypatch.setattr(pardec.loading, "probe", lambda target: found)
    monkeypatch.setattr(pardec.loading, "probe_head", lambda target, tap: None)


@pytest.fixture
def folder(whole, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(whole, tmp_path / "adapter")


def sign(folder, *names):
    """Lists files with the sha256 that they have now, as a hand that means it would."""
    metadata = json.loads((folder / METADATA).read_text())
    files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / METADATA).write_text(json.dumps(metadata | {"files": metadata["files"] | files}))


def refused_or_right(folder, base, expected):
    """Loads and decodes: asserts an error of one line, or the base's own tokens; says which."""
    try:
        model = pardec.load(folder, base=base)
        found = model.generate(PROMPT, max_new_tokens=6).token_ids
    except ValueError as error:
        found = error
    if isinstance(found, ValueError):
        assert is_one_line(found), str(found)[:1000]
        return "refused"
    assert found == [expected]
    return "right"


def test_the_whole_adapter_is_right(folder, base, expected):
    assert refused_or_right(folder, base, expected) == "right"
    assert pardec.load(folder, base=base).tuned is not None


def changed_keys(folder, name):
    """Texts of a JSON file with each of its keys left out or given each unfit value, by what was done."""
    content = json.loads((folder / name).read_text())
    value = content["choices"][0] if name == TUNED_FILE else content
    for path in keys_of(value):
        yield (*path, "missing"), without(value, path)
        for kind, text in UNFIT.items():
            yield (*path, kind), with_text(value, path, text)


@pytest.mark.parametrize("name", [METADATA, LORA_CONFIG, TUNED_FILE])
def test_keys_that_are_missing_or_have_unfit_values(folder, base, expected, name, probed_once):
    outcomes, wrong = [], {}
    for done, text in list(changed_keys(folder, name)):
        (folder / name).write_text(text if name != TUNED_FILE else '{"format_version": 1, "choices": [' + text + "]}")
        if name == LORA_CONFIG:
            sign(folder, name)
        try:
            outcomes.append(refused_or_right(folder, base, expected))
        except Exception as error:  # all of them are to be seen
            wrong[" ".join(done)] = f"{type(error).__name__}: {str(error)[:200]}"
    assert not wrong, wrong
    assert outcomes.count("refused") >= 50
    assert "right" in outcomes


@pytest.mark.parametrize("is_signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("name", FILES)
def test_damaged_files(folder, base, expected, name, is_signed):
    content = (folder / name).read_bytes()
    for done, damage in damaged_files(content).items():
        path = shutil.copytree(folder, folder.parent / done)
        damage(path / name)
        if is_signed and (path / name).is_file() and name not in (METADATA, TUNED_FILE):
            sign(path, name)
        outcome = refused_or_right(path, base, expected)
        assert outcome == "refused" or (name, done) == (TUNED_FILE, "absent") or done == f"cut after {len(content) - 1}"


def changed_tensors(tensors):
    """Copies of a file's tensors with one of them changed, by what was done."""
    name = min(name for name, tensor in tensors.items() if tensor.dim() == 2)
    good = tensors[name]
    changed = {str(dtype): good.to(dtype) for dtype in DTYPES}
    changed |= {"a number": good.flatten()[0], "a part": good[0], "deeper": good[None], "none": good[:0]}
    changed |= {"one more": torch.cat([good, good[:1]]), "transposed": good.T}
    changed |= {str(value): good.clone().index_put_([torch.tensor(0)], torch.tensor(value)) for value in NUMBERS}
    rest = {other: tensor for other, tensor in tensors.items() if other != name}
    yield from ((done, rest | {name: tensor.contiguous()}) for done, tensor in changed.items())
    yield "missing", rest
    yield "nothing", {}
    yield "other name", rest | {"x\ny" * 100: good}
    yield "more", tensors | {"more": good.clone()}
    for place in ("model.norm", "model.embed_tokens", "model.layers.0", "model.layers.9", "x\n" * 300):
        halves = {"lora_A": torch.ones(2, 32), "lora_B": torch.ones(32, 2)}
        yield place, tensors | {f"base_model.model.{place}.{half}.weight": halves[half] for half in halves}


DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.uint8, torch.bool, torch.float16, torch.bfloat16,
          torch.float64, torch.complex64)  # fmt: skip
NUMBERS = (math.nan, math.inf, -math.inf, 3e38, -3e38)


@pytest.mark.parametrize("name", [MASKS, LORA, HEAD])
def test_tensors_that_are_missing_or_changed(folder, base, expected, name, probed_once):
    outcomes, wrong = {}, {}
    for done, tensors in changed_tensors(load_file(folder / name)):
        save_file(tensors, folder / name)
        sign(folder, name)
        try:
            outcomes[done] = refused_or_right(folder, base, expected)
        except Exception as error:
            wrong[done] = f"{type(error).__name__}: {str(error)[:200]}"
    assert not wrong, wrong
    right = {done for done, outcome in outcomes.items() if outcome == "right"}
    assert right <= {"torch.float16", "torch.bfloat16", "torch.float64", "3e+38", "-3e+38", "missing", "nothing"}, right
