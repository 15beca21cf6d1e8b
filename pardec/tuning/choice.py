"""Which shape of the fused step to use on a device: cost by rows, prediction, choice, and the file that keeps it.

Knows numbers and JSON; no model, no clock.
Legend: a shape is given by its block_lengths, see `pardec.tuning.chain`; (0,) is plain decoding.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import TypeAdapter, ValidationError

from pardec.adapters.files import EMBEDDINGS_FILE, HEAD_FILE, LORA_CONFIG_FILE, LORA_WEIGHTS_FILE, load_adapter
from pardec.tuning.chain import (
    PLAIN,
    BlockLengths,
    check_block_lengths,
    expected_steps,
    expected_tokens_per_step,
    num_rows,
)

TUNED_FILE = "tuned.json"
FORMAT_VERSION = 1


# ---------------------------------------------------------------------- ranking


def monotone_cost(measured_ms: Mapping[int, float], rows: int) -> float:
    """Milliseconds of a step with `rows` rows: linear between measured numbers of rows, never falling.

    Where a measurement falls below that of fewer rows, both take their mean (pool adjacent violators); outside the
    measured range the nearest value holds.

    Args:
        measured_ms: milliseconds per step by number of rows, at least one.
        rows: of the step asked about.
    """
    pools: list[tuple[float, int]] = []  # mean, number of measurements
    places = sorted(measured_ms)
    for place in places:
        pools.append((measured_ms[place], 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (low, n), (high, m) = pools[-2:]
            pools[-2:] = [((low * n + high * m) / (n + m), n + m)]
    values = [mean for mean, count in pools for _ in range(count)]
    return float(np.interp(rows, places, values))


@dataclass(frozen=True)
class Workload:
    """What is to be decoded, as far as time depends on it.

    Attributes:
        new_tokens: of each sequence of each batch.
        prefill_ms: per batch, with what else a call costs once, when tokens are drafted.
        plain_prefill_ms: the same in plain decoding.
        waiting: steps of a batch per step of its mean sequence, as a batch runs until its last sequence is done.
    """

    new_tokens: Sequence[Sequence[int]]
    prefill_ms: float
    plain_prefill_ms: float
    waiting: float = 1.0


@dataclass(frozen=True)
class Candidate:
    """A shape and what is predicted for it.

    Attributes:
        block_lengths: (0,) for plain decoding.
        tokens_per_step: expected in the long run, bonus token included.
        ms_per_step: of one forward and what a step does around it.
        tokens_per_second: of whole calls, prefill included.
    """

    block_lengths: BlockLengths
    tokens_per_step: float
    ms_per_step: float
    tokens_per_second: float


def predict(block_lengths: BlockLengths, conditional: ArrayLike, ms_per_step: float, workload: Workload) -> Candidate:
    """What decoding the workload with this shape will give."""
    batches = workload.new_tokens
    if block_lengths == PLAIN:
        prefill_ms, steps = workload.plain_prefill_ms, sum(max(batch) - 1 for batch in batches)
    else:
        by_tokens = expected_steps(conditional, block_lengths, max(map(max, batches)))
        means = [np.mean([by_tokens[n - 1] for n in batch]) for batch in batches]
        prefill_ms, steps = workload.prefill_ms, workload.waiting * float(np.sum(means))
    seconds = (len(batches) * prefill_ms + steps * ms_per_step) / 1000
    tokens_per_step = expected_tokens_per_step(conditional, block_lengths)
    return Candidate(block_lengths, tokens_per_step, ms_per_step, sum(map(sum, batches)) / seconds)


def spread_over_rows(
    shapes: Sequence[BlockLengths], tables: Mapping[int, np.ndarray], count: int
) -> list[BlockLengths]:
    """Up to `count` shapes from the fewest rows to the most, each the best of its number of rows."""
    by_rows: dict[int, BlockLengths] = {}
    for shape in sorted(shapes, key=lambda one: expected_tokens_per_step(tables[len(one) - 1], one)):
        by_rows[num_rows(shape)] = shape
    wanted = np.geomspace(min(by_rows), max(by_rows), max(count, 2))
    nearest = {min(by_rows, key=lambda rows: abs(rows - want)) for want in wanted.tolist()}
    return [by_rows[rows] for rows in sorted(nearest)]


def finalists(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """The `count` best predicted of those that are the best of their K: neighbours in rows hardly differ."""
    best: dict[int, Candidate] = {}
    for candidate in sorted(candidates, key=lambda one: -one.tokens_per_second):
        best.setdefault(len(candidate.block_lengths), candidate)
    return list(best.values())[:count]


def choose(measured_tokens_per_second: Mapping[BlockLengths, float]) -> BlockLengths:
    """The fastest measured shape; plain decoding, which must be among them, unless one is faster."""
    plain = measured_tokens_per_second[PLAIN]
    best = max(measured_tokens_per_second, key=lambda shape: measured_tokens_per_second[shape])
    return best if measured_tokens_per_second[best] > plain else PLAIN


# ---------------------------------------------------------------------- the file


@dataclass(frozen=True)
class TunedChoice:
    """What `pardec tune` chose for one adapter on one device.

    Attributes:
        device: name of the GPU, or of the CPU with its number of threads.
        dtype: of the base, e.g. `float32`.
        compile: whether steps were compiled.
        block_lengths: the chosen shape; (0,) where plain decoding was fastest.
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

    def __post_init__(self) -> None:
        check_block_lengths(self.block_lengths)

    @property
    def num_speculative_tokens(self) -> int:
        """K; 0 where plain decoding was fastest."""
        return len(self.block_lengths) - 1


