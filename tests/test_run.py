"""What stands around every program: one line for what cannot be used, and none where nobody listens."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from programs import ROOT
from safetensors import SafetensorError

import pardec.run
from pardec.run import exit_on_unusable_input, has_bfloat16, library_versions, save_tensors, writing_to

WRITES = "from pardec.run import exit_on_unusable_input\nwith exit_on_unusable_input():\n    {}\n"


def start(body: str, **options) -> subprocess.CompletedProcess:
    """Runs lines inside of `exit_on_unusable_input` in a process of their own."""
    code = WRITES.format(body.replace("\n", "\n    "))
    options = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": ROOT} | options
    return subprocess.run([sys.executable, "-c", code], text=True, check=False, **options)


@pytest.mark.parametrize(
    ("capabilities", "has"),
    [({"avx512_bf16": True, "amx_bf16": False}, True), ({"avx512_bf16": False}, False), ({"amx_bf16": True}, True)],
)
def test_a_cpu_says_whether_it_has_instructions_for_bfloat16(monkeypatch, capabilities, has):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert has_bfloat16(torch.device("cpu")) is has
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: not has)
    assert has_bfloat16(torch.device("cpu")) is not has
    assert not has_bfloat16(torch.device("meta"))


@pytest.mark.parametrize("error", [ValueError, OSError, SafetensorError, torch.OutOfMemoryError])
def test_what_cannot_be_used_is_one_line_and_exit_code_2(error, capsys, monkeypatch):
    monkeypatch.delenv("PARDEC_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as stopped, exit_on_unusable_input():
        raise error("x: expected a,\n found b")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.strip() == "error: x: expected a, found b"


def test_what_the_system_says_of_a_file_is_told_with_what_was_expected(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("PARDEC_TRACEBACK", raising=False)
    with pytest.raises(SystemExit), exit_on_unusable_input():
        tmp_path.read_text()
    expected = f"error: {tmp_path}: expected a file or folder that can be used, found Is a directory"
    assert capsys.readouterr().err.strip() == expected


def test_ctrl_c_is_one_word_and_exit_code_130(capsys):
    with pytest.raises(SystemExit) as stopped, exit_on_unusable_input():
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    assert capsys.readouterr().err.strip() == "stopped"


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    """As in a container that runs as a number without a name."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 12345678)
    with pytest.raises(OSError, match="cache: expected a folder in XDG_CACHE_HOME or HOME, found neither set"):
        pardec.run.cache_folder()


@pytest.mark.parametrize("body", ["for n in range(10**5): print(n)", "print(1)"], ids=["long", "short"])
def test_a_reader_that_goes_away_ends_the_program_without_a_word(body):
    """As behind `| head -1`, where the last line may be written when nobody reads any more."""
    reads, writes = os.pipe()
    os.close(reads)
    ended = start(body, stdout=writes)
    os.close(writes)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_there_is_no_room_for_is_one_line():
    with open("/dev/full", "w") as full:
        ended = start("print(1)", stdout=full)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert len(ended.stderr.splitlines()) == 1


def test_a_program_that_was_started_without_an_output_runs():
    command = f'{sys.executable} -c "$0" >&-'
    ended = subprocess.run(["sh", "-c", command, WRITES.format("print(1)")], capture_output=True, cwd=ROOT, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_a_full_disk_is_an_error_that_names_the_file_and_its_size(tmp_path, monkeypatch):
    def save_on_a_full_disk(tensors, path, metadata):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(pardec.run, "save_file", save_on_a_full_disk)
    with pytest.raises(OSError, match=r"a\.safetensors: expected room for 4,000 bytes, found .*No space left"):
        save_tensors({"a": torch.zeros(1000)}, tmp_path / "a.safetensors")


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    full = Path("/dev/full")
    with (
        pytest.raises(OSError, match=r"^/dev/full: expected a file that can be written, found No space left on device"),
        writing_to(full),
        full.open("w") as file,
    ):
        file.write("x")
    with pytest.raises(FileNotFoundError), writing_to(full):  # which says itself what is missing
        (tmp_path / "nothing").open()


def test_versions_are_told_where_nothing_was_installed_but_is_on_the_path(monkeypatch):
    def version(name):
        if name == "pardec":
            raise PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr(pardec.run, "version", version)
    found = library_versions()
    assert found.pop("python") == platform.python_version()
    assert found.pop("pardec") == "unknown"
    assert set(found.values()) == {"1.2"}
