"""`export.json` in every exported folder: what was exported from what, for which engine, and what to expect of it.

Knows JSON, no engine.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pardec.adapters.adapter import AdapterMetadata, BaseReference, Sha256
from pardec.adapters.json_files import is_inside, read_object
from pardec.arguments import real
from pardec.errors import problem, shown
from pardec.layout import MAX_SPECULATIVE_TOKENS

RECORD_FILE = "export.json"
FORMAT_VERSION = 2
DoorName = Literal["vllm", "vllm-stock", "sglang", "transformers", "peft"]
DOOR_NAMES: tuple[DoorName, ...] = get_args(DoorName)


class ExpectedAcceptance(BaseModel):
    """What an engine should report, from what pardec's own decoder accepted when the adapter was trained.

    Attributes:
        counted: what the engine counts, in words.
        sampled: mean acceptance length in its count, at `temperature` and `top_k`.
        greedy: the same, greedy.
        temperature: of `sampled`.
        top_k: likewise.
        split: of the prompts.
        num_prompts: how many there were.
    """

    model_config = ConfigDict(extra="forbid")

    counted: str
    sampled: float | None = None
    greedy: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    split: str | None = None
    num_prompts: int | None = None


class ExportRecord(BaseModel):
    """Content of `export.json`.

    Attributes:
        door: what was asked for.
        engine: distribution that serves the folder.
        checked_against: the version of it that the form was checked against.
        pardec: version that wrote it.
        num_speculative_tokens: K of the adapter.
        base: of the adapter, by a name that tells nothing of the machine that trained it.
        architecture: sizes of the base, from the adapter's fingerprint.
        with_base: whether the base's own files are in the folder.
        acceptance: to expect; None where nothing is drafted or nothing was measured.
        sources: sha256 of the adapter's files.
        files: sha256 of every other file of the folder.
        own_sha256: of all other keys, as sorted JSON.
    """

    model_config = ConfigDict(extra="forbid")

    format_version: int = FORMAT_VERSION
    door: DoorName
    engine: str
    checked_against: str
    pardec: str = Field(default_factory=lambda: version("pardec"))
    num_speculative_tokens: int = Field(ge=1, le=MAX_SPECULATIVE_TOKENS)
    base: BaseReference
    architecture: dict[str, Any]
    with_base: bool = False
    acceptance: ExpectedAcceptance | None = None
    sources: dict[str, Sha256] = {}
    files: dict[str, Sha256] = {}
    own_sha256: Sha256 = "0" * 64

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, str]) -> dict[str, str]:
        outside = [name for name in files if not is_inside(name)]
        if outside:
            raise ValueError(f"files: expected names of files inside the folder, found {shown(outside[0])}")
        return files


def expected_acceptance(metadata: AdapterMetadata, counted: str, exact_tokens: int) -> ExpectedAcceptance | None:
    """What was measured in training, with the tokens of a round added that the engine counts and pardec does not.

    Args:
        metadata: of the adapter.
        counted: as in `ExpectedAcceptance`.
        exact_tokens: of a round, beside accepted drafts and the bonus token.

    Returns:
        None if the adapter was not measured.
    """
    measured = metadata.measured
    lengths: dict[str, float | None] = {}
    for way in ("sampled", "greedy"):
        found = measured.get(way)
        length = real(found.get("mean_acceptance_length")) if isinstance(found, dict) else float("nan")
        lengths[way] = round(length + exact_tokens, 3) if length >= 1 else None
    if not any(lengths.values()):
        return None
    settings = {key: measured["sampled"].get(key) for key in ("temperature", "top_k")} if lengths["sampled"] else {}
    about = {key: measured.get(key) for key in ("split", "num_prompts")}
    return ExpectedAcceptance.model_validate({"counted": counted, **lengths, **settings, **about})


def write_record(record: ExportRecord, folder: Path) -> None:
    """Writes `export.json` into the folder, with its own digest."""
    record = record.model_copy(update={"own_sha256": _digest(record.model_dump(mode="json"))})
    (folder / RECORD_FILE).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_record(folder: Path) -> ExportRecord:
    """Reads `export.json`.

    Raises:
        ValueError: naming the file, if it is missing or not one of ours.
    """
    path, raw = folder / RECORD_FILE, _raw(folder)
    if raw.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: expected format_version {FORMAT_VERSION}, found {shown(raw.get('format_version'))}")
    try:
        return ExportRecord.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"{path}: {problem(error.errors()[0])}") from None


def record_digest(folder: Path) -> str:
    """The digest that `export.json` should have as `own_sha256`; errors as of `read_record`."""
    return _digest(_raw(folder))


def _raw(folder: Path) -> dict[str, Any]:
    path = folder / RECORD_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: expected an exported folder with {RECORD_FILE}, found none")
    return read_object(path)


def _digest(raw: dict[str, Any]) -> str:
    others = {key: value for key, value in raw.items() if key != "own_sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()
