"""SGLang: a LoRA in the form that its algorithm UNO serves, active at draft rows that hold random tokens.

The rules are those of SGLang's `lora_config.py`, `lora.py` and `mem_pool.py`, which read a folder of PEFT's: some of
what they do not know they refuse, the rest they misread without a word. Legend: r rank.
"""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pardec.adapters.adapter import UNIFORM_NOISE, Adapter
from pardec.arguments import integer
from pardec.exports.base_folder import LoadedBase
from pardec.exports.door import Door, base_in_shell
from pardec.exports.lora_folder import read_lora, write_lora
from pardec.exports.record import ExportRecord

# layers are told apart by this part of a name alone, and layers of a name are told by its end
_NAME = re.compile(r"(?:[\w.]+\.)?layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)")
# projections that SGLang runs as one; where some are there and others not it fails, or takes one for another
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_SUFFIXES = {*_TOGETHER[0], *_TOGETHER[1], "qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
_Pairs = Mapping[str, tuple[Tensor, Tensor]]


def _refusal(adapter: Adapter) -> str | None:
    if adapter.lora is None or adapter.metadata.draft_input != UNIFORM_NOISE:
        return (
            f"expected a LoRA trained with adapter.draft_input={UNIFORM_NOISE} (recipes/tiny_python_noise.yaml trains "
            f"one), found {adapter.metadata.draft_input}"
        )
    if adapter.head is not None:
        return (
            "expected no sampler head (recipes/tiny_python_noise.yaml trains an adapter without one), found one of "
            f"width {adapter.metadata.head.width if adapter.metadata.head else 0}"
        )
    return wrong_name(adapter.lora.pairs())


def wrong_name(pairs: _Pairs) -> str | None:
    """What is wrong with the names of a LoRA's layers, as `expected .., found ..`; None if SGLang knows all of them."""
    for name in pairs:
        match = _NAME.fullmatch(name)
        if match is None or match[2] not in _SUFFIXES:
            return (
                f"expected a LoRA on {', '.join(sorted(_SUFFIXES))} of layers.N.self_attn or .mlp, found {name[:150]}"
            )
    return None


def _write(adapter: Adapter, base: LoadedBase | None, folder: Path) -> None:
    assert adapter.lora is not None
    lora, tensors = adapter.lora, {}
    pairs = _complete(lora.pairs(), adapter.metadata.fingerprint.architecture)
    for name, (a, b) in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    alpha = lora.scaling * lora.rank  # SGLang divides by r, also where a rank-stabilised LoRA means its root
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.metadata.base.name,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in pairs}),
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_lora(folder, config, tensors)


def _complete(pairs: _Pairs, architecture: Mapping) -> dict[str, tuple[Tensor, Tensor]]:
    """The pairs, and zeros for projections that SGLang runs with one that is there."""
    whole = dict(pairs)
    for name, (a, b) in pairs.items():
        layer, _, suffix = name.rpartition(".")
        for group in _TOGETHER:
            for other in group if suffix in group else ():
                if f"{layer}.{other}" not in whole:
                    rows = _out_features(layer, suffix, other, pairs, b.shape[0], architecture)
                    whole[f"{layer}.{other}"] = (torch.zeros_like(a), b.new_zeros(rows, b.shape[1]))
    return whole


def _out_features(layer: str, suffix: str, other: str, pairs: _Pairs, same: int, architecture: Mapping) -> int:
    """Rows of a projection that the LoRA leaves out, from its like, else from the sizes of the base."""
    like = {"k_proj": "v_proj", "v_proj": "k_proj"}.get(other)
    if like is not None and f"{layer}.{like}" in pairs:
        return pairs[f"{layer}.{like}"][1].shape[0]
    if other in _TOGETHER[1]:
        return same
    heads = integer("base: num_attention_heads", architecture.get("num_attention_heads"), 1)
    hidden = integer("base: hidden_size", architecture.get("hidden_size"), 1)
    kv_heads = integer("base: num_key_value_heads", architecture.get("num_key_value_heads") or heads, 1)
    head_dim = integer("base: head_dim", architecture.get("head_dim") or hidden // heads, 1)
    return head_dim * (heads if other == "q_proj" else kv_heads)


def _problems(folder: Path, record: ExportRecord) -> list[str]:
    try:
        lora = read_lora(folder)
    except ValueError as error:
        return [str(error)]
    pairs, targets = lora.pairs(), lora.config.get("target_modules")
    suffixes = sorted({name.rpartition(".")[2] for name in pairs})
    found = []
    if lora.config.get("use_rslora"):
        found.append("use_rslora: expected false, as SGLang divides lora_alpha by r, found true")
    if targets != suffixes:
        found.append(f"target_modules: expected the list {suffixes}, found {targets!r}")
    wrong = wrong_name(pairs)
    if wrong is not None:
        return [*found, wrong]
    num_layers = record.architecture.get("num_hidden_layers")
    for name in pairs:
        layer, _, suffix = name.rpartition(".")
        match = _NAME.fullmatch(name)
        if match is not None and isinstance(num_layers, int) and int(match[1]) >= num_layers:
            found.append(f"{name}: expected one of {num_layers} layers, found layer {match[1]}")
        group = next((group for group in _TOGETHER if suffix in group), (suffix,))
        missing = [other for other in group if f"{layer}.{other}" not in pairs]
        if missing:
            found.append(f"{layer}: expected {', '.join(group)} together, found no {', '.join(missing)}")
    return list(dict.fromkeys(found))


def _commands(record: ExportRecord, folder: str) -> str:
    base, before = base_in_shell(record.base.name)
    return (
        f"{before}python -m sglang.launch_server --model-path {base} \\\n"
        f"    --speculative-algorithm UNO --uno-lora-path {shlex.quote(folder)} \\\n"
        f"    --speculative-num-draft-tokens {record.num_speculative_tokens + 1}"
    )


def _notes(record: ExportRecord, folder: Path) -> str:
    return (
        "SGLang's width is one more than the drafted tokens: the first row of its draft forward yields the model's own "
        "next token. UNO runs on one CUDA device; it refuses min-p, penalties, grammars, log-probabilities and "
        "logit bias. The LoRA is for draft rows only: never load it by `--lora-paths`, nor merge it."
    )


SGLANG = Door(
    name="sglang",
    engine="sglang",
    tested="0.5.23",
    refusal=_refusal,
    write=_write,
    problems=_problems,
    commands=_commands,
    language="bash",
    notes=_notes,
    counted=(
        "SGLang's `accept len` and `avg_spec_accept_length`: all tokens of a round of two forwards, which are one "
        "exact token, the accepted drafts and the bonus token, so one more than pardec's mean acceptance length"
    ),
    exact_tokens=1,
)
