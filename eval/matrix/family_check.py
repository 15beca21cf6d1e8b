"""One family from a configuration to tokens: a tiny model is saved, loaded, trained for, served and compared.

What it is compared with is the base alone: its own `generate`, and PEFT's layers in it. Knows nothing of the table that
the results stand in. Legend: K num_speculative_tokens.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matrix.planting import decode_planted
from matrix.tiny_configs import tiny_config, tiny_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

import pardec
from pardec.adapters.adapter import Adapter, AdapterMetadata, BaseReference
from pardec.adapters.files import save_adapter
from pardec.adapters.gated_lora import LoraGate
from pardec.decoding.probing.probe import probe
from pardec.measures.ranks import measure_ranks
from pardec.model import SelfSpeculativeModel
from pardec.target.base import load_base
from pardec.target.fingerprint import fingerprint
from pardec.target.forward import TargetModel
from pardec.training.module import METRICS, Drafter, MaskTokenTrainer
from pardec.training.peft_lora import inject_lora, lora_enabled
from pardec.training.steps import apply_gradients, build_optimizer
from pardec.training.warm_start import learned_adapter

K, NEW_TOKENS, TRAINING_STEPS = 3, 24, 8
PROMPT_LENGTHS = (17, 11, 3, 6)  # some within a window of eight tokens, some beyond
MODES = ("plain", "two_pass", "fused")
_SHARD = "200KB"  # so that every base comes in several files
_LEARNING_RATES = {"mask_embeddings": 0.1, "lora": 0.05}
_SAME_LOGITS = 1e-3  # in units of their spread


class WrongResultError(RuntimeError):
    """Something came out otherwise than the base alone would have it."""


class RefusedError(RuntimeError):
    """The base is refused when it is loaded or probed; the message is that of the refusal."""


@dataclass(frozen=True)
class Compared:
    """What was held against the base alone, and was the same.

    Attributes:
        num_lora_modules: with a LoRA.
        num_tokens: compared, all ways together.
        mean_acceptance_length: the least of the ways with planted drafts.
        batches: why several sequences at once are refused; empty where they are not.
    """

    num_lora_modules: int
    num_tokens: int
    mean_acceptance_length: float
    batches: str = ""


def save_base(family: str, folder: Path) -> None:
    """Writes a tiny base of the family in several files; one that transformers cannot make without its weights."""
    try:
        model = tiny_model(family, dtype=torch.float32)
    except Exception:  # whatever a family's own code raises; what loading makes of it is what users see
        tiny_config(family).save_pretrained(folder)
        save_file({}, folder / "model.safetensors", metadata={"format": "pt"})
        return
    model.save_pretrained(folder, max_shard_size=_SHARD)
    if type(model.config) not in AutoModelForCausalLM._model_mapping:  # the text part of a configuration that is
        tiny_config(family).save_pretrained(folder)


def check_family(folder: Path) -> Compared:
    """Trains an adapter for the base in `folder`, serves it and compares, in every mode, alone and in a ragged batch.

    Raises:
        RefusedError: where the base is.
        WrongResultError: for tokens or logits that are not those of the base.
    """
    try:
        base = load_base(str(folder), device="cpu", dtype=torch.float32)
        probe(TargetModel.wrap(base))
    except ValueError as error:
        raise RefusedError(str(error)) from error
    base.generation_config = GenerationConfig(pad_token_id=0)  # its own may hold penalties
    prompts = _prompts(base)
    references = [generated(base, prompt) for prompt in prompts]
    texts = [prompt + new for prompt, new in zip(prompts, references, strict=True)]
    adapter, agreement = _trained(base, str(folder), texts[:2], first_anchor=len(prompts[0]) - 1)
    save_adapter(adapter, folder / "adapter")
    model = pardec.load(folder / "adapter", base=base)
    served = measure_ranks(model, prompts[:1], references[:1])
    drafts = [round(share * n) for share, n in zip(served.unconditional[1], served.num_places, strict=True)]
    if drafts != agreement:
        raise WrongResultError(
            f"drafts: expected {agreement} of them to be the target's tokens as in training, found {drafts}"
        )
    assert adapter.lora is not None
    refusal = _refusal_of_batches(model, prompts)
    num_tokens, lengths = 0, []
    for batch in (1,) if refusal else (1, len(prompts)):
        rows, expected = prompts[:batch], references[:batch]
        for mode in MODES:
            found = [model.generate(rows, mode=mode, max_new_tokens=NEW_TOKENS).token_ids]
            if mode != "plain":
                tokens, length = decode_planted(model, rows, expected, mode)
                found, lengths = [*found, tokens], [*lengths, length]
            for tokens in found:
                _expect_same(f"{mode}, batch {batch}", tokens, expected)
                num_tokens += sum(map(len, tokens))
    return Compared(len(adapter.lora.pairs()), num_tokens, min(lengths), refusal)


def _refusal_of_batches(model: SelfSpeculativeModel, prompts: list[list[int]]) -> str:
    try:
        model.engines.check(prompts, NEW_TOKENS, num_sequences=len(prompts))
    except ValueError as error:
        return str(error)
    return ""


def _prompts(base: PreTrainedModel) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    # the first and last ids may be special to a model
    highest = TargetModel.wrap(base).vocab_size - 1
    return [torch.randint(3, highest, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def generated(base: PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    """What the base's own greedy `generate` continues the prompt with."""
    ids = torch.tensor([list(prompt)])
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    out = base.generate(ids, attention_mask=torch.ones_like(ids), **options)  # type: ignore[operator]
    return out[0, len(prompt) :].tolist()


