"""`tuned.json` beside an adapter: which ways to decode `pardec tune` chose for it, by device, dtype, batch and law.

Knows JSON and the adapter's files; no model, no clock.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from filelock import FileLock
from pydantic import Discriminator, Tag, TypeAdapter, ValidationError

from pardec.adapters.files import EMBEDDINGS_FILE, HEAD_FILE, LORA_CONFIG_FILE, LORA_WEIGHTS_FILE, load_adapter
from pardec.adapters.json_files import read_object
from pardec.adapters.packaged import adapter_folder, tuned_folder
from pardec.arguments import integer, known_dtype, real
from pardec.draft_tree import DraftTree, DynamicTree
from pardec.errors import problem, shown
from pardec.layout import MAX_COPY_TOKENS, PLAIN, BlockLengths, check_block_lengths, full_blocks
from pardec.run import dtype_name, names_cpu, same_but_threads, writing_to

TUNED_FILE = "tuned.json"
_ASIDE = f".{TUNED_FILE}-"
_SECONDS_TO_WRITE = 60
_ROOM = 2**16  # bytes, more than one choice takes
_CONSTANT, _DYNAMIC = "constant tree", "dynamic tree"
Tree = Annotated[
    Annotated[DraftTree, Tag(_CONSTANT)] | Annotated[DynamicTree, Tag(_DYNAMIC)],
    Discriminator(lambda tree: _CONSTANT if isinstance(tree, DraftTree) or _names_parents(tree) else _DYNAMIC),
]
FORMAT_VERSION = 1


def _names_parents(tree: Any) -> bool:
    """Whether what a file says of a tree is more than its runs; of a dynamic one, where nodes stand is data."""
    return isinstance(tree, dict) and "parents" in tree


@dataclass(frozen=True)
class TunedChoice:
    """What `pardec tune` chose for one adapter on one device.

    Attributes:
        device: name of the GPU, or of the CPU with its number of threads.
        dtype: of the base, e.g. `float32`.
        compile: whether steps were compiled.
        block_lengths: the chosen shape; K everywhere for two_pass, (0,) where plain decoding was fastest.
        weights: sha256 of the adapter's files that the choice belongs to, by name.
        ms_per_step: measured of the chosen shape.
        predicted_tokens_per_second: of the chosen shape, prefill included.
        measured_tokens_per_second: the same, measured.
        plain_tokens_per_second: plain decoding, measured in turn with it.
        conditional_acceptance: of the full chain by position, pooled over all rounds.
        temperature: that acceptance and speed were measured at; 0 is greedy.
        top_k: the same.
        batch_size: the same.
        versions: of the libraries.
        mode: of decoding; of files that do not say, fused, or plain by its block_lengths.
        use_head: whether the drafts are drawn by the adapter's sampler head, where it has one.
        copy_tokens: copied ones that are verified behind the drafts, or beside the tree; block_lengths has one more for
            each in fused mode.
        by_dtype: tokens/s of what was chosen in each dtype, measured in turn; None where one was tuned by itself.
        tree: the chosen shape where that is a tree; then block_lengths say how deep it is, and what is drafted behind
            copied tokens.
    """

    device: str
    dtype: str
    compile: bool
    block_lengths: BlockLengths
    weights: dict[str, str]
    ms_per_step: float
    predicted_tokens_per_second: float
    measured_tokens_per_second: float
    plain_tokens_per_second: float
    conditional_acceptance: list[float]
    temperature: float = 0.0
    top_k: int | None = None
    batch_size: int = 1
    versions: dict[str, str] | None = None
    mode: Literal["plain", "two_pass", "fused"] = "fused"
    use_head: bool = True
    copy_tokens: int = 0
    by_dtype: dict[str, float] | None = None
    tree: Tree | None = None

    def __post_init__(self) -> None:
        integer("batch_size", self.batch_size, 1)
        integer("copy_tokens", self.copy_tokens, 0, MAX_COPY_TOKENS)
        for name in ("ms_per_step", *(f"{of}_tokens_per_second" for of in ("predicted", "measured", "plain"))):
            if not 0 < real(getattr(self, name)) < math.inf:
                raise ValueError(f"{name}: expected a finite number > 0, found {shown(getattr(self, name))}")
        for dtype, speed in (self.by_dtype or {}).items():
            known_dtype(dtype)
            if not 0 < real(speed) < math.inf:
                raise ValueError(f"by_dtype: {dtype}: expected a finite number > 0, found {shown(speed)}")
        if not real(self.temperature) >= 0:  # by which choices are told apart
            raise ValueError(f"temperature: expected a number >= 0, found {shown(self.temperature)}")
        check_block_lengths(self.block_lengths, 0 if self.mode == "two_pass" else self.copy_tokens)
        if self.block_lengths == PLAIN:
            object.__setattr__(self, "mode", "plain")
        K = self.num_speculative_tokens
        blocks = self.block_lengths[: K + 1]
        if self.tree is not None and (blocks != full_blocks(K) or self.tree.num_speculative_tokens != K):
            raise ValueError(
                f"block_lengths: expected those of the full chain as long as the tree is deep, "
                f"{self.tree.num_speculative_tokens}, found {shown(list(self.block_lengths))}"
            )
        if self.mode != "fused" and self.block_lengths != full_blocks(0 if self.mode == "plain" else K):
            raise ValueError(f"block_lengths: expected those of {self.mode}, found {shown(list(self.block_lengths))}")

    @property
    def num_speculative_tokens(self) -> int:
        """K; 0 where plain decoding, or copies alone, were fastest."""
        return max(self.block_lengths)


def read_tuned(
    directory: str | Path,
    device: str,
    dtype: torch.dtype | str,
    compile: bool = False,
    *,
    files: Mapping[str, str] | None = None,
) -> list[TunedChoice]:
    """The choices for this adapter as it is now on this device, one for each batch size and way of sampling.

    Where a CPU has none, those that were last made on it with another number of threads: nearer to it than what ships.

    Args:
        directory: of the adapter.
        device: as in `TunedChoice`.
        dtype: of the base.
        compile: whether steps are compiled.
        files: sha256 of the adapter's files; default read from `directory`.

    Raises:
        ValueError: if the file is there and is not one of ours, naming it.
    """
    wanted = (dtype_name(dtype), compile)
    alike = [one for one in fresh_choices(directory, files) if (one.dtype, one.compile) == wanted]
    last = next((one.device for one in reversed(alike) if same_but_threads(one.device, device)), None)
    here = device if any(one.device == device for one in alike) else last
    return [one for one in alike if one.device == here]


def nearest_choice(choices: Sequence[TunedChoice], num_sequences: int, is_greedy: bool) -> TunedChoice | None:
    """The choice that was tuned most nearly as decoding is to be; None of none.

    The way of sampling comes first; then the largest batch that is not larger, else the smallest.

    Args:
        choices: of one device and dtype.
        num_sequences: that are decoded together.
        is_greedy: whether tokens are the likeliest ones.
    """
    if not choices:
        return None
    alike = [one for one in choices if (one.temperature == 0) == is_greedy] or choices
    smaller = [one for one in alike if one.batch_size <= num_sequences]
    if smaller:
        return max(smaller, key=lambda one: one.batch_size)
    return min(alike, key=lambda one: one.batch_size)


def shipped_choice(
    directory: str | Path,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    files: Mapping[str, str] | None = None,
) -> TunedChoice | None:
    """What a packaged adapter was tuned to on a device of this kind before it shipped: a start for others; or None.

    A GPU is not told what rows cost on a CPU, nor the other way round. Of several that of this dtype, and of this
    device, where there is one: what rows cost is told by the dtype before the device. Arguments and errors as in
    `read_tuned`.
    """
    folder = adapter_folder(directory)
    fresh = [] if folder == Path(directory) else fresh_choices(folder, files)
    if device is not None:
        fresh = [one for one in fresh if names_cpu(one.device) == names_cpu(device)]
    wanted = None if dtype is None else dtype_name(dtype)
    return max(fresh, key=lambda one: (one.dtype == wanted, one.device == device), default=None)


def fastest_dtype(
    directory: str | Path, device: str, compile: bool = False, *, files: Mapping[str, str] | None = None
) -> str | None:
    """The dtype that was fastest on this device when dtypes were last compared; None where none were.

    Arguments and errors as in `read_tuned`.
    """
    fresh = fresh_choices(directory, files)
    compared = [one.by_dtype for one in fresh if (one.device, one.compile) == (device, compile) and one.by_dtype]
    return max(compared[-1], key=compared[-1].__getitem__) if compared else None


def write_tuned(directory: str | Path, choice: TunedChoice) -> Path:
    """Adds `choice` to the adapter's file, in place of an older one of its kind; returns the file.

    Choices for other devices, batch sizes and ways of sampling stay; those for other weights than its own go. That of
    a packaged adapter, or one of the hub, is kept in the user's cache.

    Raises:
        ValueError: if the file is there and is not one of ours.
        OSError: if the folder cannot be written to.
    """
    check_writable(directory)
    # what another process adds between reading and writing would be lost; no lock is left in the adapter's folder
    with FileLock(Path(tempfile.gettempdir()) / f"pardec-tuned-{os.getuid()}.lock"):
        kept = [one for one in fresh_choices(directory, choice.weights) if _key(one) != _key(choice)]
        return _write(tuned_folder(directory), [*kept, choice])


def _write(folder: Path, choices: Sequence[TunedChoice]) -> Path:
    content = {"format_version": FORMAT_VERSION, "choices": [asdict(one) for one in choices]}
    path = folder / TUNED_FILE
    _remove_leftovers(folder)
    handle, aside = tempfile.mkstemp(prefix=_ASIDE, dir=folder)
    try:
        with writing_to(path):
            with os.fdopen(handle, "w") as file:
                file.write(json.dumps(content, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.chmod(aside, 0o644)  # mkstemp lets only the owner in
            os.replace(aside, path)
    finally:
        Path(aside).unlink(missing_ok=True)
    return path


def _remove_leftovers(folder: Path) -> None:
    """What processes left that were killed while they wrote; what is fresh may be another machine's, still at it."""
    for leftover in folder.glob(f"{_ASIDE}*"):
        with suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _SECONDS_TO_WRITE:
                leftover.unlink()


