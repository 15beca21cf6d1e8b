"""Source code that every Python brings with it, as text: the standard library, and the installed packages.

Split by the hash of each file's path, so that everyone with the same files has the same splits.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

STDLIB = "python-stdlib"
PACKAGES = "python-packages"
TRAIN, VALIDATION, TEST = "train", "validation", "test"
_LEFT_OUT = frozenset({"encodings", "site-packages", "__pycache__"})


def python_files(folder: Path) -> list[Path]:
    """Python sources below `folder`, 200 B to 400 kB, without `encodings` and `site-packages`, sorted."""
    found: list[Path] = []
    for where, folders, names in os.walk(folder):
        # not even looked into: whole packages may lie in the folder of the standard library
        folders[:] = [one for one in folders if one not in _LEFT_OUT]
        found += (Path(where, name) for name in names if name.endswith(".py"))
    return sorted(path for path in found if path.is_file() and 200 <= path.stat().st_size <= 400_000)


def split_of(relative_path: str) -> str:
    """The split of a source file by the hash of its path: about 4 % are held out, half validation, half test."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    if digest[0] >= 10:
        return TRAIN
    return VALIDATION if digest[1] % 2 == 0 else TEST


def python_sources(folder: Path, split: str) -> Iterator[str]:
    """Texts of a split of the Python sources below `folder`; files that are not UTF-8 are left out."""
    for path in python_files(folder):
        if split_of(path.relative_to(folder).as_posix()) == split:
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def stdlib_folder() -> Path:
    """The library of the running interpreter."""
    return Path(sysconfig.get_paths()["stdlib"])


def source_folder(path: str) -> Path | None:
    """The folder behind `python-stdlib`, or behind `python-packages`, what is installed for the running interpreter.

    Both are split by the hash of each file's path. None for any other path.
    """
    if path == STDLIB:
        return stdlib_folder()
    return Path(sysconfig.get_paths()["purelib"]) if path == PACKAGES else None
