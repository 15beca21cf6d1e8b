"""`pardec export`: an adapter in the form of an engine, in a folder that is whole or not there.

Knows the order of things, no engine. What is written is the engine's files, a page that says how to serve them, and
`export.json`, by which `check_export` sees later what has changed.
"""

import os
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import cast

from pardec.adapters.adapter import Adapter
from pardec.adapters.files import METADATA_FILE, folder_of, load_adapter
from pardec.adapters.tuned import TUNED_FILE
from pardec.arguments import one_of
from pardec.exports.base_folder import LoadedBase, load_own_base
from pardec.exports.door import Door
from pardec.exports.doors import door_of, refuse
from pardec.exports.page import PAGE_FILE, page_of
from pardec.exports.public_form import public_form
from pardec.exports.record import (
    DOOR_NAMES,
    RECORD_FILE,
    DoorName,
    ExportRecord,
    expected_acceptance,
    read_record,
    record_digest,
    write_record,
)
from pardec.exports.whole_folder import made_whole, refuse_taken
from pardec.run import file_sha256

_OWN = (RECORD_FILE, TUNED_FILE)  # of the folder itself, and of `pardec tune` on it
_READ_BY_ENGINES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".json", ".py", ".jinja", ".txt", ".model")


@dataclass(frozen=True)
class Checked:
    """An exported folder as it is.

    Attributes:
        record: its `export.json`.
        problems: what is changed or wrong, a line each.
        notes: what is worth knowing, a line each.
        commands: that serve it, here.
        about: a paragraph on how it is served, as on its page; empty where something is wrong.
    """

    record: ExportRecord
    problems: list[str]
    notes: list[str]
    commands: str
    about: str


def export_adapter(
    directory: str | Path, to: str, output: str | Path, *, base: str | None = None, with_base: bool = False
) -> Checked:
    """Writes an adapter in the form of an engine, and checks what was written.

    Args:
        directory: of the adapter, or its name, as `pardec.load` takes it.
        to: a door: `vllm`, `vllm-stock`, `sglang`, `transformers` or `peft`.
        output: the folder to make.
        base: the base to name, and to load where a form holds it; default the one that the adapter names.
        with_base: put the base's own files beside the adapter; `transformers` only.

    Raises:
        ValueError: for an unknown door, an adapter that it cannot serve, a base that does not fit, or a folder that
            is there already or cannot be made; nothing is written.
        OSError: if there is no room; nothing is left behind.
    """
    door = door_of(cast(DoorName, one_of("--to", to, DOOR_NAMES)))
    folder, output = folder_of(directory), Path(os.path.normpath(output))
    adapter = load_adapter(folder)
    refuse(adapter, door)
    if with_base and door.name != "transformers":
        raise ValueError(f"--with-base: expected --to transformers, found --to {door.name}")
    refuse_taken(output)
    wrong = door.path_problem(output)
    if wrong is not None:
        raise ValueError(wrong)
    shown = public_form(adapter, base)
    loaded = load_own_base(str(directory), adapter, base) if door.needs_base or with_base else None
    sources = {METADATA_FILE: file_sha256(folder / METADATA_FILE), **adapter.metadata.files}
    _write(door, shown, loaded, record_of(shown, door, sources=sources, with_base=with_base), output)
    done, own = check_export(output), adapter.metadata.base
    here = own if base is None else own.model_copy(update={"name": base})
    if Path(here.name).exists():  # what is said here may name this machine's folders, the page may not
        done = replace(done, commands=door.commands(done.record.model_copy(update={"base": here}), str(output)))
    return done


def _write(door: Door, adapter: Adapter, loaded: LoadedBase | None, record: ExportRecord, output: Path) -> None:
    with made_whole(output) as aside:
        door.write(adapter, loaded, aside)
        (aside / PAGE_FILE).write_text(page_of(record, door, aside, output.name), encoding="utf-8")
        write_record(record.model_copy(update={"files": _digests(aside)}), aside)


def check_export(folder: str | Path) -> Checked:
    """Compares an exported folder with its `export.json` and with the rules of its engine.

    Raises:
        ValueError: if it is no exported folder.
    """
    folder = Path(folder)
    record = read_record(folder)
    door = door_of(record.door)
    problems = _changes(folder, record) or door.problems(folder, record)
    problems += [found for found in (door.path_problem(folder),) if found]
    notes = [found for found in (_other_version(door),) if found]
    about = "" if problems else door.notes(record, folder)
    return Checked(record, problems, notes, door.commands(record, str(folder)), about)


def record_of(
    adapter: Adapter, door: Door, *, sources: dict[str, str] | None = None, with_base: bool = False
) -> ExportRecord:
    """What `export.json` says before there are files; arguments as in `ExportRecord`."""
    metadata, acceptance = adapter.metadata, None
    if door.counted is not None:
        acceptance = expected_acceptance(metadata, door.counted, door.exact_tokens)
    return ExportRecord(
        door=door.name,
        engine=door.engine,
        checked_against=door.tested,
        num_speculative_tokens=metadata.num_speculative_tokens,
        base=metadata.base,
        architecture=metadata.fingerprint.architecture,
        with_base=with_base,
        acceptance=acceptance,
        sources=sources or {},
    )


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def _changes(folder: Path, record: ExportRecord) -> list[str]:
    """Files that are missing, changed, or there beside those that were written, where an engine would read them."""
    found = []
    if (digest := record_digest(folder)) != record.own_sha256:
        found.append(_changed(folder / RECORD_FILE, record.own_sha256, digest))
    for name, expected in record.files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{path}: expected a file of the export, found none")
        elif (digest := file_sha256(path)) != expected:
            found.append(_changed(path, expected, digest))
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix in _READ_BY_ENGINES and name not in (*record.files, *_OWN):
            found.append(f"{path}: expected only files of the export, found one more")
    return found


def _changed(path: Path, expected: str, found: str) -> str:
    return f"{path}: expected sha256 {expected[:12]}, found {found[:12]}: the file was changed"


def _other_version(door: Door) -> str | None:
    try:
        installed = version(door.engine)
    except PackageNotFoundError:
        return None
    if installed.partition("+")[0] == door.tested:  # behind the plus stands for what device it was built
        return None
    return f"{door.engine}: expected {door.tested}, which this form was checked against, found {installed}; going on"
