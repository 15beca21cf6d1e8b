"""What does a training step take, in time and memory, beside one dense forward over all of its rows?

    python eval/training.py [--shape llama-8b] [--batch-size 2] [--length 576] [--anchors 64]
    python eval/training.py --quick

A step of training runs real tokens once without gradient and then mask rows alone, with gradient; the dense joint form
runs both together, all with gradients. Both give the same loss and gradients, and take turns on one model of random
weights: first with mask embeddings alone, then with a LoRA. Peak memory (CUDA only) stands beside the estimate that
`train/train_adapter.py` prints. Sizes are those of recipes/llama3.yaml for 8B, all anchors in one forward. Prints a
table, writes JSON and Markdown into eval/results; the last line is one JSON object.
"""

import argparse
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from reporting.result_files import output_stem, provenance, write_page
from reporting.text_tables import TextTable, markdown_page, number, print_tables
from timing.clock import quartiles, seconds_of
from timing.joint_forward import JointForward
from timing.options import full_or_quick
from timing.shapes import SHAPES, config_of, random_model
from torch import Tensor
from transformers import PreTrainedModel

from pardec.layout import MAX_SPECULATIVE_TOKENS
from pardec.run import dtype_name, exit_on_unusable_input
from pardec.training.memory import learned_bytes, measure_step
from pardec.training.module import Drafter, MaskTokenTrainer
from pardec.training.objective import Objective
from pardec.training.peft_lora import inject_lora
from pardec.training.running.processes import make_accelerator
from pardec.training.steps import Learner, build_optimizer, make_schedule

FULL = {"batch_size": 2, "length": 576, "anchors": 64, "repetitions": 5}
QUICK = {"batch_size": 2, "length": 64, "anchors": 8, "repetitions": 2}
PREFIX_CACHED, DENSE_JOINT = "prefix cached", "dense joint"
HEADER = ("learned", "form", "ms/step", "x prefix cached", "mask rows/s", "peak GiB", "estimate GiB")
OUT_OF_MEMORY = "it does not fit into the device's memory"
NOTES = (
    "a step: forward, backward and update, all anchors in one forward; ms/step: median (lower to upper quartile)",
    "x prefix cached: median over repetitions of the ratio to the prefix-cached step of the same repetition",
    "prefix cached: real rows once without gradient, then mask rows against their keys and values; dense joint: one "
    "forward over real and mask rows with gradients, whose loss and gradients are the same",
    "peak GiB: most memory that was allocated in a step, weights and optimiser included; estimate GiB: what "
    "train/train_adapter.py prints before its first step",
)


@dataclass
class Form:
    """A form of the step, and what its counted steps took.

    Attributes:
        learner: takes the steps.
        seconds: of each.
        peak_bytes: most memory in one of them; 0 on a CPU.
    """

    learner: Learner
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", help=f"one of {', '.join(SHAPES)}; default llama-8b on CUDA, llama-100m on a CPU")
    add("--batch-size", type=int, help=f"sequences, default {FULL['batch_size']}")
    add("--length", type=int, help=f"tokens of each, default {FULL['length']}")
    add("--anchors", type=int, help=f"in each, default {FULL['anchors']}")
    add("--num-speculative-tokens", type=int, default=4, help="mask rows behind each anchor")
    add("--lora-rank", type=int, default=16)
    add("--repetitions", type=int, help=f"counted steps of each form, default {FULL['repetitions']}; two more warm up")
    add("--seed", type=int, default=0)
    add("--output", help="path of the results without suffix; default eval/results/training_<device>")
    add("--quick", action="store_true", help="tiny, short sequences: runs/training_quick")
    args = full_or_quick(parser, FULL, QUICK)
    with exit_on_unusable_input():
        report(args)


def report(args: argparse.Namespace) -> None:
    """The whole measurement."""
    for option in ("batch_size", "length", "anchors", "num_speculative_tokens", "lora_rank", "repetitions"):
        if getattr(args, option) < 1:
            raise ValueError(f"{option}: expected an integer >= 1, found {getattr(args, option)}")
    if args.num_speculative_tokens > MAX_SPECULATIVE_TOKENS:
        raise ValueError(
            f"num_speculative_tokens: expected at most {MAX_SPECULATIVE_TOKENS}, found {args.num_speculative_tokens}"
        )
    if args.anchors > args.length:
        raise ValueError(f"anchors: expected at most {args.length}, the length, found {args.anchors}")
    accelerator = make_accelerator("auto")
    device = accelerator.device
    on_cuda = device.type == "cuda"
    args.shape = args.shape or ("tiny" if args.quick else "llama-8b" if on_cuda else "llama-100m")
    base = random_model(config_of(args.shape), device, torch.bfloat16 if on_cuda else torch.float32, args.seed)
    num_parameters, rows, left_out = base.num_parameters(), [], []
    for rank in (0, args.lora_rank):
        found, without = measure(args, accelerator, base, rank)
        rows += found
        left_out += without
    result = {
        "shape": args.shape,
        "num_parameters": num_parameters,
        **{name: getattr(args, name) for name in (*FULL, "num_speculative_tokens", "lora_rank", "seed")},
        "dtype": dtype_name(base.dtype),
        "mixed_precision": accelerator.mixed_precision,
        "rows": rows,
        "left_out": left_out,
        **provenance(device),
    }
    show(result, output_stem("training", args.output, args.quick, device))
    print(json.dumps(result))


