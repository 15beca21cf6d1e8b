"""Decodes with the pardec adapter that lies in this repository, exactly as the model alone would.

For `model.generate(..., custom_generate=REPOSITORY, trust_remote_code=True)`, and for models loaded from the
repository itself with `trust_remote_code=True`. Besides what `generate` takes: `num_speculative_tokens`, `mode`
(fused, two_pass, plain), `use_head`, and `adapter`, the folder of another adapter.
"""

import copy
import inspect
import os
from types import FrameType

from transformers import StoppingCriteriaList, StopStringCriteria

import pardec


class _Loaded(dict):
    """Models with their adapters, by folder; it stays behind where a model that keeps it is copied or pickled."""

    def __reduce_ex__(self, protocol):
        return dict, ()


def generate(inputs=None, *positional, model, adapter=None, custom_generate=None, streamer=None, **options):
    """What `model.generate` returns, decoded with the adapter."""
    plain = type(model).generate  # not model.generate, which may be this very function
    if positional:
        named = inspect.signature(plain).bind_partial(model, inputs, *positional).arguments
        streamer = named.pop("streamer", streamer)
        options |= {name: value for name, value in named.items() if name not in ("self", "inputs")}
    if custom_generate is not None:
        return plain(model, inputs, custom_generate=custom_generate, streamer=streamer, **options)
    # of neither would transformers tell what decodes, and with the second it would itself
    if options.get("assistant_model") is not None:
        raise ValueError("assistant_model: expected none, as the adapter drafts, found one")
    if options.get("cache_implementation") == "paged":
        raise ValueError("cache_implementation: expected one that the adapter drafts with, found 'paged'")
    _stop_at_strings(model, options)
    folder = adapter or _asked_for(inspect.currentframe()) or _loaded_from(model)
    if os.path.isdir(folder):
        folder = os.path.abspath(folder)  # as a name it may mean another one later
    loaded = model.__dict__.get("_pardec_adapters")
    if not isinstance(loaded, _Loaded):
        loaded = model.__dict__["_pardec_adapters"] = _Loaded()
    drafter = loaded.get(folder)
    if drafter is None:  # once, as it takes seconds
        drafter = loaded[folder] = pardec.load(folder, base=model)
    # transformers keeps a streamer to itself
    door = drafter if streamer is None else drafter.with_streamer(streamer)
    return plain(model, inputs, custom_generate=door, **options)


def _stop_at_strings(model, options):
    """Makes a criterion of `stop_strings`: transformers hands a tokenizer to its own ways of decoding alone."""
    tokenizer, config = options.pop("tokenizer", None), options.get("generation_config")
    strings = options.pop("stop_strings", None)
    if model.generation_config.stop_strings is not None:
        raise ValueError("stop_strings: expected them in the call, found some in the model's own generation_config")
    if config is not None and config.stop_strings is not None:
        strings = strings or config.stop_strings
        options["generation_config"] = config = copy.deepcopy(config)
        config.stop_strings = None
    if strings is None:
        return
    if tokenizer is None:
        raise ValueError("stop_strings: expected the model's tokenizer in `tokenizer` as well, found none")
    stops = StopStringCriteria(tokenizer, strings)
    options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or ()), stops])


def _loaded_from(model) -> str:
    """Where the model came from, of the hub the same commit, so that the adapter beside it is the one that is used."""
    name, commit = model.config._name_or_path, getattr(model.config, "_commit_hash", None)
    return name if commit is None or os.path.isdir(name) else f"{name}@{commit}"


def _asked_for(frame: FrameType | None) -> str | None:
    """The `custom_generate` that transformers was called with: it runs a copy of this file, and tells it no path."""
    caller = None if frame is None else frame.f_back
    if caller is None or caller.f_globals.get("__name__") != "transformers.generation.utils":
        return None
    asked = caller.f_locals.get("custom_generate")
    return asked if isinstance(asked, str) else None