def read_tuned(
    directory: str | Path, device: str, dtype: torch.dtype | str, compile: bool = False
) -> TunedChoice | None:
    """The choice for this adapter as it is now on this device; None where there is none.

    Args:
        directory: of the adapter.
        device: as in `TunedChoice`.
        dtype: of the base.
        compile: whether steps are compiled.

    Raises:
        ValueError: if the file is there and is not one of ours, naming it.
    """
    wanted = (device, str(dtype).removeprefix("torch."), compile)
    fresh = [one for one in _read_fresh(Path(directory)) if _key(one) == wanted]
    return fresh[0] if fresh else None


def write_tuned(directory: str | Path, choice: TunedChoice) -> Path:
    """Adds `choice` to the adapter's file, in place of an older one of its device; returns the file.

    Choices for other devices stay; those for weights that the adapter no longer has go.

    Raises:
        ValueError: if the file is there and is not one of ours.
        OSError: if the folder cannot be written to.
    """
    directory = Path(directory)
    kept = [one for one in _read_fresh(directory) if _key(one) != _key(choice)]
    content = {"format_version": FORMAT_VERSION, "choices": [asdict(one) for one in (*kept, choice)]}
    path = directory / TUNED_FILE
    check_writable(directory)
    handle, aside = tempfile.mkstemp(prefix=f".{TUNED_FILE}-", dir=directory)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)  # mkstemp lets only the owner in
        os.replace(aside, path)
    finally:
        Path(aside).unlink(missing_ok=True)
    return path


def check_writable(directory: str | Path) -> None:
    """Raises OSError, saying where, unless a file can be made in `directory`: to be known before long work."""
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OSError(
            f"{Path(directory) / TUNED_FILE}: expected an adapter folder that can be written to, found {error.strerror}"
        ) from None


def weights_of(directory: str | Path) -> dict[str, str]:
    """sha256 of the adapter's files that acceptance depends on, by name.

    Raises:
        AdapterError: if there is no usable adapter.
    """
    files = load_adapter(directory).metadata.files
    names = (EMBEDDINGS_FILE, LORA_WEIGHTS_FILE, LORA_CONFIG_FILE, HEAD_FILE)
    return {name: files[name] for name in names if name in files}


def _key(choice: TunedChoice) -> tuple[str, str, bool]:
    return choice.device, choice.dtype, choice.compile


def _read_fresh(directory: Path) -> list[TunedChoice]:
    """The choices that belong to the adapter's weights as they are now."""
    path = directory / TUNED_FILE
    if not path.exists():
        return []
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(f"{path}: expected format_version {FORMAT_VERSION}, found {version}")
        choices = TypeAdapter(list[TunedChoice]).validate_python(raw.get("choices"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected JSON, found {error}; remove it and tune again") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("choices", *first["loc"])))
        found = str(first["input"])[:60]
        raise ValueError(f"{path}: {where}: {first['msg']}, found {found!r}; remove it and tune again") from None
    weights = weights_of(directory)
    return [one for one in choices if one.weights == weights]