def check_writable(directory: str | Path) -> None:
    """Raises OSError, saying where, unless a choice can be kept for this adapter: to be known before long work."""
    folder = tuned_folder(directory)
    try:
        if folder != Path(directory):  # in the user's cache, where it may be the first
            folder.mkdir(parents=True, exist_ok=True)
        path = folder / TUNED_FILE
        with tempfile.TemporaryFile(dir=folder) as file:  # on a full disk empty files can still be made
            file.write(bytes(_ROOM + (path.stat().st_size if path.exists() else 0)))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(
            f"{folder / TUNED_FILE}: expected an adapter folder that can be written to, found {error.strerror}"
        ) from None


def weights_of(directory: str | Path, files: Mapping[str, str] | None = None) -> dict[str, str]:
    """sha256 of the adapter's files that acceptance depends on, by name; `files` as in `read_tuned`.

    Raises:
        AdapterError: if there is no usable adapter.
    """
    files = load_adapter(directory).metadata.files if files is None else files
    names = (EMBEDDINGS_FILE, LORA_WEIGHTS_FILE, LORA_CONFIG_FILE, HEAD_FILE)
    return {name: files[name] for name in names if name in files}


def _key(choice: TunedChoice) -> tuple[str, str, bool, int, bool]:
    return choice.device, choice.dtype, choice.compile, choice.batch_size, choice.temperature == 0


def fresh_choices(directory: str | Path, files: Mapping[str, str] | None = None) -> list[TunedChoice]:
    """The choices that belong to the adapter's weights as they are now; arguments and errors as in `read_tuned`."""
    path = tuned_folder(directory) / TUNED_FILE
    if not path.exists():
        return []
    try:
        raw = read_object(path)
        version = raw.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"{path}: expected format_version {FORMAT_VERSION}, found {shown(version)}")
        choices = TypeAdapter(list[TunedChoice]).validate_python(raw.get("choices"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in ("choices", *first["loc"]) if part not in (_CONSTANT, _DYNAMIC))
        raise ValueError(f"{path}: {problem(first, where)}; remove it and tune again") from None
    except OSError as error:
        raise ValueError(f"{path}: expected a file that can be read, found {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{error}; remove it and tune again") from None
    weights = weights_of(directory, files)
    return [one for one in choices if one.weights == weights]
