"""One family from a configuration to tokens: a tiny model is trained for, served, and held against its own `generate`.

Knows nothing of the table that the results stand in.
Legend: K num_speculative_tokens, R rows.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matrix.planting import decode_planted
from torch import Tensor
from transformers import PreTrainedModel

import pardec
from pardec.adapters.adapter import Adapter, AdapterMetadata, BaseReference
from pardec.adapters.files import save_adapter
from pardec.adapters.gated_lora import LoraGate
from pardec.decoding.probe import probe
from pardec.target.base import refuse_by_config
from pardec.target.fingerprint import fingerprint
from pardec.target.forward import TargetModel
from pardec.training.module import Drafter, MaskTokenTrainer
from pardec.training.peft_lora import inject_lora, lora_enabled
from pardec.training.steps import apply_gradients, build_optimizer
from pardec.training.warm_start import learned_adapter

K, NEW_TOKENS, TRAINING_STEPS = 3, 24, 3
PROMPT_LENGTHS = (17, 11, 3, 6)  # some within a window of eight tokens, some beyond
_LEARNING_RATES = {"mask_embeddings": 0.1, "lora": 0.05}
_SAME_LOGITS = 1e-3  # in units of their spread: PEFT computes in float32


class WrongResultError(RuntimeError):
    """Something came out otherwise than the base alone would have it."""


@dataclass(frozen=True)
class Compared:
    """What was held against the base, and was the same.

    Attributes:
        num_lora_modules: with a LoRA.
        ways: of decoding, as `mode x batch`.
        mean_acceptance_length: the least of those with planted drafts.
    """

    num_lora_modules: int
    ways: tuple[str, ...]
    mean_acceptance_length: float


def check_family(base: PreTrainedModel) -> Compared:
    """Trains an adapter for `base`, serves it and compares, in every mode, alone and in a ragged batch.

    Raises:
        UnsupportedModelError: where `base` is refused.
        WrongResultError: for tokens or logits that are not those of the base.
    """
    refuse_by_config(base.config)
    probe(TargetModel.wrap(base))
    prompts = _prompts(base)
    references = [generated(base, prompt) for prompt in prompts]
    with tempfile.TemporaryDirectory() as folder:
        adapter = _trained(base, folder, torch.tensor([prompts[0] + references[0]]))
        save_adapter(adapter, Path(folder) / "adapter")
        model = pardec.load(Path(folder) / "adapter", base=base)
    assert adapter.lora is not None
    ways, lengths = [], []
    for batch in (1, len(prompts)):
        rows, expected = prompts[:batch], references[:batch]
        for mode in ("plain", "two_pass", "fused"):
            found = model.generate(rows, mode=mode, max_new_tokens=NEW_TOKENS).token_ids
            _expect_same(f"{mode}, batch {batch}", found, expected)
            ways.append(f"{mode} x {batch}")
            if mode != "plain":
                found, length = decode_planted(model, rows, expected, mode)
                _expect_same(f"{mode}, batch {batch}, planted drafts", found, expected)
                lengths.append(length)
    return Compared(len(adapter.lora.pairs()), tuple(ways), min(lengths))


def _prompts(base: PreTrainedModel) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    vocab = TargetModel.wrap(base).vocab_size
    # the first ids are often special to a model
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def generated(base: PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    """What the base's own greedy `generate` continues the prompt with."""
    ids = torch.tensor([list(prompt)])
    out = base.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


def _expect_same(what: str, found: list[list[int]], expected: list[list[int]]) -> None:
    for row, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
            raise WrongResultError(f"{what}: expected generate's tokens, found others from token {at} of row {row} on")


def _trained(base: PreTrainedModel, name: str, ids: Tensor) -> Adapter:
    """An adapter with a LoRA after a few steps on `ids`; `base` is as it was."""
    identity = fingerprint(base, None)
    torch.manual_seed(0)
    peft_model = inject_lora(base, r=2, alpha=4.0, target_modules="all-linear")
    try:
        module = MaskTokenTrainer(base, Drafter(K, has_lora=True))
        learned = {name: p for name, p in module.named_parameters() if p.requires_grad}
        optimizer = build_optimizer(learned, _LEARNING_RATES)
        anchors = torch.arange(1, ids.shape[1] - 1, 2)[None]
        for step in range(TRAINING_STEPS):
            loss, count, _ = module(ids, torch.ones_like(ids, dtype=torch.bool), anchors)
            (loss / count).backward()
            apply_gradients(learned.values(), [optimizer], 1.0, step, float(loss), "the rates")
        adapter = learned_adapter(
            module,
            peft_model,
            AdapterMetadata(num_speculative_tokens=K, base=BaseReference(name=name), fingerprint=identity),
        )
        _expect_gate_serves(base, adapter, ids)
    finally:
        peft_model.unload()
    return adapter


@torch.no_grad()
def _expect_gate_serves(base: PreTrainedModel, adapter: Adapter, ids: Tensor) -> None:
    """With the gate open on all rows the logits are those of PEFT's own layers."""
    assert adapter.lora is not None
    without = base(ids, use_cache=False).logits
    with lora_enabled(base):
        expected = base(ids, use_cache=False).logits
    gate = LoraGate(base, adapter.lora)
    with gate.attached(), gate.open(slice(0, ids.shape[1]), *ids.shape):
        found = base(ids, use_cache=False).logits
    scale = expected.std()
    if not float((expected - without).abs().max() / scale) > 10 * _SAME_LOGITS:
        raise WrongResultError("LoRA: expected logits that training has changed, found those of the base")
    if not float((found - expected).abs().max() / scale) <= _SAME_LOGITS:
        raise WrongResultError("LoRA: expected the gate to give the logits of PEFT's layers, found others")
