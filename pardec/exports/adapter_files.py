"""The adapter's own files, where an engine runs pardec: nothing in them tells of the trainer's machine."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from pardec.adapters.adapter import Adapter
from pardec.adapters.files import save_adapter
from pardec.training.model_folder import without_folder


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Saves the adapter without the folders of the machine that trained it."""
    save_adapter(_to_be_shown(adapter), folder)


def _to_be_shown(adapter: Adapter) -> Adapter:
    metadata, lora = adapter.metadata, adapter.lora
    shown = metadata.model_copy(update={"training": _without_folders(metadata.training)})
    if lora is not None:
        lora = replace(lora, config=lora.config | {"base_model_name_or_path": metadata.base.name})
    return replace(adapter, metadata=shown, lora=lora)


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_folders(one) for one in value]
    if not isinstance(value, str):
        return value
    try:
        words = shlex.split(value)
    except ValueError:  # a text that is no command
        words = []
    if len(words) < 2:
        return without_folder(value)
    bare = [without_folder(word) for word in words]
    return value if bare == words else shlex.join(bare)
