"""Adapters that ship with the package, by name.

Knows where they lie, nothing of what is in them.
"""

import os
from pathlib import Path

from pardec.adapters.hub import hub_name
from pardec.run import cache_folder

PACKAGED_ADAPTERS = ("smollm2", "smollm2_embeddings")


def adapter_folder(directory: str | os.PathLike[str]) -> Path:
    """The folder of an adapter: `directory` itself, or that of a packaged adapter if nothing else has its name."""
    folder = Path(directory)
    return _packaged(folder.name) if _is_packaged(folder) else folder


def is_packaged_base(name: str) -> bool:
    """Whether a model that adapters are trained for ships under this name."""
    return name.isprintable() and Path(name).name == name and (_packaged(name) / "config.json").is_file()


def tuned_folder(directory: str | os.PathLike[str]) -> Path:
    """Where `tuned.json` of an adapter is kept: in its folder; of a packaged one or one of the hub in the user's cache.

    What is installed or downloaded may be shared, read-only, or gone with the next version.
    """
    folder, name = Path(directory), hub_name(directory)
    if name is not None:
        return cache_folder() / "tuned" / name.repo.replace("/", "--")
    return cache_folder() / "tuned" / folder.name if _is_packaged(folder) else folder


def _is_packaged(folder: Path) -> bool:
    return str(folder) in PACKAGED_ADAPTERS and not os.path.lexists(folder)


def _packaged(name: str) -> Path:
    return Path(__file__).parents[1] / "assets" / name
