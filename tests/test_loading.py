"""`pardec.load` by a name on the hub: with its revision, offline, tuned in the user's cache."""

import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import pardec
from pardec.adapters.adapter import AdapterError
from pardec.adapters.files import save_adapter
from pardec.adapters.tuned import TunedChoice, check_writable, weights_of, write_tuned
from pardec.draft_tree import DraftTree
from pardec.run import cache_folder, device_name

NAME = "some/adapter"


@pytest.fixture
def named(hub, packaged_adapter, tmp_path, monkeypatch):
    """The hub with two revisions of an adapter, K = 2 on main and K = 3 on `three`; we are in an empty folder."""
    for branch, K in (("main", 2), ("three", 3)):
        save_adapter(packaged_adapter(K), tmp_path / branch)
        hub.put(NAME, tmp_path / branch, branch)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return hub


@pytest.mark.parametrize(
    ("arguments", "K"),
    [((NAME,), 2), ((f"{NAME}@three",), 3), ((NAME, "three"), 3)],
    ids=["default branch", "in the name", "argument"],
)
def test_an_adapter_of_the_hub_decodes_as_one_from_a_folder(named, tiny_base, tmp_path, arguments, K):
    name, revision = (*arguments, None)[:2]
    model = pardec.load(name, base=tiny_base, revision=revision)
    assert model.adapter is not None
    assert model.adapter.metadata.num_speculative_tokens == K
    folder = tmp_path / ("main" if K == 2 else "three")
    expected = pardec.load(folder, base=tiny_base).generate([[5, 9, 2]], max_new_tokens=8)
    assert model.generate([[5, 9, 2]], max_new_tokens=8).token_ids == expected.token_ids


@pytest.mark.parametrize(
    ("directory", "revision", "words"),
    [
        ("runs", "v1", "revision: expected None unless the adapter is user/name on the hub and no folder here has"),
        (
            Path("runs/mine"),
            "v1",
            "revision: expected None unless the adapter is user/name on the hub and no folder here has",
        ),
        (f"{NAME}@three", "v1", f"found 'v1' for '{NAME}@three'"),
        ("my/folder", "v1", "found 'v1' for 'my/folder'"),
        (NAME, "", "revision: expected a branch, a tag or a commit, found ''"),
        (NAME, "v 1", "revision: expected a branch, a tag or a commit, found 'v 1'"),
        (NAME, 3, "revision: expected a branch, a tag or a commit, found 3"),
        (NAME, "v9", f"{NAME}@v9: expected an adapter directory or a hub name, found no folder of that name in "),
    ],
)
def test_a_revision_that_cannot_be_is_told(named, directory, revision, words):
    Path("my/folder").mkdir(parents=True)
    with pytest.raises(ValueError) as caught:
        pardec.load(directory, revision=revision)
    assert words in str(caught.value)


def test_what_it_was_tuned_to_is_used_and_asked_of_nobody(named, tiny_base):
    model = pardec.load(NAME, base=tiny_base)
    assert model.adapter is not None
    check_writable(NAME)
    named.requests.clear()
    device = device_name(torch.device("cpu"))
    weights = weights_of(NAME, model.adapter.metadata.files)
    choice = TunedChoice(device, "float32", False, (1, 1), weights, 1.0, 2.0, 2.0, 1.0, [0.5, 0.5])
    path = write_tuned(NAME, choice)
    assert path.parent == cache_folder() / "tuned/some--adapter"
    assert named.requests == []
    assert pardec.load(NAME, base=tiny_base).tuned == choice
    assert pardec.load(f"{NAME}@three", base=tiny_base).tuned is None


