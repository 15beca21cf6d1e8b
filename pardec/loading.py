"""`pardec.load`: an adapter and the base it belongs to."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pardec.adapters.adapter import Adapter, AdapterError
from pardec.adapters.files import load_adapter
from pardec.adapters.hub import HubName, hub_name
from pardec.adapters.packaged import tuned_folder
from pardec.adapters.tuned import TUNED_FILE, TunedChoice, fastest_dtype, read_tuned, shipped_choice
from pardec.arguments import flag, known_dtype
from pardec.decoding.probing.probe import probe, probe_head, probe_lora
from pardec.errors import short, shown
from pardec.layout import PLAIN
from pardec.model import SelfSpeculativeModel
from pardec.run import device_name, has_bfloat16
from pardec.target.base import device_or_default, load_base, load_tokenizer, refuse_by_config
from pardec.target.fingerprint import differences, fingerprint, shape_difference
from pardec.target.forward import UnsupportedModelError, embedding_weight
from pardec.target.placement import META, is_offloaded, refuse_by_placement

TUNED = "tuned"  # instead of a dtype


def load(
    directory: str | Path,
    base: str | PreTrainedModel | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    compile: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> SelfSpeculativeModel:
    """Loads an adapter and its base, and refuses pairs that do not belong together or cannot be exact.

    Args:
        directory: of the adapter; or its name on the Hugging Face hub, `user/name` or `user/name@revision`, unless
            there is a folder of that name.
        base: folder, hub name or loaded model; default the base that the adapter names.
        device: default CUDA where there is one, else the CPU.
        dtype: default float32 on a CPU, the checkpoint's own on CUDA; `tuned` for the one in which `pardec tune` found
            this adapter fastest on this device.
        attn_implementation: `sdpa` or `eager`; default what transformers chooses.
        compile: compile the steps with torch.compile (inductor), for each bucket of 256 tokens and more anew: the
            first call of a bucket takes up to minutes, less where torch has it in its cache, later ones are faster.
        trust_remote_code: run code that comes with the base.
        revision: branch, tag or commit of the adapter on the hub; the same as `user/name@revision`.

    Raises:
        ValueError: for arguments of another kind, and a device or dtype that is none here.
        AdapterError: for an unusable adapter or another base than it was trained for, naming what differs.
        UnsupportedModelError: for a base that cannot be decoded exactly.
    """
    for name, value in (("compile", compile), ("trust_remote_code", trust_remote_code)):
        flag(name, value)
    if base is not None and not isinstance(base, str | PreTrainedModel):
        raise ValueError(f"base: expected a folder, a hub name or a loaded model, found {_kind(base)}")
    directory = directory if revision is None else _at_revision(directory, revision)
    adapter = load_adapter(directory)
    reference = adapter.metadata.base
    if isinstance(dtype, str) and dtype == TUNED:
        dtype = _tuned_dtype(directory, adapter, device, compile)
    options = {"device": device, "dtype": dtype, "attn_implementation": attn_implementation}
    if base is None or isinstance(base, str):
        name = reference.name if base is None else base
        source = {
            "revision": reference.revision if base is None else None,
            "trust_remote_code": trust_remote_code,
        }
        loaded, tokenizer = load_base(name, **options, **source), load_tokenizer(name, **source)
    else:
        _check_loaded(base, options)
        loaded, tokenizer = base, load_tokenizer(base.config._name_or_path or reference.name)
    refuse_by_placement(loaded)
    if compile and is_offloaded(loaded):
        raise ValueError("compile: expected a base in memory, found offloaded layers (device_map)")
    refuse_another_base(directory, adapter, loaded, tokenizer)
    model = SelfSpeculativeModel(loaded, tokenizer, adapter, compile=compile)
    model.engines.choices = _nearest_choices(model, adapter, directory)
    _check_choices(directory, adapter, model.engines.choices)
    kind = {"cpu": "CPU", "cuda": "GPU"}.get(loaded.device.type)
    if kind and model.target.dtype == torch.bfloat16 and not has_bfloat16(loaded.device):
        told = f"dtype: expected a {kind} with instructions for bfloat16, found none: it is slow here"
        warnings.warn(told, stacklevel=2)
    masks, D = adapter.mask_embeddings, model.target.embedding_dim
    if masks is not None and masks.shape[1] != D:
        raise AdapterError(f"{directory}: mask embeddings: expected width {D}, found {masks.shape[1]}")
    _probe(model)
    return model


def _nearest_choices(model: SelfSpeculativeModel, adapter: Adapter, directory: str | Path) -> list[TunedChoice]:
    """What was tuned here, at least not compiled or only compiled, or else before the adapter shipped: all K drafts
    would slow any CPU down, and without instructions for 16 bits so would any draft at all."""
    device, dtype, files = model.target.device, model.target.dtype, adapter.metadata.files
    where = device_name(device)
    found = read_tuned(directory, where, dtype, model.compile, files=files)
    found = found or read_tuned(directory, where, dtype, not model.compile, files=files)
    shipped = None if found else shipped_choice(directory, where, dtype, files=files)
    if shipped is not None and device.type == "cpu" and dtype.itemsize == 2 and not has_bfloat16(device):
        shipped = replace(shipped, mode="plain", block_lengths=PLAIN, copy_tokens=0, tree=None)
    return found if shipped is None else [shipped]


def _kind(base: object) -> str:
    """What stands in place of a base; PEFT's wrapper, which is no model of transformers, by a way out."""
    if callable(getattr(base, "get_base_model", None)):
        return f"{type(base).__name__}, whose get_base_model() is one, its adapters on it"
    return shown(base)


