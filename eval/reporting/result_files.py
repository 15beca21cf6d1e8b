"""Where the scripts of this folder leave their results, each file whole or not at all: JSON, Markdown, a picture."""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pardec.run import command_line, device_name, git_commit, library_versions, written_aside


def output_stem(kind: str, output: str | None, quick: bool, device: torch.device) -> Path:
    """Path of the results without suffix.

    Args:
        kind: of results, such as `speed`.
        output: what was asked for, if anything.
        quick: a first look must not overwrite results that are kept.
        device: part of the default name.
    """
    if output is not None:
        return Path(output.removesuffix(".json"))
    if quick:
        return Path(f"runs/{kind}_quick")
    name = device_name(device) if device.type == "cuda" else device.type
    return Path("eval/results") / f"{kind}_{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}"


def provenance(device: torch.device) -> dict[str, Any]:
    """Where figures come from: device, versions, commit and command."""
    return {
        "device": device_name(device),
        "versions": library_versions(),
        "git_commit": git_commit(),
        "command": command_line(),
    }


def write_files(result: dict, stem: Path, markdown: str, draw: Callable[[Path], None]) -> None:
    """Writes `stem`.json, .md and .png; `draw` makes the picture at the path that it is given.

    Without matplotlib there is no picture, which is said once.
    """
    write_page(result, stem, markdown)
    if not _can_draw():
        return
    with written_aside(stem.with_name(stem.name + ".png")) as aside:
        draw(aside)


@cache
def _can_draw() -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        tqdm.write(f"no picture: {error}; pip install 'pardec[plots]' brings it")
        return False
    return True


def write_page(result: dict, stem: Path, markdown: str) -> None:
    """Writes `stem`.json and .md."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_json(result, stem.with_name(stem.name + ".json"))
    with written_aside(stem.with_name(stem.name + ".md")) as aside:
        aside.write_text(markdown)


def write_json(values: dict[str, Any], path: Path) -> None:
    """Replaces the file as a whole."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(values, indent=1) + "\n")
