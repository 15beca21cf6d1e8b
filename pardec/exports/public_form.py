"""An adapter as others may read it: no folder of the machine that trained it is named.

Knows what an adapter says of itself, not who will read it.
"""

import shlex
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from pardec.adapters.adapter import Adapter, BaseReference
from pardec.errors import problem
from pardec.training.model_folder import without_folder


def public_form(adapter: Adapter, base: str | None = None) -> Adapter:
    """The adapter without the folders of its machine.

    Args:
        adapter: any.
        base: by which its base is called; default the name that it has, of a folder or file the last part.

    Raises:
        ValueError: for a name that no base can have.
    """
    metadata, lora = adapter.metadata, adapter.lora
    reference = metadata.base if base is None else _reference(base)
    changes = {
        "base": reference.model_copy(update={"name": reference.public_name}),
        "training": _without_folders(metadata.training),
        "measured": _without_folders(metadata.measured),
    }
    if lora is not None:
        lora = replace(lora, config=lora.config | {"base_model_name_or_path": changes["base"].name})
    return replace(adapter, metadata=metadata.model_copy(update=changes), lora=lora)


def _reference(name: str) -> BaseReference:
    try:
        return BaseReference(name=name)
    except ValidationError as error:
        raise ValueError(problem(error.errors()[0], "base")) from None


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
