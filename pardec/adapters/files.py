"""Adapter directories: `pardec.json`, `mask_embeddings.safetensors`, `lora/` in PEFT's format, `head.safetensors`.

safetensors and JSON only. Writing is safe against a kill at any moment: a complete copy is renamed to `.incoming`
first, and as long as that folder exists it is what is read.
"""

import difflib
import json
import os
import shutil
import tempfile
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pardec.adapters.adapter import FORMAT_VERSION, MASK_EMBEDDINGS, Adapter, AdapterError, AdapterMetadata
from pardec.adapters.gated_lora import LoraWeights
from pardec.adapters.hub import HubName, hub_file, hub_name
from pardec.adapters.json_files import is_inside, read_object
from pardec.adapters.packaged import PACKAGED_ADAPTERS, adapter_folder, is_packaged_base
from pardec.errors import first_line, problem, short, shown
from pardec.run import file_sha256, save_tensors, writing_to

METADATA_FILE = "pardec.json"
EMBEDDINGS_FILE = "mask_embeddings.safetensors"
HEAD_FILE = "head.safetensors"
LORA_DIR = "lora"
LORA_CONFIG_FILE = f"{LORA_DIR}/adapter_config.json"
LORA_WEIGHTS_FILE = f"{LORA_DIR}/adapter_model.safetensors"
LORA_README_FILE = f"{LORA_DIR}/README.md"
# all that an adapter may consist of, but for METADATA_FILE
PART_FILES = (EMBEDDINGS_FILE, HEAD_FILE, LORA_WEIGHTS_FILE, LORA_CONFIG_FILE, LORA_README_FILE)
_IS_A_BASE = "; that is a model, not an adapter for one"
_INCOMING, _WRITING, _REMOVED = ".incoming", ".writing-", ".removed-"
_LORA_README = (
    "This LoRA is only valid at the rows of pardec's mask tokens. "
    "Loaded as an ordinary PEFT adapter it would change the model's own output.\n"
)


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
    written = []
    if adapter.mask_embeddings is not None:
        save_tensors({"mask_embeddings": _plain(adapter.mask_embeddings)}, folder / EMBEDDINGS_FILE)
        written.append(EMBEDDINGS_FILE)
    if adapter.head is not None:
        save_tensors({name: _plain(tensor) for name, tensor in adapter.head.items()}, folder / HEAD_FILE)
        written.append(HEAD_FILE)
    if adapter.lora is not None:
        (folder / LORA_DIR).mkdir()
        save_tensors(adapter.lora.tensors, folder / LORA_WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / LORA_CONFIG_FILE).write_text(json.dumps(adapter.lora.config, indent=2, sort_keys=True))
        (folder / LORA_README_FILE).write_text(_LORA_README)
        written += [LORA_WEIGHTS_FILE, LORA_CONFIG_FILE, LORA_README_FILE]
    files = {name: file_sha256(folder / name) for name in written}
    metadata = adapter.metadata.model_copy(update={"files": files})
    unknown_before = {"head"} if metadata.head is None else None
    (folder / METADATA_FILE).write_text(metadata.model_dump_json(indent=2, exclude=unknown_before) + "\n")
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _publish(incoming: Path, directory: Path) -> None:
    names = [METADATA_FILE, *AdapterMetadata.model_validate_json((incoming / METADATA_FILE).read_text()).files]
    _remove_stale(directory, names)
    for name in names:
        (directory / name).parent.mkdir(exist_ok=True)
        copy = directory / f"{name}.new"
        with writing_to(copy):
            shutil.copyfile(incoming / name, copy)
        _sync(copy)
        os.replace(copy, directory / name)
    # renamed first, so that a half-removed folder is never taken for a complete one
    removed = Path(tempfile.mkdtemp(prefix=_REMOVED, dir=directory))
    os.replace(incoming, removed / "adapter")
    shutil.rmtree(removed)


