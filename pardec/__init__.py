"""pardec: learned mask tokens let a frozen causal language model draft its own future tokens, exactly verified."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pardec.adapters.adapter import Adapter, AdapterError
    from pardec.decoding.kept_cache import KeptCache
    from pardec.decoding.output import GenerationOutput, StreamChunk
    from pardec.draft_tree import DraftTree, DynamicTree
    from pardec.loading import load
    from pardec.model import SelfSpeculativeModel
    from pardec.target.forward import UnsupportedModelError

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "AdapterError",
    "DraftTree",
    "DynamicTree",
    "GenerationOutput",
    "KeptCache",
    "SelfSpeculativeModel",
    "StreamChunk",
    "UnsupportedModelError",
    "load",
]

_HOME = {
    "Adapter": "adapters.adapter",
    "AdapterError": "adapters.adapter",
    "DraftTree": "draft_tree",
    "DynamicTree": "draft_tree",
    "GenerationOutput": "decoding.output",
    "KeptCache": "decoding.kept_cache",
    "SelfSpeculativeModel": "model",
    "StreamChunk": "decoding.output",
    "UnsupportedModelError": "target.forward",
    "load": "loading",
}


def __dir__() -> list[str]:
    """What completion shows, public names that were not asked for yet among it."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str):
    """Imports the public names when they are asked for, so that `pardec --help` need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'pardec' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"pardec.{_HOME[name]}"), name)