@pytest.fixture
def folder(packaged_adapter, tmp_path):
    save_adapter(packaged_adapter(2), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_choice_of_more_drafts_than_there_are_mask_tokens_is_told_with_its_file(folder, tiny_base):
    way = device_name(torch.device("cpu")), "float32", False, (3, 3, 3, 3), weights_of(folder)
    path = write_tuned(folder, TunedChoice(*way, 1.0, 2.0, 2.0, 1.0, [0.5] * 3))
    words = f"{path}: expected choices of at most 2 drafts, as the adapter has mask tokens, found 3; remove it"
    with pytest.raises(ValueError, match=re.escape(words)):
        pardec.load(folder, base=tiny_base)


@pytest.mark.parametrize("compiles", [False, True])
def test_where_nothing_was_tuned_compiled_what_was_tuned_without_serves_and_the_reverse(folder, tiny_base, compiles):
    way = device_name(torch.device("cpu")), "float32"
    other, own = (
        TunedChoice(*way, compile, (1, 1), weights_of(folder), 1.0, 2.0, 2.0, 1.0, [0.5, 0.5])
        for compile in (not compiles, compiles)
    )
    write_tuned(folder, other)
    assert pardec.load(folder, base=tiny_base, compile=compiles).tuned == other
    write_tuned(folder, own)
    assert pardec.load(folder, base=tiny_base, compile=compiles).tuned == own


# peft reads an attribute that newer versions of transformers rename
OF_PEFT = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@OF_PEFT
def test_a_wrapper_of_peft_is_told_where_its_base_is(folder, tiny_base):
    wrapped = get_peft_model(deepcopy(tiny_base), LoraConfig(r=2, target_modules=["q_proj"]))
    words = r"^base: expected .* a loaded model, found PeftModel, whose get_base_model\(\) is one, its adapters on it$"
    with pytest.raises(ValueError, match=words):
        pardec.load(folder, base=wrapped)
    inner = wrapped.get_base_model()
    assert pardec.load(folder, base=inner).base_model is inner


@OF_PEFT
def test_an_adapter_of_peft_alone_is_no_base(folder, tiny_base, tmp_path):
    wrapped = get_peft_model(deepcopy(tiny_base), LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path / "users")
    words = "expected a causal language model, found an adapter of PEFT alone; load what it was trained for, bring it"
    with pytest.raises(ValueError, match=words):
        pardec.load(folder, base=str(tmp_path / "users"))


def test_an_adapter_of_a_base_of_the_same_shape_can_be_moved(folder, tiny_base):
    tuned = deepcopy(tiny_base)
    tuned.get_input_embeddings().weight += 0.1
    words = r"belongs to another base .*: input embeddings: .*; adapter.transfer=true in a recipe that starts from it"
    with pytest.raises(AdapterError, match=words):
        pardec.load(folder, base=tuned)


@pytest.mark.parametrize(
    ("dtype", "has_instructions", "mode"),
    [
        ("float32", False, "fused"),
        ("bfloat16", True, "fused"),
        ("bfloat16", False, "plain"),
        ("float16", False, "plain"),
    ],
)
@pytest.mark.filterwarnings("ignore:dtype. expected a CPU with instructions")
def test_a_cpu_without_instructions_for_16_bits_starts_plain(adapters, monkeypatch, dtype, has_instructions, mode):
    """There a row costs nearly what a step does, whatever was fastest elsewhere; what was tuned here stays."""
    speeds = {"predicted_tokens_per_second": 20.0, "measured_tokens_per_second": 20.0, "plain_tokens_per_second": 10.0}
    of = {"weights": weights_of(adapters / "embeddings"), "ms_per_step": 1.0, "conditional_acceptance": [0.5], **speeds}
    tree = DraftTree(parents=(0, 0), ranks=(0, 1), runs=(1, 1, 1))
    elsewhere = TunedChoice("Another CPU", dtype, False, (1, 1, 1), copy_tokens=1, tree=tree, **of)
    monkeypatch.setattr("pardec.loading.has_bfloat16", lambda device: has_instructions)
    monkeypatch.setattr("pardec.loading.shipped_choice", lambda *arguments, **options: elsewhere)
    model = pardec.load(adapters / "embeddings", dtype=dtype)
    assert model.tuned is not None
    assert model.tuned.mode == mode
    assert (model.generate([5, 6], max_new_tokens=4).stats.num_draft_tokens > 0) == (mode == "fused")
    assert model.generate([5, 6], max_new_tokens=4, mode="fused").stats.num_draft_tokens > 0
    here = TunedChoice("This CPU", dtype, False, (1, 0), **of)
    monkeypatch.setattr("pardec.loading.read_tuned", lambda *arguments, **options: [here])
    assert pardec.load(adapters / "embeddings", dtype=dtype).tuned == here