def _remove_stale(directory: Path, names: list[str]) -> None:
    """An older adapter's files that are not among the new one's `names`; whatever else someone keeps there stays."""
    for name in set(PART_FILES).difference(names):
        (directory / name).unlink(missing_ok=True)
    folder = directory / LORA_DIR
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def load_adapter(directory: str | Path) -> Adapter:
    """Reads an adapter: a directory, one that ships with the package, by its name, or one of the Hugging Face hub.

    Args:
        directory: what is there on the disk comes first, then packaged names, then `user/name` or
            `user/name@revision` on the hub.

    Raises:
        AdapterError: if it is missing, incomplete, damaged, foreign or of a later format.
    """
    if not isinstance(directory, str | os.PathLike):
        raise AdapterError(f"directory: expected the path of an adapter, found {shown(directory)}")
    folder = folder_of(directory)
    try:
        found = None if folder.is_dir() else _what(folder)
    except OSError as error:  # of a name that no file system takes
        found = error.strerror
    if found is not None:
        meant = _hint(str(directory)) if found == "nothing" else ""
        raise AdapterError(f"{short(str(directory), 200)}: expected an adapter directory, found {found}{meant}")
    root = folder / _INCOMING if (folder / _INCOMING).is_dir() else folder
    metadata = _read_metadata(root)
    for name, expected in metadata.files.items():
        if not (root / name).is_file():
            raise AdapterError(f"{root / name}: expected a file of the adapter, found {_what(root / name)}")
        if file_sha256(root / name) != expected:
            raise AdapterError(
                f"{root / name}: expected sha256 {expected[:12]}, found {file_sha256(root / name)[:12]}: "
                "the file is truncated or was changed"
            )
    masks = lora = head = None
    if EMBEDDINGS_FILE in metadata.files:
        tensors = _read_tensors(root / EMBEDDINGS_FILE)
        if set(tensors) != {"mask_embeddings"}:
            raise AdapterError(f"{root / EMBEDDINGS_FILE}: expected mask_embeddings, found {shown(sorted(tensors))}")
        masks = tensors["mask_embeddings"]
    if LORA_WEIGHTS_FILE in metadata.files:
        lora = _read_lora(root)
    if HEAD_FILE in metadata.files:
        head = _read_tensors(root / HEAD_FILE)
    return Adapter(masks, metadata, lora, head)


def _hint(name: str) -> str:
    """What may have been meant by a name that nothing has."""
    if is_packaged_base(name):
        return _IS_A_BASE
    near = difflib.get_close_matches(name, PACKAGED_ADAPTERS, n=1)
    near += [adapter for adapter in PACKAGED_ADAPTERS if name.startswith(adapter)]
    return f"; {near[0]} is an adapter that ships" if near else ""


def folder_of(directory: str | os.PathLike[str]) -> Path:
    """Where an adapter's files are, whether anything is there or not; of one of the hub they are brought first.

    Raises:
        AdapterError: if the hub has no such adapter.
    """
    name = hub_name(directory)
    return adapter_folder(directory) if name is None else _from_hub(name)


def _from_hub(name: HubName) -> Path:
    """The folder of an adapter's files in the hub's cache, all of one commit; no other file is asked for."""
    folder = hub_file(name, METADATA_FILE).parent
    files = _read_metadata(folder).files
    foreign = sorted(set(files).difference(PART_FILES))
    if foreign:
        raise AdapterError(
            f"{name}: {METADATA_FILE}: expected files of {', '.join(PART_FILES)}, found {shown(foreign[0])}"
        )
    for file in files:
        hub_file(HubName(name.repo, revision=folder.name), file)
    return folder


def _read_metadata(root: Path) -> AdapterMetadata:
    path = root / METADATA_FILE
    if not path.is_file():
        names = ", ".join(sorted(p.name for p in root.iterdir())[:5]) or "an empty directory"
        meant = _IS_A_BASE if (root / "config.json").is_file() else ""
        raise AdapterError(f"{root}: expected an adapter directory with {METADATA_FILE}, found {names}{meant}")
    try:
        raw = read_object(path)
        version = raw.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"{path}: expected format_version {FORMAT_VERSION}, found {shown(version)}")
        metadata = AdapterMetadata.model_validate(raw)
    except ValidationError as error:
        raise AdapterError(f"{path}: {problem(error.errors()[0])}") from None
    except (OSError, ValueError) as error:
        raise AdapterError(str(error)) from None
    parts = {EMBEDDINGS_FILE: metadata.draft_input == MASK_EMBEDDINGS, HEAD_FILE: metadata.head is not None}
    for name, needed in parts.items():
        if needed and name not in metadata.files:
            raise AdapterError(f"{path}: expected {name} among its files, found {shown(sorted(metadata.files))}")
    outside = [name for name in metadata.files if not is_inside(name)]
    if outside:
        raise AdapterError(f"{path}: expected files inside the adapter directory, found {shown(outside[0])}")
    return metadata


def _read_lora(root: Path) -> LoraWeights:
    path = root / LORA_CONFIG_FILE
    tensors = _read_tensors(root / LORA_WEIGHTS_FILE)
    try:
        config = read_object(path)
    except OSError as error:
        raise AdapterError(f"{path}: expected the LoRA's configuration, found {error.strerror}") from None
    except ValueError as error:
        raise AdapterError(str(error)) from None
    try:
        lora = LoraWeights(config, tensors)
        lora.pairs()
    except ValueError as error:
        raise AdapterError(f"{path}: {error}") from None
    return lora


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: expected a safetensors file, found {first_line(error)[:120]}") from None


def _what(path: Path) -> str:
    return "a file" if path.is_file() else "a directory" if path.is_dir() else "nothing"