def _at_revision(directory: object, revision: object) -> str:
    """The adapter's name on the hub with its revision.

    Raises:
        ValueError: if it can have none.
    """
    name = hub_name(directory) if isinstance(directory, str) else None
    if name is None or name.revision is not None:
        raise ValueError(
            "revision: expected None unless the adapter is user/name on the hub and no folder here has that name, "
            f"found {shown(revision)} for {shown(directory)}"
        )
    whole = f"{name}@{revision}"
    if not isinstance(revision, str) or HubName.parse(whole) is None:
        raise ValueError(f"revision: expected a branch, a tag or a commit, found {shown(revision)}")
    return whole


def _tuned_dtype(
    directory: str | Path, adapter: Adapter, device: str | torch.device | None, compile: bool
) -> torch.dtype:
    """The dtype in which the adapter was fastest on the device.

    Raises:
        ValueError: where dtypes were not compared there.
    """
    name = device_name(device_or_default(device))
    found = fastest_dtype(directory, name, compile, files=adapter.metadata.files)
    if found is None:
        raise ValueError(
            f"dtype: expected dtypes that `pardec tune {directory} --dtype float32,bfloat16` has compared on this "
            f"device ({name}), found none in {tuned_folder(directory) / TUNED_FILE}"
        )
    return known_dtype(found)


def refuse_another_base(
    directory: str | Path, adapter: Adapter, loaded: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Raises AdapterError, naming what differs, unless `loaded` is the base that the adapter was trained for."""
    found = fingerprint(loaded, tokenizer)
    wrong = differences(adapter.metadata.fingerprint, found, embedding_weight(loaded).dtype)
    if wrong:
        more = [f"and {len(wrong) - 2} more"] if len(wrong) > 2 else []
        told, name = "; ".join([*wrong[:2], *more]), short(adapter.metadata.base.name)
        alike = shape_difference(adapter.metadata.fingerprint, found) is None
        hint = "; adapter.transfer=true in a recipe that starts from it moves it to this one" if alike else ""
        raise AdapterError(f"{directory}: the adapter belongs to another base ({name}): {told}{hint}")


def _check_choices(directory: str | Path, adapter: Adapter, choices: Sequence[TunedChoice]) -> None:
    """Raises ValueError, naming the file, if one of them drafts more than the adapter can."""
    K, most = adapter.metadata.num_speculative_tokens, max((one.num_speculative_tokens for one in choices), default=0)
    if adapter.has_distinct_masks and most > K:
        raise ValueError(
            f"{tuned_folder(directory) / TUNED_FILE}: expected choices of at most {K} drafts, as the adapter has mask "
            f"tokens, found {most}; remove it and tune again"
        )


def _probe(model: SelfSpeculativeModel) -> None:
    """Runs the model to see that it can be decoded exactly, and by its sampler head if it has one."""
    head = model.engines.head
    if head is not None and head.tap.output_embeddings.device == META:
        raise UnsupportedModelError("base: expected the output head in memory for a sampler head, found it offloaded")
    lengths = probe(model.target).lengths
    if lengths.skipped:
        warnings.warn(
            f"{model.base_model.config.model_type}: not compared with the base's own decoding behind "
            f"{', '.join(map(str, lengths.skipped))} tokens, for want of memory or as it cannot be run there",
            stacklevel=3,
        )
    if head is not None:
        probe_head(model.target, head.tap)
    if model.engines.gate is not None:
        probe_lora(model.target, model.engines.gate)


def _check_loaded(base: PreTrainedModel, options: Mapping[str, object]) -> None:
    for option, value in options.items():
        if value is not None:
            raise ValueError(f"{option}: expected None for a base that is already loaded, found {value}")
    if base.training:
        raise ValueError("base: expected a model in eval mode (base.eval()), found it in training mode")
    refuse_by_config(base.config)
