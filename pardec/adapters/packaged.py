"""Adapters that ship with the package, by name.

Knows where they lie, nothing of what is in them.
"""

import os
from pathlib import Path

from pardec.run import cache_folder

PACKAGED_ADAPTERS = ("smollm2", "smollm2_embeddings")


def adapter_folder(directory: str | os.PathLike[str]) -> Path:
    """The folder of an adapter: `directory` itself, or that of a packaged adapter if nothing else has its name."""
    folder = Path(directory)
    return _packaged(folder.name) if _is_packaged(folder) else folder


def tuned_folder(directory: str | os.PathLike[str]) -> Path:
    """Where `tuned.json` of an adapter is kept: in its folder, or in the user's cache for a packaged one.

    What is installed may be shared, read-only, or gone with the next version.
    """
    folder = Path(directory)
    return cache_folder() / "tuned" / folder.name if _is_packaged(folder) else folder


def _is_packaged(folder: Path) -> bool:
    return str(folder) in PACKAGED_ADAPTERS and not os.path.lexists(folder)


def _packaged(name: str) -> Path:
    return Path(__file__).parents[1] / "assets" / name
