"""Saves that are killed at every moment, and full disks: the old adapter or the new one is always there."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

import pytest
from adapter_samples import files_in, files_of_adapter, make_adapter, refusal, same
from safetensors import SafetensorError
from safetensors.torch import save_file

import pardec.run
from pardec.adapters.files import load_adapter, save_adapter

pytestmark = pytest.mark.usefixtures("synced")


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
        for owner, name in ((os, "replace"), (shutil, "copyfile"), (pardec.run, "save_file")):
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
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(pardec.run, "save_file", save_on_a_full_disk)
    with pytest.raises(OSError, match=r"expected room for [1-9]\d* bytes, found .*No space left on device") as error:
        save_adapter(new, tmp_path)
    assert "\n" not in str(error.value)
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
            raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(target))  # as copyfile does
        return copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", copy_on_a_full_disk)
    words = r"\.new: expected a file that can be written, found No space left on device$"
    with pytest.raises(OSError, match=words):
        save_adapter(new, tmp_path)
    found = load_adapter(tmp_path)
    assert same(found, old) or same(found, new)
    monkeypatch.undo()
    save_adapter(new, tmp_path)
    assert same(load_adapter(tmp_path), new)
    assert files_in(tmp_path) == files_of_adapter(lora=True)
