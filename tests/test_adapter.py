"""Adapters on disk: round trips bit for bit, refusals, and kills at every moment of a save."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pardec import adapter_files
from pardec.adapter import Adapter, AdapterError, AdapterMetadata, BaseReference, HeadShape
from pardec.adapter_files import load_adapter, save_adapter
from pardec.fingerprint import Fingerprint
from pardec.gated_lora import LoraWeights

K, D, H, W = 3, 8, 6, 5
LORA_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
LORA_FILES = {"lora/adapter_config.json", "lora/adapter_model.safetensors", "lora/README.md"}


@pytest.fixture(autouse=True)
def synced(monkeypatch):
    """Inodes that a save has asked to be on the disk for good; waiting for it would take most of the time."""
    inodes = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: inodes.add(os.fstat(descriptor).st_ino))
    return inodes


def make_adapter(seed=0, sharing="distinct", lora=False, head=False, noise=False):
    generator = torch.Generator().manual_seed(seed)
    metadata = AdapterMetadata(
        num_speculative_tokens=K,
        mask_sharing=sharing,
        draft_input="uniform_noise" if noise else "mask_embeddings",
        head=HeadShape(width=W, shortlist=7 + seed) if head else None,
        base=BaseReference(name="some/base", revision="abc"),
        fingerprint=Fingerprint(
            embedding_rows="0" * 64,
            embedding_sample=[0.1, -1e-30, 1 / 3],
            architecture={"hidden_size": D, "rope": {"all": {"rope_theta": 1e4}}},
            architecture_sha256="1" * 64,
            tokenizer=None,
        ),
        training={"objective": "kl", "seed": seed, "command": "train 'a b'"},
        measured={"mean_acceptance_length": 1.7 + seed},
    )
    weights = None
    if lora:
        shapes = {"lora_A": (2, D), "lora_B": (D, 2)}
        tensors = {
            f"base_model.model.layers.{n}.q_proj.{half}.weight": torch.randn(shape, generator=generator)
            for n in range(2)
            for half, shape in shapes.items()
        }
        weights = LoraWeights(LORA_CONFIG, tensors)
    rows = 1 if sharing == "shared" else K
    masks = None if noise else torch.randn(rows, D, generator=generator)
    return Adapter(masks, metadata, weights, head_tensors(generator) if head else None)


def head_tensors(generator=None) -> dict[str, torch.Tensor]:
    shapes = {"inner.weight": (W, H + D), "inner.bias": (W,), "outer.weight": (H, W)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def same(one: Adapter, other: Adapter) -> bool:
    """Bitwise equality of everything but the list of files."""
    if (one.lora is None) != (other.lora is None):
        return False
    if not same_tensors(one.head, other.head):
        return False
    if one.lora is not None and other.lora is not None:
        if one.lora.config != other.lora.config or one.lora.tensors.keys() != other.lora.tensors.keys():
            return False
        if not all(torch.equal(one.lora.tensors[key], other.lora.tensors[key]) for key in one.lora.tensors):
            return False
    described = [a.metadata.model_copy(update={"files": {}}) for a in (one, other)]
    masks = [None if a.mask_embeddings is None else {"masks": a.mask_embeddings} for a in (one, other)]
    return described[0] == described[1] and same_tensors(*masks)


def same_tensors(one: dict | None, other: dict | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------- round trips


@pytest.mark.parametrize("lora", [False, True], ids=["embeddings", "lora"])
@pytest.mark.parametrize("sharing", ["distinct", "shared"])
def test_what_was_saved_is_loaded_bit_for_bit(tmp_path, sharing, lora):
    adapter = make_adapter(sharing=sharing, lora=lora)
    save_adapter(adapter, tmp_path / "new" / "folder")
    loaded = load_adapter(tmp_path / "new" / "folder")
    assert same(loaded, adapter)
    assert loaded.mask_embeddings.dtype == torch.float32
    assert same(load_adapter(str(tmp_path / "new" / "folder")), adapter)


def test_embeddings_in_training_are_saved_as_plain_float32(tmp_path):
    adapter = make_adapter()
    trained = adapter.mask_embeddings.double().T.contiguous().T.requires_grad_()
    save_adapter(Adapter(trained, adapter.metadata), tmp_path)
    loaded = load_adapter(tmp_path).mask_embeddings
    assert torch.equal(loaded, adapter.mask_embeddings)
    assert loaded.dtype == torch.float32
    assert not loaded.requires_grad


@pytest.mark.parametrize(
    "parts", [("head",), ("head", "lora"), ("noise", "lora"), ("noise", "lora", "head")], ids="-".join
)
def test_heads_and_noise_are_saved_and_loaded_bit_for_bit(tmp_path, parts):
    adapter = make_adapter(**dict.fromkeys(parts, True))
    save_adapter(adapter, tmp_path)
    assert same(load_adapter(tmp_path), adapter)
    expected = {"pardec.json"} | (LORA_FILES if "lora" in parts else set())
    expected |= {"head.safetensors"} if "head" in parts else set()
    expected |= set() if "noise" in parts else {"mask_embeddings.safetensors"}
    assert files_in(tmp_path) == expected
    files = json.loads((tmp_path / "pardec.json").read_text())["files"]
    assert files == {n: hashlib.sha256((tmp_path / n).read_bytes()).hexdigest() for n in expected - {"pardec.json"}}


def test_a_head_in_training_is_saved_as_plain_float32(tmp_path):
    head = {name: tensor.double().requires_grad_() for name, tensor in head_tensors().items()}
    adapter = make_adapter(head=True)
    save_adapter(Adapter(adapter.mask_embeddings, adapter.metadata, head=head), tmp_path)
    loaded = load_adapter(tmp_path).head
    assert same_tensors(loaded, {name: tensor.detach().float() for name, tensor in head.items()})
    assert {(tensor.dtype, tensor.requires_grad) for tensor in loaded.values()} == {(torch.float32, False)}


def test_an_adapter_without_a_head_is_written_as_versions_before_heads_wrote_it(tmp_path):
    """They refuse keys that they do not know."""
    save_adapter(make_adapter(lora=True), tmp_path)
    known = {"format_version", "num_speculative_tokens", "mask_sharing", "draft_input", "base", "fingerprint"}
    written = json.loads((tmp_path / "pardec.json").read_text())
    assert written.keys() == known | {"training", "measured", "files"}
    assert (written["format_version"], written["draft_input"]) == (1, "mask_embeddings")


@pytest.mark.parametrize("old", [("head",), ("noise", "lora", "head"), ()], ids=lambda parts: "old-" + "-".join(parts))
@pytest.mark.parametrize("new", [("head",), ("noise", "lora"), ()], ids=lambda parts: "new-" + "-".join(parts))
def test_nothing_of_an_older_adapter_is_left_behind(tmp_path, old, new):
    save_adapter(make_adapter(1, **dict.fromkeys(old, True)), tmp_path / "adapter")
    adapter = make_adapter(2, **dict.fromkeys(new, True))
    save_adapter(adapter, tmp_path / "adapter")
    save_adapter(adapter, tmp_path / "fresh")
    assert same(load_adapter(tmp_path / "adapter"), adapter)
    assert files_in(tmp_path / "adapter") == files_in(tmp_path / "fresh")


@pytest.mark.parametrize("lora", [False, True], ids=["embeddings", "lora"])
def test_a_folder_holds_the_adapters_files_and_nothing_pickled(tmp_path, lora):
    save_adapter(make_adapter(lora=lora), tmp_path)
    expected = {"pardec.json", "mask_embeddings.safetensors"} | (LORA_FILES if lora else set())
    assert files_in(tmp_path) == expected
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == ({"lora"} if lora else set())
    for name in expected:
        content = (tmp_path / name).read_bytes()
        if name.endswith(".json"):
            json.loads(content)
        elif name.endswith(".safetensors"):
            with safe_open(tmp_path / name, framework="pt") as tensors:
                assert tensors.keys()
        else:
            assert "only valid at the rows of pardec's mask tokens" in content.decode()
    # a plain PEFT load of the folder itself must find nothing
    assert not (tmp_path / "adapter_config.json").exists()


def test_the_metadata_lists_every_other_file_with_its_sha256(tmp_path):
    save_adapter(make_adapter(lora=True), tmp_path)
    metadata = json.loads((tmp_path / "pardec.json").read_text())
    assert metadata["files"] == {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        for name in files_in(tmp_path) - {"pardec.json"}
    }
    assert metadata["format_version"] == 1
    assert metadata["base"] == {"name": "some/base", "revision": "abc"}


@pytest.mark.parametrize("old_lora", [False, True], ids=["old-embeddings", "old-lora"])
@pytest.mark.parametrize("new_lora", [False, True], ids=["new-embeddings", "new-lora"])
def test_saving_replaces_an_older_adapter_and_leaves_other_files(tmp_path, old_lora, new_lora):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "state.json").write_text("1")
    save_adapter(make_adapter(1, lora=old_lora), tmp_path)
    new = make_adapter(2, sharing="shared", lora=new_lora)
    save_adapter(new, tmp_path)
    assert same(load_adapter(tmp_path), new)
    assert files_in(tmp_path) == {
        "metrics.jsonl", "checkpoints/state.json", "pardec.json", "mask_embeddings.safetensors",
    } | (LORA_FILES if new_lora else set())  # fmt: skip


def test_a_new_adapter_is_on_the_disk_before_it_takes_the_place_of_the_old(tmp_path, synced, monkeypatch):
    replace, complete = os.replace, []

    def checking(source, target):
        if Path(target).name == ".incoming":
            assert files_in(Path(source)) == files_of_adapter(lora=True)
            assert {path.stat().st_ino for path in Path(source).rglob("*") if path.is_file()} <= synced
            complete.append(source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", checking)
    save_adapter(make_adapter(lora=True), tmp_path)
    assert len(complete) == 1


# ---------------------------------------------------------------------- embeddings


def test_fewer_mask_tokens_than_trained_are_the_first_ones():
    adapter = make_adapter()
    for n in range(K + 1):
        assert torch.equal(adapter.embeddings_for(n), adapter.mask_embeddings[:n])
    with pytest.raises(ValueError, match=r"num_speculative_tokens: expected at most 3, .*, found 4"):
        adapter.embeddings_for(4)


def test_one_shared_mask_token_serves_any_number():
    adapter = make_adapter(sharing="shared")
    for n in (0, 1, K, K + 5):
        assert adapter.embeddings_for(n).shape == (n, D)
        assert all(torch.equal(row, adapter.mask_embeddings[0]) for row in adapter.embeddings_for(n))


@pytest.mark.parametrize(
    ("sharing", "shape"),
    [
        ("distinct", (K - 1, D)),
        ("distinct", (1, D)),
        ("shared", (K, D)),
        ("distinct", (D,)),
        ("distinct", (K, 1, D)),
    ],
)
def test_embeddings_of_another_shape_are_refused(sharing, shape):
    rows = 1 if sharing == "shared" else K
    found = ", ".join(map(str, shape))
    with pytest.raises(AdapterError, match=rf"expected shape \[{rows}, D\] .*{K}, found \[{found}\]"):
        Adapter(torch.zeros(shape), make_adapter(sharing=sharing).metadata)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_refused(bad):
    adapter = make_adapter()
    adapter.mask_embeddings[1, 2] = bad
    with pytest.raises(AdapterError, match="mask embeddings: expected finite numbers, found NaN or infinity"):
        Adapter(adapter.mask_embeddings, adapter.metadata)


def test_an_adapter_of_noise_has_no_embeddings_to_ask_for():
    with pytest.raises(ValueError, match="mask embeddings: expected some, found draft_input uniform_noise"):
        make_adapter(noise=True, lora=True).embeddings_for(1)


# ---------------------------------------------------------------------- parts that do not fit


def test_noise_needs_a_lora_and_no_embeddings():
    noise = make_adapter(noise=True, lora=True)
    with pytest.raises(AdapterError, match=r"lora: expected one with draft_input uniform_noise, .*, found none"):
        Adapter(None, noise.metadata)
    with pytest.raises(AdapterError, match=rf"expected none with draft_input uniform_noise, found \[{K}, {D}\]"):
        Adapter(torch.zeros(K, D), noise.metadata, noise.lora)


def test_mask_embeddings_must_be_there_unless_noise_stands_for_them():
    with pytest.raises(AdapterError, match=rf"mask embeddings: expected shape \[{K}, D\] .*, found none"):
        Adapter(None, make_adapter().metadata)


def with_head(**changes) -> Adapter:
    """An adapter whose head has other tensors; None leaves one out."""
    adapter, tensors = make_adapter(head=True), head_tensors() | changes
    head = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return Adapter(adapter.mask_embeddings, adapter.metadata, head=head)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"outer.weight": None}, "expected inner.bias, inner.weight, outer.weight, found inner.bias, inner.weight"),
        ({"outer.bias": torch.zeros(H)}, "found inner.bias, inner.weight, outer.bias, outer.weight"),
        (dict.fromkeys(head_tensors(), None), "expected inner.bias, inner.weight, outer.weight, found nothing"),
        ({"inner.bias": torch.zeros(W + 1)}, rf"expected inner.bias \[{W}\], .*'inner.bias': \[{W + 1}\]"),
        ({"inner.weight": torch.zeros(W + 1, H + D)}, rf"'inner.weight': \[{W + 1}, {H + D}\]"),
        ({"inner.weight": torch.zeros(W, H)}, rf"'inner.weight': \[{W}, {H}\]"),  # no room for an embedding
        ({"inner.weight": torch.zeros(W)}, rf"'inner.weight': \[{W}\]"),
        ({"outer.weight": torch.zeros(H, W + 1)}, rf"'outer.weight': \[{H}, {W + 1}\]"),
        ({"outer.weight": torch.zeros(0, W)}, rf"'outer.weight': \[0, {W}\]"),
        ({"outer.weight": torch.tensor(1.0)}, r"'outer.weight': \[\]"),
        ({"inner.bias": torch.full((W,), torch.nan)}, "expected finite numbers, found NaN or infinity"),
        ({"outer.weight": torch.full((H, W), torch.inf)}, "expected finite numbers, found NaN or infinity"),
    ],
)
def test_heads_that_cannot_be_are_refused(changes, words):
    with pytest.raises(AdapterError, match=f"^head: .*{words}"):
        with_head(**changes)


def test_a_head_without_its_shape_and_a_shape_without_a_head_are_refused():
    bare, full = make_adapter(), make_adapter(head=True)
    with pytest.raises(AdapterError, match=r"head: expected .*, or neither, found weights without the key head"):
        Adapter(bare.mask_embeddings, bare.metadata, head=full.head)
    with pytest.raises(AdapterError, match=r"head: expected .*, or neither, found that key without weights"):
        Adapter(full.mask_embeddings, full.metadata)


# ---------------------------------------------------------------------- refusals


@pytest.fixture
def saved(tmp_path):
    """A saved adapter with a LoRA."""
    save_adapter(make_adapter(lora=True), tmp_path / "adapter")
    return tmp_path / "adapter"


def refusal(folder) -> str:
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_metadata(folder, **changes):
    metadata = json.loads((folder / "pardec.json").read_text())
    (folder / "pardec.json").write_text(json.dumps(metadata | changes))


def replace_file(folder, name, content: bytes):
    """Changes a file together with its sha256, as a hand that means it would."""
    (folder / name).write_bytes(content)
    files = json.loads((folder / "pardec.json").read_text())["files"]
    edit_metadata(folder, files=files | {name: hashlib.sha256(content).hexdigest()})


def test_a_missing_folder_is_refused(tmp_path):
    assert refusal(tmp_path / "no") == f"{tmp_path / 'no'}: expected an adapter directory, found nothing"


def test_a_file_is_refused(saved):
    path = saved / "pardec.json"
    assert refusal(path) == f"{path}: expected an adapter directory, found a file"


def test_a_foreign_folder_is_refused_with_what_is_in_it(tmp_path):
    assert refusal(tmp_path).endswith("expected an adapter directory with pardec.json, found an empty directory")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    assert refusal(tmp_path).endswith(
        "expected an adapter directory with pardec.json, found config.json, model.safetensors"
    )


@pytest.mark.parametrize("name", ["mask_embeddings.safetensors", *sorted(LORA_FILES)])
def test_a_missing_truncated_or_changed_file_is_named(saved, name):
    content = (saved / name).read_bytes()
    for damaged in (content[:-1], content[: len(content) // 2], b"", content[:-1] + bytes([content[-1] ^ 1])):
        (saved / name).write_bytes(damaged)
        message = refusal(saved)
        assert message.startswith(f"{saved / name}: expected sha256 ")
        assert message.endswith("the file is truncated or was changed")
    (saved / name).unlink()
    assert refusal(saved) == f"{saved / name}: expected a file of the adapter, found nothing"
    (saved / name).mkdir()
    assert refusal(saved) == f"{saved / name}: expected a file of the adapter, found a directory"


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_is_refused(saved, version):
    edit_metadata(saved, format_version=version)
    assert refusal(saved) == f"{saved / 'pardec.json'}: expected format_version 1, found {version}"


def test_a_later_format_is_told_before_its_unknown_keys(saved):
    edit_metadata(saved, format_version=2, tree="deep")
    assert "expected format_version 1, found 2" in refusal(saved)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"{'a': 1}"], ids=["cut", "empty", "not-utf8", "python"])
def test_metadata_that_is_not_json_is_refused(saved, content):
    (saved / "pardec.json").write_bytes(content)
    assert refusal(saved).startswith(f"{saved / 'pardec.json'}: expected JSON, found ")


@pytest.mark.parametrize("content", [b"[]", b"1", b"null", b"{}"])
def test_metadata_without_a_version_is_refused(saved, content):
    (saved / "pardec.json").write_bytes(content)
    assert refusal(saved) == f"{saved / 'pardec.json'}: expected format_version 1, found None"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"extra": 1}, "extra"),
        ({"base": {"name": "a", "colour": "red"}}, "base.colour"),
        ({"base": {}}, "base.name"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens"),
        ({"num_speculative_tokens": "many"}, "num_speculative_tokens"),
        ({"mask_sharing": "both"}, "mask_sharing"),
        ({"draft_input": "hidden_state"}, "draft_input"),
        ({"files": ["mask_embeddings.safetensors"]}, "files"),
    ],
)
def test_metadata_with_an_unknown_key_or_value_names_it(saved, changes, key):
    edit_metadata(saved, **changes)
    assert refusal(saved).startswith(f"{saved / 'pardec.json'}: {key}: ")


def test_metadata_that_lists_no_embeddings_is_refused(saved):
    edit_metadata(saved, files={})
    assert "expected mask_embeddings.safetensors among its files, found []" in refusal(saved)


def test_a_head_without_its_file_and_a_file_without_its_head_are_refused(tmp_path):
    save_adapter(make_adapter(head=True), tmp_path)
    metadata = json.loads((tmp_path / "pardec.json").read_text())
    edit_metadata(tmp_path, head=None)
    assert "found weights without the key head in pardec.json" in refusal(tmp_path)
    del metadata["files"]["head.safetensors"]
    edit_metadata(tmp_path, head=metadata["head"], files=metadata["files"])
    assert "expected head.safetensors among its files, found ['mask_embeddings.safetensors']" in refusal(tmp_path)


def test_noise_on_disk_needs_its_lora_and_no_embeddings(tmp_path):
    save_adapter(make_adapter(), tmp_path)
    edit_metadata(tmp_path, draft_input="uniform_noise")
    assert "mask embeddings: expected none with draft_input uniform_noise" in refusal(tmp_path)
    edit_metadata(tmp_path, files={})
    assert "lora: expected one with draft_input uniform_noise" in refusal(tmp_path)


@pytest.mark.parametrize("changes", [{"width": 0}, {"shortlist": 0}, {"width": None}, {"depth": 2}], ids=str)
def test_a_head_of_impossible_shape_is_refused(tmp_path, changes):
    save_adapter(make_adapter(head=True), tmp_path)
    edit_metadata(tmp_path, head={"width": W, "shortlist": 7} | changes)
    assert refusal(tmp_path).startswith(f"{tmp_path / 'pardec.json'}: head.{next(iter(changes))}: ")


@pytest.mark.parametrize("name", ["../secret", "lora/../../secret", "{absolute}"])
def test_files_outside_the_folder_are_refused_without_being_read(saved, monkeypatch, name):
    secret = saved.parent / "secret"
    secret.write_text("secret")
    name = name.format(absolute=secret)
    files = json.loads((saved / "pardec.json").read_text())["files"]
    edit_metadata(saved, files={name: hashlib.sha256(b"secret").hexdigest()} | files)
    read = []
    monkeypatch.setattr(adapter_files, "_sha256", lambda path: read.append(path))
    assert refusal(saved).endswith(f"expected files inside the adapter directory, found {name!r}")
    assert read == []


def test_embeddings_files_that_hold_something_else_are_refused(saved, tmp_path):
    def replace_with(tensors):
        save_file(tensors, tmp_path / "other.safetensors")
        replace_file(saved, "mask_embeddings.safetensors", (tmp_path / "other.safetensors").read_bytes())

    good = make_adapter(lora=True).mask_embeddings
    replace_with({"weights": good})
    assert "expected mask_embeddings, found ['weights']" in refusal(saved)
    replace_with({"mask_embeddings": good, "more": good.clone()})
    assert "expected mask_embeddings, found ['mask_embeddings', 'more']" in refusal(saved)
    replace_with({"mask_embeddings": good[:2].clone()})
    assert f"expected shape [{K}, D]" in refusal(saved)
    good[0, 0] = torch.nan
    replace_with({"mask_embeddings": good})
    assert "expected finite numbers, found NaN or infinity" in refusal(saved)


@pytest.mark.parametrize("name", ["mask_embeddings.safetensors", "lora/adapter_model.safetensors"])
def test_files_that_are_not_safetensors_are_refused(saved, name):
    for content in (b"", b"\x80\x04pickle", b"\xff" * 100):
        replace_file(saved, name, content)
        assert refusal(saved).startswith(f"{saved / name}: expected a safetensors file, found ")


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"{}", json.dumps(LORA_CONFIG | {"use_dora": True}).encode(), b'{"peft_type": "LORA"}'],
    ids=["cut", "list", "empty", "dora", "no-rank"],
)
def test_a_lora_configuration_that_cannot_be_used_is_an_adapter_error(saved, content):
    replace_file(saved, "lora/adapter_config.json", content)
    refusal(saved)


def test_a_lora_without_its_configuration_is_an_adapter_error(saved):
    files = json.loads((saved / "pardec.json").read_text())["files"]
    del files["lora/adapter_config.json"]
    edit_metadata(saved, files=files)
    (saved / "lora" / "adapter_config.json").unlink()
    assert "adapter_config.json" in refusal(saved)


# ---------------------------------------------------------------------- kills and full disks


class Killed(BaseException):
    """The process ends here."""


class KillSwitch:
    """Ends the process at its n-th operation on files: before it, or when it is half done.

    With `clean_up` the interpreter still runs `finally` blocks, as on SIGINT; without it nothing
    runs any more, as on SIGKILL: every later operation is dead too.
    """

    def __init__(self, monkeypatch, at: int, *, half_done: bool, clean_up: bool):
        self.at, self.half_done, self.clean_up = at, half_done, clean_up
        self.calls, self.dead = 0, False
        for owner, name in ((os, "replace"), (shutil, "copyfile"), (adapter_files, "save_file")):
            monkeypatch.setattr(owner, name, self.guard(getattr(owner, name)))
        if not clean_up:
            monkeypatch.setattr(shutil, "rmtree", self.guard(shutil.rmtree))

    def guard(self, function):
        def guarded(*args, **kwargs):
            if self.dead and not self.clean_up:
                raise Killed
            self.calls += 1
            if self.calls - 1 == self.at:
                self.dead = True
                if self.half_done:
                    self.half(function, args, kwargs)
                raise Killed
            return function(*args, **kwargs)

        return guarded

    def half(self, function, args, kwargs):
        if function.__name__ == "rmtree":
            names = sorted(path for path in Path(args[0]).rglob("*") if path.is_file())
            for path in names[: len(names) // 2]:
                path.unlink()
            return
        function(*args, **kwargs)
        if function.__name__ in ("copyfile", "save_file"):
            written = Path(args[1])
            os.truncate(written, written.stat().st_size // 2)


def kill_at_every_operation(monkeypatch, folder_of, prepare, adapter, **how):
    """Yields a folder for every operation of a save, killed there, until a save is not killed any more."""
    for at in range(100):
        folder = folder_of(at)
        prepare(folder)
        with monkeypatch.context() as patched:
            switch = KillSwitch(patched, at, **how)
            with contextlib.suppress(Killed):
                save_adapter(adapter, folder)
            assert switch.dead == (switch.calls > at)
        if not switch.dead:
            assert same(load_adapter(folder), adapter)
            assert at >= 6  # a save writes, renames and copies: the loop has seen something
            return
        yield folder
    raise AssertionError("a save of more than 100 operations")


def files_of_adapter(lora):
    return {"pardec.json", "mask_embeddings.safetensors"} | (LORA_FILES if lora else set())


@pytest.mark.parametrize("same_id", [False, True], ids=["other-process-id", "same-process-id"])
@pytest.mark.parametrize("clean_up", [True, False], ids=["interrupt", "kill"])
@pytest.mark.parametrize("half_done", [False, True], ids=["before", "half-done"])
@pytest.mark.parametrize(("old_lora", "new_lora"), [(False, True), (True, False), (True, True)])
def test_a_kill_at_any_moment_leaves_the_old_adapter_or_the_new(
    tmp_path, monkeypatch, old_lora, new_lora, half_done, clean_up, same_id
):
    """And a later save works, also from a process with the same id, as in containers and notebooks."""
    old, new, later = (
        make_adapter(1, lora=old_lora),
        make_adapter(2, lora=new_lora),
        make_adapter(3, lora=old_lora),
    )
    seen = set()
    killed = kill_at_every_operation(
        monkeypatch,
        lambda at: tmp_path / str(at),
        lambda folder: save_adapter(old, folder),
        new,
        half_done=half_done,
        clean_up=clean_up,
    )
    for folder in killed:
        found = load_adapter(folder)
        assert same(found, old) or same(found, new), folder.name
        seen.add("old" if same(found, old) else "new")
        with monkeypatch.context() as patched:
            if not same_id:
                patched.setattr(os, "getpid", lambda: 1)
            save_adapter(later, folder)
        assert same(load_adapter(folder), later)
        of_the_dead = {name for name in files_in(folder) if name.startswith((".writing-", ".removed-"))}
        assert not (of_the_dead and same_id)
        assert files_in(folder) - of_the_dead == files_of_adapter(old_lora)
    assert seen == {"old", "new"}


@pytest.mark.parametrize("half_done", [False, True], ids=["before", "half-done"])
def test_a_kill_during_the_first_save_leaves_no_adapter_or_the_new(tmp_path, monkeypatch, half_done):
    new, seen = make_adapter(2, lora=True), set()
    killed = kill_at_every_operation(
        monkeypatch,
        lambda at: tmp_path / str(at),
        lambda folder: None,
        new,
        half_done=half_done,
        clean_up=True,
    )
    for folder in killed:
        if any((folder / whole / "pardec.json").exists() for whole in (".", ".incoming")):
            assert same(load_adapter(folder), new)
            seen.add("new")
        else:
            assert "expected an adapter directory with pardec.json" in refusal(folder)
            seen.add("none")
        save_adapter(new, folder)
        assert same(load_adapter(folder), new)
        assert files_in(folder) == files_of_adapter(lora=True)
    assert seen == {"none", "new"}


def test_saves_killed_one_after_another_never_lose_the_adapter(tmp_path, monkeypatch):
    """Each save is killed at some operation, on top of what those before it left behind."""
    candidates = [make_adapter(0, lora=True)]
    save_adapter(candidates[0], tmp_path)
    for round_, at in enumerate([4, 2, 9, 5, 12, 3, 7, 1, 10, 6, 8, 11, 2, 13]):
        new = make_adapter(round_ + 1, lora=round_ % 3 != 0)
        with monkeypatch.context() as patched:
            patched.setattr(os, "getpid", lambda round_=round_: 1000 + round_)
            KillSwitch(patched, at, half_done=round_ % 2 == 0, clean_up=False)
            with contextlib.suppress(Killed):
                save_adapter(new, tmp_path)
        candidates.append(new)
        found = load_adapter(tmp_path)
        matching = [index for index, candidate in enumerate(candidates) if same(candidate, found)]
        assert len(matching) == 1
        candidates = candidates[matching[0] :]  # an adapter once replaced does not come back
    last = make_adapter(99)
    save_adapter(last, tmp_path)
    assert same(load_adapter(tmp_path), last)


@pytest.mark.parametrize("leftover", [".writing-{pid}", ".removed-{pid}"])
def test_leftovers_of_a_killed_process_with_the_same_id_do_not_stand_in_the_way(tmp_path, leftover):
    folder = tmp_path / leftover.format(pid=os.getpid())
    (folder / "lora").mkdir(parents=True)
    (folder / "mask_embeddings.safetensors").write_bytes(b"half")
    new = make_adapter(lora=True)
    save_adapter(new, tmp_path)
    assert same(load_adapter(tmp_path), new)
    assert files_in(tmp_path) == files_of_adapter(lora=True)


@pytest.mark.parametrize("full_at", [0, 1])
@pytest.mark.parametrize("has_old", [True, False], ids=["over-old", "first"])
def test_a_full_disk_while_writing_leaves_what_was_there(tmp_path, monkeypatch, has_old, full_at):
    old, new = make_adapter(1, lora=True), make_adapter(2, lora=True)
    if has_old:
        save_adapter(old, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)}
    written = []

    def save_on_a_full_disk(tensors, path, metadata=None):
        written.append(path)
        if len(written) > full_at:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(adapter_files, "save_file", save_on_a_full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        save_adapter(new, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == (
        ["lora", "mask_embeddings.safetensors", "pardec.json"] if has_old else []
    )
    monkeypatch.undo()
    save_adapter(new, tmp_path)
    assert same(load_adapter(tmp_path), new)


@pytest.mark.parametrize("full_at", range(5))
def test_a_full_disk_while_publishing_leaves_a_whole_adapter(tmp_path, monkeypatch, full_at):
    old, new = make_adapter(1, lora=True), make_adapter(2, lora=True)
    save_adapter(old, tmp_path)
    copied, copyfile = [], shutil.copyfile

    def copy_on_a_full_disk(source, target):
        copied.append(target)
        if len(copied) > full_at:
            Path(target).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", copy_on_a_full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        save_adapter(new, tmp_path)
    found = load_adapter(tmp_path)
    assert same(found, old) or same(found, new)
    monkeypatch.undo()
    save_adapter(new, tmp_path)
    assert same(load_adapter(tmp_path), new)
    assert files_in(tmp_path) == files_of_adapter(lora=True)
