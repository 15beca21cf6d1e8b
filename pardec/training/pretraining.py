"""Parts of training a base model from scratch: optimisers, their rates, a step, and the loss on held-out text.

Legend: T tokens of a sequence.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel

from pardec.target.forward import embedding_weight
from pardec.training.steps import apply_gradients

IGNORED_LABEL = -100


def build_optimizers(
    model: PreTrainedModel, muon_learning_rate: float, learning_rate: float, weight_decay: float
) -> list[Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the rest, as torch.optim.Muon's documentation asks.

    Source: https://kellerjordan.github.io/posts/muon/
    """
    outer = {embedding_weight(model), model.get_output_embeddings().weight}  # type: ignore[union-attr]
    matrices = [p for p in model.parameters() if p.ndim == 2 and p not in outer]
    rest = [p for p in model.parameters() if p.ndim != 2 or p in outer]
    return [
        Muon(matrices, lr=muon_learning_rate, weight_decay=weight_decay),
        AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def set_rates(optimizers: Sequence[Optimizer], step: int, steps: int, decay_share: float) -> float:
    """Sets the rates of step 1, 2, ...; returns their share of the full ones: constant, then linear to 0."""
    decay_steps = decay_share * steps
    share = min(1.0, (steps - step + 1) / decay_steps) if decay_steps else 1.0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group.setdefault("initial_lr", group["lr"])
    return share


def optimiser_step(
    accelerator: Accelerator,
    wrapped: nn.Module,
    optimizers: Sequence[Optimizer],
    batches: Tensor,
    step: int,
    max_grad_norm: float,
) -> float:
    """One update from token ids of shape [forwards, batch, T]; returns the loss, in nats per token.

    Every sequence has T - 1 targets, so that the mean of means is the mean over the tokens of the step.

    Raises:
        ValueError: if the loss is not finite.
    """
    total = torch.zeros((), device=accelerator.device)
    for index, ids in enumerate(batches.to(accelerator.device)):
        is_last = index == len(batches) - 1
        with nullcontext() if is_last else accelerator.no_sync(wrapped):
            loss = wrapped(input_ids=ids, labels=ids, use_cache=False).loss / len(batches)
            accelerator.backward(loss)
        total += loss.detach()
    loss = float(accelerator.reduce(total, "mean"))  # type: ignore[arg-type]
    rates = "train.muon_learning_rate or train.learning_rate"
    apply_gradients(wrapped.parameters(), optimizers, max_grad_norm, step, loss, rates)
    return loss


@torch.no_grad()
def held_out_loss(
    accelerator: Accelerator, model: PreTrainedModel, windows: Sequence[Tensor], batch_size: int
) -> float:
    """Mean negative log-likelihood in nats per predicted token, over all processes."""
    mine = windows[accelerator.process_index :: accelerator.num_processes]
    nats, tokens = 0.0, 0
    for first in range(0, len(mine), batch_size):
        batch = list(mine[first : first + batch_size])
        labels = nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=IGNORED_LABEL)
        labels = labels.to(accelerator.device)
        # padding stands on the right, where no row that counts sees it
        logits = model(input_ids=labels.clamp_min(0), use_cache=False).logits[:, :-1]
        losses = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
        )
        nats += float(losses)
        tokens += sum(len(window) - 1 for window in batch)
    sums = accelerator.reduce(torch.tensor([nats, tokens], device=accelerator.device), "sum")
    return float(sums[0] / sums[1])  # type: ignore[index]


def pretraining_bytes(num_parameters: int, num_rows: int, vocab_size: int) -> int:
    """What a process holds for weights, optimisers and the logits of a forward's rows."""
    # float32 weights, gradients and at most two moments; logits in float32 with their softmax and gradient
    return num_parameters * 4 * 4 + num_rows * vocab_size * 4 * 3
