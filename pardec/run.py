"""What every script needs around its work: one-line errors, provenance, files that are whole at any moment.

Knows nothing of models or decoding.
"""

import fcntl
import hashlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from pardec.errors import first_line, told

# what is raised for input, files and machines that a program cannot go on with
UNUSABLE_INPUT = (ValueError, OSError, SafetensorError, torch.OutOfMemoryError)


@contextmanager
def exit_on_unusable_input() -> Iterator[None]:
    """Turns errors about input into one line on standard error and exit code 2; set PARDEC_TRACEBACK=1 to see all.

    Where nobody reads standard output any more, as behind `| head`, the program ends as others do, without a word, and
    Ctrl-C ends it with one.
    """
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()  # what cannot be written is to be known here, not when the interpreter ends
    except BrokenPipeError:
        _drop_output()
        sys.exit(128 + 13)  # what a shell says of those that SIGPIPE ends
    except KeyboardInterrupt:
        if sys.stderr is not None:
            tqdm.write("stopped", file=sys.stderr)
        sys.exit(128 + 2)
    except UNUSABLE_INPUT as error:
        if os.environ.get("PARDEC_TRACEBACK") == "1":
            raise
        _drop_output()
        if sys.stderr is not None:
            tqdm.write(f"error: {told(error)}", file=sys.stderr)  # on a line of its own, also below a progress bar
        sys.exit(2)


def _drop_output() -> None:
    """Lets what standard output cannot take go, so that the interpreter does not try again when it ends."""
    out = sys.stdout
    if out is None:
        return
    try:
        out.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, out.fileno())
        os.close(nowhere)


class NoRoomError(OSError):
    """A file of tensors could not be written whole."""


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file.

    Raises:
        NoRoomError: naming the file; safetensors has an error of its own for that.
    """
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        raise NoRoomError(f"{path}: expected room for {size:,} bytes, found {first_line(error)}") from None


def cache_folder() -> Path:
    """Where this user's conversions and choices are kept: `pardec` in $XDG_CACHE_HOME, by default `~/.cache`.

    Raises:
        OSError: for a user without a home, as containers have them.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "pardec"
    except RuntimeError:
        raise OSError("cache: expected a folder in XDG_CACHE_HOME or HOME, found neither set") from None


def library_versions() -> dict[str, str]:
    """Versions of what results depend on; `unknown` for what was not installed but is found on the path."""
    names = ("pardec", "torch", "transformers", "peft", "accelerate", "safetensors")
    return {"python": platform.python_version()} | {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return f"{model}, {torch.get_num_threads()} threads"


def names_cpu(device: str) -> bool:
    """Whether this is what `device_name` gave for a CPU."""
    return device.endswith(" threads")


def same_but_threads(device: str, other: str) -> bool:
    """Whether `device_name` gave both for one CPU, with any number of threads."""
    return names_cpu(device) and names_cpu(other) and device.rpartition(", ")[0] == other.rpartition(", ")[0]


def dtype_name(dtype: torch.dtype | str) -> str:
    """As options and files name it: `float32`, not `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 numbers by instructions of its own; else they are slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        known = torch.cpu.get_capabilities()
        return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def command_line() -> str:
    """The command as it was typed, without the interpreter's path."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def git_commit() -> str | None:
    """Commit of the working tree that the script lies in, with -dirty for local changes; None outside of one."""
    folder = Path(sys.argv[0]).resolve().parent
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=folder, capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None if out.returncode == 0 else None


def file_sha256(path: Path) -> str:
    """Of what a file holds, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp_of(file: Path) -> tuple[int, int]:
    """Size in bytes and the nanosecond of the last change, which are others when a file is written to."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def check_unchanged(file: Path, stamp: tuple[int, int]) -> None:
    """Refuses a file that was written to meanwhile.

    Raises:
        OSError: with its sizes.
    """
    now = stamp_of(file)
    if now != stamp:
        raise OSError(
            f"{file}: expected the file as it was when the run began, {stamp[0]:,} bytes, found it changed, "
            f"{now[0]:,} bytes; start again"
        )


def to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk for good."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():  # there are systems whose folders cannot be asked
            raise
    finally:
        os.close(descriptor)


def held_alone(descriptor: int) -> bool:
    """Whether no other process holds an open file or folder; then this one does, until the descriptor is closed.

    True as well where a file system knows no such locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to, which becomes `path` once it is on the disk, and goes if that fails.

    Raises:
        OSError: naming `path`, if it cannot be written.
    """
    aside = path.with_name(f".writing-{os.getpid()}-{path.name}")
    try:
        with writing_to(path):
            yield aside
            to_disk(aside)
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Says which file it is where the system says only that it cannot be written, as on a full disk."""
    try:
        yield
    except OSError as error:
        is_copy = error.filename2 == str(
            path
        )  # to which nothing more can be written, though what is copied comes first
        if error.strerror is None or (error.filename is not None and not is_copy):
            raise
        raise OSError(f"{path}: expected a file that can be written, found {error.strerror}") from None
