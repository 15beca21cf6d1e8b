"""Shows on the loaded model itself that what decoding relies on holds, before anything is promised."""

from dataclasses import dataclass

import torch

from pardec.adapters.gated_lora import LoraGate
from pardec.decoding.probing.probe_lengths import QUICK, LengthReport, probe_lengths
from pardec.decoding.probing.probe_step import probe_decoder, probe_step, prompt_tokens, state_behind, text_of
from pardec.target.forward import TargetModel, UnsupportedModelError
from pardec.target.hidden import HiddenTap


@dataclass(frozen=True)
class ProbeReport:
    """What was seen on a model that can be decoded exactly.

    Attributes:
        deviation: largest of real rows from a plain forward, in standard deviations of the logits.
        lengths: what was seen behind many tokens.
    """

    deviation: float
    lengths: LengthReport


def probe(target: TargetModel, lengths: tuple[int, ...] = QUICK) -> ProbeReport:
    """Looks at a step on a short text and behind each number of committed tokens.

    Raises:
        UnsupportedModelError: for a model that cannot be decoded exactly, saying what was seen.
    """
    return ProbeReport(probe_step(target), probe_lengths(target, lengths))


@torch.no_grad()
def probe_lora(target: TargetModel, gate: LoraGate) -> None:
    """Runs a step with a LoRA, to see that its layers read every row of it.

    Raises:
        ValueError: if one of them does not, as a head, a router and layers behind a cache of latent keys do not.
    """
    decoder, ids = probe_decoder(target, gate=gate), text_of(target, prompt_tokens(target))
    with decoder.forward.attached():
        decoder.step_logits(state_behind(decoder, ids))


@torch.no_grad()
def probe_head(target: TargetModel, tap: HiddenTap) -> None:
    """Checks that the output head reads one hidden state for each row of logits, where the tap sees it.

    Raises:
        UnsupportedModelError: if it does not.
    """
    ids = torch.arange(2, device=target.device)[None] % target.vocab_size
    with tap.attached():
        logits = target.base(ids, use_cache=False).logits
        found = None if not tap.has_seen else list(tap.hidden.shape)
    expected = [*logits.shape[:2], tap.output_embeddings.shape[1]]
    if found != expected or logits.shape[2] != tap.output_embeddings.shape[0]:
        raise UnsupportedModelError(
            f"{target.base.config.model_type}: expected an output head that reads hidden states of shape {expected} "
            f"and writes {tap.output_embeddings.shape[0]} logits, found {found} and {logits.shape[2]}"
        )