def measure(
    args: argparse.Namespace, accelerator: Accelerator, base: PreTrainedModel, rank: int
) -> tuple[list[dict], list[dict]]:
    """Both forms in turn, with a LoRA of this rank or mask embeddings alone (0): rows of figures, and what was left."""
    K = args.num_speculative_tokens
    if rank:
        inject_lora(base, r=rank, alpha=2 * rank, target_modules="all-linear")
    trainer = MaskTokenTrainer(base, Drafter(K, has_lora=rank > 0), Objective(weights="expected_length"))
    trainer = trainer.to(accelerator.device)
    forms = {name: Form(one) for name, one in learners(args, accelerator, trainer).items()}
    batch, left_out = batch_of(args, trainer), []
    learned = f"LoRA r {rank}" if rank else "embeddings"
    for repetition in range(args.repetitions + 2):
        for name, form in list(forms.items()):
            try:
                seconds, peak = step(form.learner, batch, repetition + 1)
            except torch.OutOfMemoryError:
                left_out.append({"learned": learned, "form": name, "reason": OUT_OF_MEMORY})
                del forms[name]
            else:
                form.peak_bytes = max(form.peak_bytes, peak)
                form.seconds += [seconds] * (repetition >= 2)
            trainer.forget_prefix()  # the other form has none
            clear_device_cache(garbage_collection=True)
    weights = sum(p.numel() * p.element_size() for p in base.parameters() if not p.requires_grad)
    num_learned = sum(p.numel() for p in trainer.parameters() if p.requires_grad)
    mask_rows = args.batch_size * args.anchors * K
    with accelerator.autocast():
        of_step = measure_step(trainer).bytes_for(args.batch_size, args.length, mask_rows)
    estimate = weights + learned_bytes(num_learned) + of_step
    rows = [
        {"learned": learned, "form": name, "num_learned": num_learned, "mask_rows": mask_rows}
        | figures(form, forms.get(PREFIX_CACHED), mask_rows)
        | {"estimate_gib": round(estimate / 2**30, 6) if name == PREFIX_CACHED else None}
        for name, form in forms.items()
    ]
    return rows, left_out


def learners(args: argparse.Namespace, accelerator: Accelerator, trainer: MaskTokenTrainer) -> dict[str, Learner]:
    """Both forms with one optimizer, as they share what is learned."""
    parameters = {name: p for name, p in trainer.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(parameters, {"mask_embeddings": 1e-3, "lora": 1e-4})
    schedule = make_schedule(optimizer, 0, 2 * (args.repetitions + 2), 0)
    optimizer = accelerator.prepare(optimizer)
    return {
        name: Learner(accelerator, accelerator.prepare(form), parameters, optimizer, schedule, args.seed, None, 1.0)
        for name, form in ((PREFIX_CACHED, trainer), (DENSE_JOINT, JointForward(trainer)))
    }


def batch_of(args: argparse.Namespace, trainer: MaskTokenTrainer) -> dict[str, Tensor]:
    """Random tokens, all of them targets, with anchors in random order."""
    generator, (B, T) = torch.Generator().manual_seed(args.seed), (args.batch_size, args.length)
    batch = {
        "input_ids": torch.randint(trainer.target.vocab_size, (B, T), generator=generator),
        "loss_mask": torch.ones(B, T, dtype=torch.bool),
        "anchors": torch.rand(B, T, generator=generator).argsort()[:, : args.anchors],
    }
    return {name: values.to(trainer.target.device) for name, values in batch.items()}


def step(learner: Learner, batch: Mapping[str, Tensor], number: int) -> tuple[float, int]:
    """Seconds of a step, and the most memory that was allocated in it."""
    device = learner.accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = seconds_of(lambda: learner.update([batch], number, with_metrics=False), device)
    return seconds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def figures(form: Form, reference: Form | None, mask_rows: int) -> dict:
    """The figures of one form beside those of the prefix-cached one, rounded."""
    low, median, high = quartiles([1000 * seconds for seconds in form.seconds])
    found = {
        "ms_per_step": round(median, 3),
        "ms_per_step_quartiles": [round(low, 3), round(high, 3)],
        "mask_rows_per_second": round(mask_rows / statistics.median(form.seconds), 1),
        "peak_memory_gib": round(form.peak_bytes / 2**30, 6) if form.peak_bytes else None,
        "ratio_to_prefix_cached": None,
    }
    if reference is not None:
        pairs = zip(form.seconds, reference.seconds, strict=True)
        found["ratio_to_prefix_cached"] = round(statistics.median(mine / other for mine, other in pairs), 4)
    return found


def show(result: dict, stem: Path) -> None:
    """Table and notes on the console and in files."""
    title = (
        f"{result['shape']}, {result['num_parameters'] / 1e6:,.1f} M parameters, {result['dtype']}, mixed precision "
        f"{result['mixed_precision']}; {result['batch_size']} sequences of {result['length']} tokens, "
        f"{result['anchors']} anchors in each, K = {result['num_speculative_tokens']}; {result['device']}"
    )
    lines = []
    for row in result["rows"]:
        low, high = row["ms_per_step_quartiles"]
        time = f"{row['ms_per_step']:.1f} ({low:.1f} to {high:.1f})"
        numbers = [number(row["ratio_to_prefix_cached"], 2), number(row["mask_rows_per_second"], 0)]
        memory = [number(row[key], 1) for key in ("peak_memory_gib", "estimate_gib")]
        lines.append([row["learned"], row["form"], time, *numbers, *memory])
    table = TextTable(title, HEADER, lines)
    notes = [*NOTES, *(f"left out: {one['learned']}, {one['form']}: {one['reason']}" for one in result["left_out"])]
    page = markdown_page(result, f"A training step of {result['shape']}", title, [table.markdown()], notes)
    write_page(result, stem, page)
    print_tables([table], notes, ("learned", "form"))


if __name__ == "__main__":
    main()
