"""`pardec import`: a LoRA that was trained for SGLang's algorithm UNO becomes an adapter, tensor for tensor.

The way back of `to_sglang`: a folder of PEFT's whose LoRA acts at draft rows only, where random tokens stand.
"""

import os
from pathlib import Path

from pardec.adapters.adapter import UNIFORM_NOISE, Adapter, AdapterMetadata, BaseReference
from pardec.adapters.files import save_adapter
from pardec.adapters.gated_lora import LoraGate, LoraWeights
from pardec.arguments import integer
from pardec.exports.lora_folder import LORA_CONFIG, LORA_WEIGHTS, read_lora
from pardec.exports.public_form import public_form
from pardec.exports.to_sglang import wrong_name
from pardec.exports.whole_folder import made_whole, refuse_taken
from pardec.layout import MAX_SPECULATIVE_TOKENS
from pardec.run import file_sha256
from pardec.target.base import load_base, load_tokenizer
from pardec.target.fingerprint import fingerprint


def import_uno(source: str | Path, base: str, output: str | Path, num_speculative_tokens: int) -> Adapter:
    """Writes the adapter, once all is known to fit; the base is loaded for that, on the CPU.

    Args:
        source: folder of adapter_config.json and adapter_model.safetensors.
        base: that the LoRA was trained for, as `pardec.load` takes it.
        output: the folder to make.
        num_speculative_tokens: K to draft by default; of SGLang's --speculative-num-draft-tokens one less.

    Raises:
        ValueError: for files that are missing or no such LoRA, another base, or an output that is there already.
        OSError: if there is no room; nothing is left behind.
    """
    K = integer("--num-speculative-tokens", num_speculative_tokens, 1, MAX_SPECULATIVE_TOKENS)
    source, output = Path(source), Path(os.path.normpath(output))
    refuse_taken(output)
    lora = _read(source)
    model, tokenizer = load_base(base, device="cpu", dtype="auto"), load_tokenizer(base)
    try:
        LoraGate(model, lora)
    except ValueError as error:
        raise ValueError(f"{source}: expected a LoRA for {base}: {error}") from None
    metadata = AdapterMetadata(
        num_speculative_tokens=K,
        draft_input=UNIFORM_NOISE,
        base=BaseReference(name=base, revision=getattr(model.config, "_commit_hash", None)),
        fingerprint=fingerprint(model, tokenizer),
        training={
            "imported": {
                "form": "SGLang's UNO",
                "base_model_name_or_path": lora.config.get("base_model_name_or_path"),
                "files": {name: file_sha256(source / name) for name in (LORA_CONFIG, LORA_WEIGHTS)},
            }
        },
    )
    shown = public_form(Adapter(None, metadata, lora))
    # the base is remembered as it was typed, as in training
    shown.metadata.base = metadata.base
    with made_whole(output) as aside:
        save_adapter(shown, aside)
    return shown


def _read(source: Path) -> LoraWeights:
    for name in (LORA_CONFIG, LORA_WEIGHTS):
        if not (source / name).is_file():
            raise ValueError(f"{source}: expected a folder with {LORA_CONFIG} and {LORA_WEIGHTS}, found no {name}")
    try:
        lora = read_lora(source)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    if not lora.tensors:
        raise ValueError(f"{source}: {LORA_WEIGHTS}: expected the tensors of a LoRA, found none")
    if lora.config.get("use_rslora"):
        raise ValueError(f"{source}: use_rslora: expected false, as SGLang divides lora_alpha by r, found true")
    wrong = wrong_name(lora.pairs())
    if wrong is not None:
        raise ValueError(f"{source}: {wrong}")
    return lora
