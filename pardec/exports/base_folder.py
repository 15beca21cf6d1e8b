"""The base for doors whose form holds its weights or its files: found, loaded, known to be the adapter's own."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from pardec.adapters.adapter import Adapter
from pardec.adapters.json_files import read_object
from pardec.loading import refuse_another_base
from pardec.target.base import load_base, load_tokenizer, resolve_base

CONFIG_FILE = "config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json")
_BESIDE = (*_TOKENIZER, "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class LoadedBase:
    """A base in memory, on the CPU in its own dtype, and where its files are.

    Attributes:
        folder: with config.json, weights and tokenizer.
        model: the base; a door may change it.
        tokenizer: None if it came without one.
    """

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None


def load_own_base(directory: str, adapter: Adapter, name: str | None) -> LoadedBase:
    """The base of an adapter.

    Args:
        directory: of the adapter, for what is said.
        adapter: whose base it must be.
        name: as `pardec.load` takes it; default the base that the adapter names.

    Raises:
        ValueError: if it is not found.
        AdapterError: if it is another one.
    """
    reference = adapter.metadata.base
    revision = reference.revision if name is None else None
    name = reference.name if name is None else name
    model = load_base(name, device="cpu", dtype="auto", revision=revision)
    tokenizer = load_tokenizer(name, revision=revision)
    refuse_another_base(directory, adapter, model, tokenizer)
    config = cached_file(resolve_base(name), CONFIG_FILE, revision=revision)  # loaded already, so it is at hand
    assert config is not None
    folder = Path(config).parent
    if "auto_map" in read_object(folder / CONFIG_FILE):
        raise ValueError(f"base {name!r}: expected a model of transformers itself, found code of its own (auto_map)")
    return LoadedBase(folder, model, tokenizer)


def copy_weights(base: LoadedBase, folder: Path) -> None:
    """Copies config.json and the weights.

    Raises:
        ValueError: if they are no safetensors.
    """
    names = [CONFIG_FILE]
    if (base.folder / _INDEX).is_file():
        names += [_INDEX, *sorted(set(read_object(base.folder / _INDEX)["weight_map"].values()))]
    elif (base.folder / _WEIGHTS).is_file():
        names.append(_WEIGHTS)
    else:
        raise ValueError(f"{base.folder}: expected {_WEIGHTS} or its index, found neither")
    for name in names:
        shutil.copyfile(base.folder / name, folder / name)


def copy_what_is_beside(base: LoadedBase, folder: Path) -> None:
    """Copies the tokenizer, the chat template, generation_config.json and the licence."""
    for path in sorted({path for pattern in _BESIDE for path in base.folder.glob(pattern)}):
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)


def write_config(base: LoadedBase, folder: Path, **changes: object) -> None:
    """Writes the base's own config.json with some keys changed."""
    config = read_object(base.folder / CONFIG_FILE) | changes
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
