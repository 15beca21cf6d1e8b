"""Ways to train a draft on one base that take turns: what a step of each costs in time and in memory.

Knows no table and no files.
Legend: B sequences, T tokens, N anchors of a sequence, K num_speculative_tokens.
"""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from timing.joint_forward import JointForward
from timing.pard_forward import PardForward
from torch import Tensor, nn
from transformers import PreTrainedModel

from pardec.training.live_bytes import LiveBytes
from pardec.training.module import Drafter, MaskTokenTrainer
from pardec.training.objective import Objective
from pardec.training.peft_lora import inject_lora
from pardec.training.steps import Learner, build_optimizer, make_schedule

PARDEC, CHECKPOINTED, DENSE_JOINT, PARD = "pardec", "pardec, checkpointed", "dense joint", "PARD"
EMBEDDINGS, ALL_WEIGHTS = "embeddings", "all weights"
RATES = {"mask_embeddings": 1e-6, "lora": 1e-6}  # so low that no step changes what the next one costs


@dataclass(frozen=True)
class Dropping:
    """Nested token dropping, see `nested_block_lengths`; a ratio of 1 keeps everything."""

    ratio: float = 1.0
    floor: float = 0.0


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        form: of the step: `pardec`, `pardec, checkpointed`, `dense joint` or `PARD`.
        learned: what is.
        num_speculative_tokens: K.
        dropping: of mask tokens.
        learner: takes its steps.
        module: what is differentiated, not wrapped.
    """

    form: str
    learned: str
    num_speculative_tokens: int
    dropping: Dropping
    learner: Learner
    module: nn.Module


@dataclass
class Cost:
    """What the counted steps of a way took.

    Attributes:
        slots: rows of a step that have a target.
        seconds: of each step.
        cpu_seconds: of all threads, of each step.
        peak_bytes: the most that is alive of what forward and backward make, gradients among it.
    """

    slots: int = 0
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def build_ways(
    accelerator: Accelerator,
    base: PreTrainedModel,
    *,
    lora_rank: int,
    full: int,
    dropped: int,
    dropping: Dropping,
    checkpointing: float,
    num_steps: int,
    seed: int,
) -> list[Way]:
    """All ways: K = `full` with every mask token, with a LoRA and without, and K = `dropped` with some of them.

    Args:
        accelerator: of the run.
        base: frozen; PARD learns a copy of it.
        lora_rank: of the LoRA.
        full: K.
        dropped: K.
        dropping: beside `dropped`.
        checkpointing: share of the layers that run twice in the checkpointed form.
        num_steps: of all to come, for schedules.
        seed: of the run.
    """
    draft = copy.deepcopy(base)
    inject_lora(base, r=lora_rank, alpha=2 * lora_rank, target_modules="all-linear")
    lora, everything, found = f"LoRA r {lora_rank}", Dropping(), []
    for learned, K, keep in ((lora, full, everything), (EMBEDDINGS, full, everything), (lora, dropped, dropping)):
        drafter, objective = Drafter(K, has_lora=learned == lora), Objective(weights="expected_length")
        for share in (0.0, checkpointing) if keep == everything else (0.0,):
            trainer = MaskTokenTrainer(base, drafter, objective, keep_ratio=keep.ratio, keep_floor=keep.floor)
            trainer = trainer.to(accelerator.device)
            trainer.run_layers_twice(share)
            forms: dict[str, nn.Module] = {CHECKPOINTED if share else PARDEC: trainer}
            if keep == everything and not share:
                forms[DENSE_JOINT] = JointForward(trainer)
            parameters = _learned(trainer, with_lora=learned == lora)
            found += _ways(accelerator, forms, learned, K, keep, parameters, num_steps, seed)
    for K, keep in ((full, everything), (dropped, dropping)):
        module = PardForward(draft, K, keep_ratio=keep.ratio, keep_floor=keep.floor).to(accelerator.device)
        parameters = dict(module.named_parameters())
        found += _ways(accelerator, {PARD: module}, ALL_WEIGHTS, K, keep, parameters, num_steps, seed)
    return found


def _learned(trainer: MaskTokenTrainer, *, with_lora: bool) -> dict[str, Tensor]:
    return {name: p for name, p in trainer.named_parameters() if p.requires_grad and (with_lora or "lora_" not in name)}


def _ways(
    accelerator: Accelerator,
    forms: Mapping[str, nn.Module],
    learned: str,
    K: int,
    dropping: Dropping,
    parameters: Mapping[str, Tensor],
    num_steps: int,
    seed: int,
) -> list[Way]:
    """Forms of one step, which share what is learned and its optimizer."""
    optimizer = build_optimizer(parameters, RATES)
    schedule = make_schedule(optimizer, 0, num_steps, 0)
    prepared = accelerator.prepare(optimizer)
    found = []
    for form, module in forms.items():
        wrapped = accelerator.prepare(module)
        learner = Learner(accelerator, wrapped, parameters, prepared, schedule, seed, None, 1.0)
        found.append(Way(form, learned, K, dropping, learner, module))
    return found


def batch_of(way: Way, *, batch_size: int, length: int, anchors: int, seed: int) -> dict[str, Tensor]:
    """Random tokens, all of them targets; anchors in random order, for PARD all positions."""
    generator = torch.Generator().manual_seed(seed)
    module = way.module.trainer if isinstance(way.module, JointForward) else way.module
    assert isinstance(module, MaskTokenTrainer | PardForward)
    chosen = torch.rand(batch_size, length, generator=generator).argsort()
    batch = {
        "input_ids": torch.randint(module.target.vocab_size, (batch_size, length), generator=generator),
        "loss_mask": torch.ones(batch_size, length, dtype=torch.bool),
        "anchors": chosen if way.form == PARD else chosen[:, :anchors],
    }
    return {name: values.to(way.learner.accelerator.device) for name, values in batch.items()}


def measure_in_turn(
    ways: Sequence[Way], batches: Sequence[Mapping[str, Tensor]], repetitions: int, most_seconds: float = math.inf
) -> list[Cost]:
    """Steps of all ways in turn, every other time in reverse, behind one that warms up; then the memory of one each.

    Args:
        ways: to measure.
        batches: of each.
        repetitions: counted steps of each way.
        most_seconds: fewer, but at least one, where one more would take longer than that.
    """
    costs, began = [Cost() for _ in ways], time.perf_counter()
    for repetition in range(repetitions + 1):
        if repetition > 1 and time.perf_counter() - began > most_seconds * repetition / (repetition + 1):
            break
        turns = list(range(len(ways)))
        for index in turns if repetition % 2 else reversed(turns):
            seconds, cpu_seconds, slots = _step(ways[index], batches[index], repetition + 1)
            if repetition:
                costs[index].seconds.append(seconds)
                costs[index].cpu_seconds.append(cpu_seconds)
                costs[index].slots = slots
    for way, batch, cost in zip(ways, batches, costs, strict=True):
        cost.peak_bytes = _peak_bytes(way, batch)
    return costs


def _step(way: Way, batch: Mapping[str, Tensor], number: int) -> tuple[float, float, int]:
    """Seconds of a step with its update, CPU seconds of all threads, and its slots."""
    _wait(way)
    wall, cpu = time.perf_counter(), time.process_time()
    sums, _ = way.learner.update([batch], number, with_metrics=False)
    _wait(way)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    _forget(way)
    return seconds, cpu_seconds, int(sums[-1, 0])


def _peak_bytes(way: Way, batch: Mapping[str, Tensor]) -> int:
    """Of forward and backward; what is learned has no gradients before."""
    accelerator, wrapped = way.learner.accelerator, way.learner.wrapped
    counted = LiveBytes()
    counted.leave_out([*way.module.parameters(), *way.module.buffers(), *batch.values()])
    with counted:
        loss, *_ = wrapped(**batch)
        accelerator.backward(loss)
    way.learner.optimizer.zero_grad()
    _forget(way)
    return counted.peak


def _forget(way: Way) -> None:
    if isinstance(way.module, MaskTokenTrainer):
        way.module.forget_prefix()


def _wait(way: Way) -> None:
    if way.learner.accelerator.device.type == "cuda":
        torch.cuda.synchronize()