def _expect_same(what: str, found: list[list[int]], expected: list[list[int]]) -> None:
    for row, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
            raise WrongResultError(f"{what}: expected generate's tokens, found others from token {at} of row {row} on")


def _trained(
    base: PreTrainedModel, name: str, texts: Sequence[Sequence[int]], first_anchor: int
) -> tuple[Adapter, list[int]]:
    """Trains for a few steps; `base` is as it was.

    Returns:
        an adapter with a LoRA, and by position how many of its drafts behind the tokens of the first text, from
        `first_anchor` on, are the target's likeliest.
    """
    identity = fingerprint(base, None)
    torch.manual_seed(0)
    peft_model = inject_lora(base, r=2, alpha=4.0, target_modules="all-linear")
    try:
        module = MaskTokenTrainer(base, Drafter(K, has_lora=True))
        learned = {key: p for key, p in module.named_parameters() if p.requires_grad}
        optimizer = build_optimizer(learned, _LEARNING_RATES)
        ids = torch.tensor([text[-min(map(len, texts)) :] for text in texts])
        anchors = torch.arange(1, ids.shape[1] - 1, 2).expand(ids.shape[0], -1)
        for step in range(TRAINING_STEPS):
            loss, count, _ = module(ids, torch.ones_like(ids, dtype=torch.bool), anchors)
            (loss / count).backward()
            apply_gradients(learned.values(), [optimizer], 1.0, step, float(loss), "the rates")
        metadata = AdapterMetadata(num_speculative_tokens=K, base=BaseReference(name=name), fingerprint=identity)
        adapter = learned_adapter(module, peft_model, metadata)
        _expect_gate_serves(base, adapter, ids)
        text = torch.tensor([texts[0]])
        places = torch.arange(first_anchor, text.shape[1])[None]
        with torch.no_grad():
            _, _, sums = module(text, torch.ones_like(text, dtype=torch.bool), places, with_metrics=True)
    finally:
        peft_model.unload()
    return adapter, sums[METRICS.index("agreement")].int().tolist()


@torch.no_grad()
def _expect_gate_serves(base: PreTrainedModel, adapter: Adapter, ids: Tensor) -> None:
    """With the gate open on all rows the logits are those of PEFT's own layers."""
    assert adapter.lora is not None
    if any("experts" in name for name, _ in base.named_modules()):
        base = copy.deepcopy(base).double()  # rounding in float32 may send a token to another expert
        base.set_experts_implementation("eager")  # the others have no kernel for float64
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
