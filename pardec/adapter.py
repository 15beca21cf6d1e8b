"""An adapter: mask embeddings and perhaps a gated LoRA, with their provenance, in memory and on disk.

On disk: `pardec.json`, `mask_embeddings.safetensors`, `lora/` in PEFT's format. safetensors and JSON only.
Writing is safe against a kill at any moment: a complete copy is renamed to `.incoming` first, and as long as that
folder exists it is what is read.
Legend: K num_speculative_tokens, D width of an input embedding.
"""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pardec.fingerprint import Fingerprint
from pardec.gated_lora import LoraWeights

FORMAT_VERSION = 1
METADATA_FILE = "pardec.json"
EMBEDDINGS_FILE = "mask_embeddings.safetensors"
LORA_DIR = "lora"
LORA_CONFIG_FILE = f"{LORA_DIR}/adapter_config.json"
LORA_WEIGHTS_FILE = f"{LORA_DIR}/adapter_model.safetensors"
LORA_README_FILE = f"{LORA_DIR}/README.md"
_INCOMING, _WRITING, _REMOVED = ".incoming", ".writing-", ".removed-"
_LORA_README = (
    "This LoRA is only valid at the rows of pardec's mask tokens. "
    "Loaded as an ordinary PEFT adapter it would change the model's own output.\n"
)


class AdapterError(ValueError):
    """An adapter directory that cannot be used; the message says what was expected and what was found."""


class BaseReference(BaseModel):
    """Where the base was loaded from."""

    model_config = ConfigDict(extra="forbid")

    name: str
    revision: str | None = None


class AdapterMetadata(BaseModel):
    """Content of `pardec.json`.

    Attributes:
        num_speculative_tokens: K that the adapter was trained with.
        mask_sharing: one embedding per position, or one for all.
        draft_input: what stands at mask rows.
        base: where the base was loaded from.
        fingerprint: what identifies the base.
        training: objective, data, command, git commit, library versions, steps.
        measured: acceptance of the real decoder on validation prompts.
        files: sha256 of every other file.
    """

    model_config = ConfigDict(extra="forbid")

    format_version: int = FORMAT_VERSION
    num_speculative_tokens: int = Field(ge=1)
    mask_sharing: Literal["distinct", "shared"] = "distinct"
    draft_input: Literal["mask_embeddings"] = "mask_embeddings"
    base: BaseReference
    fingerprint: Fingerprint
    training: dict[str, Any] = {}
    measured: dict[str, Any] = {}
    files: dict[str, str] = {}


@dataclass(frozen=True)
class Adapter:
    """Learned numbers and where they come from.

    Attributes:
        mask_embeddings: shape [K, D], or [1, D] if shared; float32, in the space of the embedding module's output.
        metadata: provenance.
        lora: the gated LoRA, or None.
    """

    mask_embeddings: Tensor
    metadata: AdapterMetadata
    lora: LoraWeights | None = None

    def __post_init__(self) -> None:
        shared = self.metadata.mask_sharing == "shared"
        rows = 1 if shared else self.metadata.num_speculative_tokens
        if self.mask_embeddings.dim() != 2 or self.mask_embeddings.shape[0] != rows:
            raise AdapterError(
                f"mask embeddings: expected shape [{rows}, D] for {self.metadata.mask_sharing} mask tokens with "
                f"num_speculative_tokens {self.metadata.num_speculative_tokens}, "
                f"found {list(self.mask_embeddings.shape)}"
            )
        if not bool(torch.isfinite(self.mask_embeddings).all()):
            raise AdapterError("mask embeddings: expected finite numbers, found NaN or infinity")

    def embeddings_for(self, num_speculative_tokens: int) -> Tensor:
        """Mask embeddings of shape [num_speculative_tokens, D].

        Raises:
            ValueError: if more are asked for than were trained and they are distinct.
        """
        trained = self.metadata.num_speculative_tokens
        if self.metadata.mask_sharing == "shared":
            return self.mask_embeddings.expand(num_speculative_tokens, -1)
        if num_speculative_tokens > trained:
            raise ValueError(
                f"num_speculative_tokens: expected at most {trained}, the number of distinct mask tokens that the "
                f"adapter was trained with, found {num_speculative_tokens}"
            )
        return self.mask_embeddings[:num_speculative_tokens]


