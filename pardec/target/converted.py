"""GGUF files as bases: converted once into a folder of the user's cache, which loads like any other model.

A conversion holds a lock, is written aside and renamed: a folder that is there is whole. Knows no adapter.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from tqdm import tqdm

from pardec.errors import first_line
from pardec.run import cache_folder, file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SOURCE_FILE = "source.json"
_FORMAT_VERSION = 1
_MAGIC = b"GGUF"
_SPARE_BYTES = 2**26  # beside the weights: tokenizer, configuration, the file system's own


def packaged_gguf(package: str, file_name: str, sha256: str, install: str) -> Path:
    """A GGUF file that an installed package holds; the package itself is not imported.

    Args:
        package: as Python imports it.
        file_name: in its folder.
        sha256: of the file.
        install: the command that brings it.

    Raises:
        ValueError: if it is not installed, with that command, or holds another file.
    """
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else spec.submodule_search_locations or []
    file = next((Path(folder) / file_name for folder in folders if (Path(folder) / file_name).is_file()), None)
    if file is None:
        raise ValueError(f"base: expected the package {package} with {file_name}, found it missing ({install})")
    if not _is_converted(file) and (found := file_sha256(file)) != sha256:
        raise ValueError(f"base {str(file)!r}: expected sha256 {sha256[:12]}, found {found[:12]}")
    return file


def converted_folder(file: Path) -> Path:
    """The folder of a GGUF file's conversion, made now if there is none.

    Raises:
        ValueError: for a file that is not GGUF or holds a model that transformers cannot read, a missing package, or
            a disk that is too full.
    """
    if not file.is_file():
        raise ValueError(f"base {str(file)!r}: expected a GGUF file, found nothing there")
    folder = _folder_of(file)
    if _is_converted(file):
        return folder
    with file.open("rb") as opened:
        magic = opened.read(len(_MAGIC))
    if magic != _MAGIC:
        raise ValueError(f"base {str(file)!r}: expected a GGUF file, found one that begins with {magic!r}")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("base: expected the package gguf for GGUF files, found it missing (pip install gguf)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # another process may have converted it meanwhile
        if not _is_converted(file):
            for left in folder.parent.glob(f"{folder.name}.writing-*"):  # by a process that was killed
                shutil.rmtree(left)
            if folder.is_symlink():  # to a conversion that is gone
                folder.unlink()
            sha256 = file_sha256(file)
            same = _same_elsewhere(folder, sha256)
            if same is None:
                _convert(file, folder, sha256)
            else:
                folder.symlink_to(same.name, target_is_directory=True)
    return folder


def lone_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds one and no `config.json`, None for any other folder.

    Raises:
        ValueError: for a folder with several, naming them.
    """
    try:
        found = [] if (folder / "config.json").exists() else sorted(folder.glob("*.gguf"))
    except OSError:  # no name that a file may have
        return None
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"base {str(folder)!r}: expected the path of one GGUF file, found a folder with {names}")
    return found[0] if found else None


def refuse_missing_weights(name: str, loading_info: Mapping[str, Any]) -> None:
    """Refuses a model that transformers has given random numbers where its checkpoint holds none.

    Raises:
        ValueError: naming the first of them.
    """
    missing = sorted(loading_info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"base {name!r}: expected all weights, found none for {missing[0]}{more}")


def _folder_of(file: Path) -> Path:
    facts = file.stat()
    key = f"{file.resolve()}\n{facts.st_size}\n{facts.st_mtime_ns}\n{_FORMAT_VERSION}"
    return cache_folder() / "gguf" / f"{file.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def _is_converted(file: Path) -> bool:
    return (_folder_of(file) / SOURCE_FILE).is_file()


def _same_elsewhere(folder: Path, sha256: str) -> Path | None:
    """A conversion of the same bytes from another place or time, as every environment brings its own copy of them."""
    for source in folder.parent.glob(f"*/{SOURCE_FILE}"):
        # a name in between leads on to the folder that holds the numbers, and could be gone before it
        if source.parent.is_symlink() or ".writing-" in source.parent.name:
            continue
        try:
            found = json.loads(source.read_text())
        except (OSError, ValueError):
            continue
        if (found.get("sha256"), found.get("format_version")) == (sha256, _FORMAT_VERSION):
            return source.parent
    return None


def _convert(file: Path, folder: Path, sha256: str) -> None:
    aside = folder.with_name(f"{folder.name}.writing-{os.getpid()}")
    tqdm.write(f"converting {file.name} once, into {folder}", file=sys.stderr)  # shells ask by python for the folder
    try:
        base = _read(file)
        _check_room(file, base)
        base.save_pretrained(aside)
        _save_tokenizer(file, aside)
        source = {"file": str(file.resolve()), "sha256": sha256, "format_version": _FORMAT_VERSION}
        (aside / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n")
        for written in aside.iterdir():
            with written.open("rb") as opened:
                os.fsync(opened.fileno())
        os.replace(aside, folder)
    except OSError as error:
        raise ValueError(f"base {str(file)!r}: cannot be converted into {folder}: {first_line(error)}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _read(file: Path) -> "PreTrainedModel":
    """The model in float32, as if it had never been quantised."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        base, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # whatever the readers of many architectures raise
        raise ValueError(
            f"base {str(file)!r}: expected a model that transformers can read, found: {first_line(error)}"
        ) from None
    refuse_missing_weights(str(file), info)
    # what is written are plain weights
    base.hf_quantizer = None
    vars(base.config).pop("quantization_config", None)
    return base


def _check_room(file: Path, base: "PreTrainedModel") -> None:
    needed = sum(parameter.nbytes for parameter in base.parameters()) + _SPARE_BYTES
    folder = _folder_of(file).parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{folder}: expected {needed / 2**20:,.0f} MiB free, found {free / 2**20:,.0f} MiB")


def _save_tokenizer(file: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    except Exception as error:  # whatever the readers of many tokenizers raise
        raise ValueError(
            f"base {str(file)!r}: expected a tokenizer that transformers can read, found: {first_line(error)}"
        ) from None