def save_adapter(adapter: Adapter, directory: str | Path) -> None:
    """Writes the adapter into `directory`, which may hold an older one and other files.

    A kill at any moment leaves the older adapter or the new one, readable.

    Raises:
        OSError: if the disk is full; what was there before stays as it was.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in (*directory.glob(f"{_WRITING}*"), *directory.glob(f"{_REMOVED}*")):
        shutil.rmtree(leftover)  # of a process that was killed
    incoming = directory / _INCOMING
    if incoming.exists():  # a complete adapter whose publication was cut off: finish that first
        _publish(incoming, directory)
    aside = Path(tempfile.mkdtemp(prefix=_WRITING, dir=directory))
    try:
        _write_files(adapter, aside)
        aside.chmod(0o755)  # mkdtemp lets only the owner in
        os.replace(aside, incoming)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _publish(incoming, directory)


def _write_files(adapter: Adapter, folder: Path) -> None:
    if adapter.lora is not None:
        (folder / LORA_DIR).mkdir()
    save_file(
        {"mask_embeddings": adapter.mask_embeddings.detach().float().cpu().contiguous()}, folder / EMBEDDINGS_FILE
    )
    written = [EMBEDDINGS_FILE]
    if adapter.lora is not None:
        save_file(adapter.lora.tensors, folder / LORA_WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / LORA_CONFIG_FILE).write_text(json.dumps(adapter.lora.config, indent=2, sort_keys=True))
        (folder / LORA_README_FILE).write_text(_LORA_README)
        written += [LORA_WEIGHTS_FILE, LORA_CONFIG_FILE, LORA_README_FILE]
    files = {name: _sha256(folder / name) for name in written}
    metadata = adapter.metadata.model_copy(update={"files": files})
    (folder / METADATA_FILE).write_text(metadata.model_dump_json(indent=2) + "\n")
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _publish(incoming: Path, directory: Path) -> None:
    names = [METADATA_FILE, *AdapterMetadata.model_validate_json((incoming / METADATA_FILE).read_text()).files]
    if not (incoming / LORA_DIR).exists():
        _remove_lora(directory)
    for name in names:
        (directory / name).parent.mkdir(exist_ok=True)
        copy = directory / f"{name}.new"
        shutil.copyfile(incoming / name, copy)
        _sync(copy)
        os.replace(copy, directory / name)
    # renamed first, so that a half-removed folder is never taken for a complete one
    removed = Path(tempfile.mkdtemp(prefix=_REMOVED, dir=directory))
    os.replace(incoming, removed / "adapter")
    shutil.rmtree(removed)


def _remove_lora(directory: Path) -> None:
    """An older adapter's LoRA; whatever else someone keeps in that folder stays."""
    for name in (LORA_WEIGHTS_FILE, LORA_CONFIG_FILE, LORA_README_FILE):
        (directory / name).unlink(missing_ok=True)
    folder = directory / LORA_DIR
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def load_adapter(directory: str | Path) -> Adapter:
    """Reads an adapter directory.

    Raises:
        AdapterError: if it is missing, incomplete, damaged, foreign or of a later format.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise AdapterError(f"{directory}: expected an adapter directory, found {_what(directory)}")
    root = directory / _INCOMING if (directory / _INCOMING).is_dir() else directory
    metadata = _read_metadata(root)
    for name, expected in metadata.files.items():
        if not (root / name).is_file():
            raise AdapterError(f"{root / name}: expected a file of the adapter, found {_what(root / name)}")
        if _sha256(root / name) != expected:
            raise AdapterError(
                f"{root / name}: expected sha256 {expected[:12]}, found {_sha256(root / name)[:12]}: "
                "the file is truncated or was changed"
            )
    tensors = _read_tensors(root / EMBEDDINGS_FILE)
    if set(tensors) != {"mask_embeddings"}:
        raise AdapterError(f"{root / EMBEDDINGS_FILE}: expected mask_embeddings, found {sorted(tensors)}")
    lora = None
    if LORA_WEIGHTS_FILE in metadata.files:
        lora = _read_lora(root)
    return Adapter(tensors["mask_embeddings"], metadata, lora)


def _read_metadata(root: Path) -> AdapterMetadata:
    path = root / METADATA_FILE
    if not path.is_file():
        names = ", ".join(sorted(p.name for p in root.iterdir())[:5]) or "an empty directory"
        raise AdapterError(f"{root}: expected an adapter directory with {METADATA_FILE}, found {names}")
    try:
        raw = json.loads(path.read_text())
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if version != FORMAT_VERSION:
            raise AdapterError(f"{path}: expected format_version {FORMAT_VERSION}, found {version}")
        metadata = AdapterMetadata.model_validate(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path}: expected JSON, found {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise AdapterError(f"{path}: {where}: {first['msg']}, found {first['input']!r}") from None
    if EMBEDDINGS_FILE not in metadata.files:
        raise AdapterError(f"{path}: expected {EMBEDDINGS_FILE} among its files, found {sorted(metadata.files)}")
    outside = [name for name in metadata.files if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise AdapterError(f"{path}: expected files inside the adapter directory, found {outside[0]!r}")
    return metadata


def _read_lora(root: Path) -> LoraWeights:
    path = root / LORA_CONFIG_FILE
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError(f"expected a JSON object, found {type(config).__name__}")
        lora = LoraWeights(config, _read_tensors(root / LORA_WEIGHTS_FILE))
        lora.pairs()
    except AdapterError:
        raise
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: {error}") from None
    return lora


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: expected a safetensors file, found {error}") from None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _what(path: Path) -> str:
    return "a file" if path.is_file() else "a directory" if path.is_dir() else "nothing"
