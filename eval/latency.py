"""What does a step cost, by its rows and the length of the context, beside the time that reading its bytes takes?

    python eval/latency.py --shape llama-8b [--rows 1,25,81] [--contexts 1024] [--compile both] [--profile]
    python eval/latency.py runs/quickstart
    python eval/latency.py --quick
    python eval/latency.py --shape llama-8b --predict h100,l40s

Times plain steps (1 row) and full fused chains of (K + 1)^2 rows, of random weights in a named shape or of an adapter
directory and its base. All row counts take turns in one process, so that ratios compare neighbours in time. Prints a
table for every context; writes JSON, Markdown and a picture into eval/results; the last line is one JSON object.
With --predict nothing is timed: the table says what devices that are not here would take, and no file is written.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from reporting.latency_tables import print_results, write_results
from reporting.prediction_tables import beside_measured, matching_result, print_prediction, read_result
from reporting.result_files import output_stem, provenance
from timing.bandwidth import StepBound, copy_bandwidth, lora_bytes_per_step, weight_bytes_per_step
from timing.options import full_or_quick, integers
from timing.prediction import ShapeOnly, constants, figures
from timing.published_peaks import PEAKS, peaks_of
from timing.shapes import SHAPES, config_of, random_lora, random_mask_embeddings, random_model
from timing.step_groups import Plan, measure_group
from timing.steps import GROUPED, STOCK, WHOLE, Subject, Variant
from tqdm.auto import tqdm
from transformers.utils import logging

import pardec
from pardec.adapters.files import load_adapter
from pardec.layout import MAX_SPECULATIVE_TOKENS
from pardec.run import command_line, dtype_name, exit_on_unusable_input, git_commit, library_versions
from pardec.target.forward import TargetModel

FULL = {"rows": "1,4,9,16,25,36,49,64,81", "contexts": "256,1024,4096", "repetitions": 10}
QUICK = {"rows": "1,4,9", "contexts": "64,128", "repetitions": 3}
QUICK_SHAPE = "tiny"
RESULTS = Path(__file__).parent / "results"
PREDICTED = {"rows": "1,9,25,49,81"}
# what only makes sense where steps are timed
TIMING = ("directory", "compile", "head", "attention", "forced_acceptance", "profile", "repetitions", "device", "seed")
# with these, and the default repetitions and contexts, no row count moves on to another cache bucket
STEPS_PER_BLOCK = {"cuda": 10, "cpu": 1}
ATTENTIONS = (GROUPED, WHOLE, STOCK)
YES, NO, BOTH = "yes", "no", "both"
SETTINGS = {NO: [False], YES: [True], BOTH: [False, True]}


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("directory", nargs="?", help="adapter directory, to measure with its base")
    add("--shape", help=f"random weights instead: {', '.join(SHAPES)}; with --quick {QUICK_SHAPE}")
    add("--rows", help=f"squares (K + 1)^2 with commas, default {FULL['rows']}; plain always goes along")
    add("--contexts", help=f"tokens, with commas, default {FULL['contexts']}")
    add("--compile", nargs="?", const=YES, default=NO, choices=list(SETTINGS), help="steps under torch.compile")
    add("--lora", default=BOTH, choices=list(SETTINGS), help="a LoRA at mask rows")
    add("--head", choices=list(SETTINGS), help="drafts drawn by the sampler head; default both, if there is one")
    add("--lora-rank", type=int, default=16, help="of the random LoRA of a --shape")
    add("--attention", default=GROUPED, help=f"of steps, with commas: {', '.join(ATTENTIONS)}; default {GROUPED}")
    add("--forced-acceptance", type=int, metavar="N", help="an oracle makes every step accept N drafts")
    add("--profile", action="store_true", help="what the device does in a step (CUDA only)")
    add("--repetitions", type=int, help=f"counted blocks of steps, default {FULL['repetitions']}")
    add("--device", help="default CUDA where there is one")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default bfloat16, on a CPU float32")
    add("--seed", type=int, default=0)
    add("--output", help="path of the results without suffix; default eval/results/latency_<device>")
    add("--quick", action="store_true", help="few rows, short contexts: runs/latency_quick")
    add("--predict", metavar="DEVICES", help=f"time nothing: a table on paper for {', '.join(PEAKS)}, with commas")
    add("--measured", metavar="FILE", help="a JSON file of this program, to stand beside the prediction for a device")
    predicting = parser.parse_known_args()[0].predict is not None
    args = full_or_quick(parser, FULL | PREDICTED if predicting else FULL, QUICK)
    with exit_on_unusable_input():
        if not predicting:
            report(args)
            return
        timing = [name for name in (*TIMING, "quick", "output") if getattr(args, name) != parser.get_default(name)]
        if timing:
            raise ValueError(f"predict: expected no options of steps that are timed, found {', '.join(timing)}")
        predict(args)


def report(args: argparse.Namespace) -> None:
    """The whole measurement; results are written anew after every group, so that a run cut off leaves what it had."""
    logging.disable_progress_bar()
    if args.measured is not None:
        raise ValueError("measured: expected --predict beside it, found none")
    device = device_of(args.device)
    plan = plan_of(args, device)
    subject = load_subject(args, device, max(plan.drafted))
    base, bandwidth = subject.target.base, copy_bandwidth(device)
    bound = StepBound(
        bandwidth,
        weight_bytes_per_step(base),
        0 if subject.lora is None else lora_bytes_per_step(subject.lora, subject.target.dtype),
        subject.facts.bytes_per_slot,
    )
    result = facts(args, subject, plan, bound) | {"rows": [], "profiles": [], "left_out": [], "is_complete": False}
    stem = output_stem("latency", args.output, args.quick, device)
    with tqdm(total=plan.blocks_per_group * len(plan.variants) * len(plan.contexts), unit="block") as bar:
        for index, variant in enumerate(plan.variants):
            if variant.compile:
                # compiled code does not tell a base with a LoRA's hooks from one without
                torch._dynamo.reset()
            for context in plan.contexts:
                on = f"{', compiled' * variant.compile}{', LoRA' * variant.lora}{', head' * variant.head}"
                bar.set_description(f"context {context}{on}")
                group = measure_group(subject, variant, context, plan, bound, bar.update)
                for key, found in group.items():
                    result[key] += found
                result["is_complete"] = (index + 1, context) == (len(plan.variants), plan.contexts[-1])
                if result["rows"]:
                    write_results(result, stem)
    if not result["rows"]:
        raise ValueError(f"nothing could be measured: {result['left_out'][0]['reason']}")
    print_results(result)
    print(json.dumps(result))


def predict(args: argparse.Namespace) -> None:
    """The table on paper: counts the steps of a shape, and what each device would take for them."""
    devices, dtype = peaks_of(args.predict), args.dtype or "bfloat16"
    if args.shape is None:
        raise ValueError("predict: expected a --shape, found none")
    if dtype == "float32":
        raise ValueError("dtype: expected bfloat16 or float16, whose peaks are known, found float32")
    if args.lora_rank < 1:
        raise ValueError(f"lora_rank: expected an integer >= 1, found {args.lora_rank}")
    measured = given_result(args.measured, args.shape, dtype, len(devices))
    contexts, drafted = integers("contexts", args.contexts), sorted({0, *drafted_of(args.rows)})
    steps = [(0, False), *((K, lora) for lora in SETTINGS[args.lora] for K in drafted if K)]
    places = [(*step, context) for context in contexts for step in steps]
    shape = ShapeOnly(config_of(args.shape), getattr(torch, dtype), args.lora_rank)
    counted = [shape.count(*place) for place in tqdm(places, unit="step")]
    result = {"model": args.shape, "dtype": dtype, **constants(), "devices": []}
    for peaks in devices:
        found = measured or matching_result(args.shape, dtype, peaks.reported_as, RESULTS)
        rows = beside_measured(figures(counted, peaks, args.lora_rank), found)
        measured_on = None if found is None else found["device"]
        result["devices"].append(vars(peaks) | {"measured_on": measured_on, "rows": rows})
    result |= {"versions": library_versions(), "git_commit": git_commit(), "command": command_line()}
    print_prediction(result)
    print(json.dumps(result))


# ---------------------------------------------------------------------- what is asked for


def given_result(path: str | None, shape: str, dtype: str, num_devices: int) -> dict | None:
    """What --measured names, if it was measured with this shape and dtype; on which device, the table will say."""
    if path is None:
        return None
    if num_devices > 1:
        raise ValueError(f"measured: expected a file beside one device, found one beside {num_devices}")
    result = read_result(Path(path))
    if (result["model"], result["dtype"]) != (shape, dtype):
        raise ValueError(
            f"measured: expected {shape} in {dtype}, found {result['model']} in {result['dtype']} in {path}"
        )
    return result


def device_of(name: str | None) -> torch.device:
    """The device, if this machine has it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = device if name is None else torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        device = torch.device("meta")
    if device.type not in STEPS_PER_BLOCK:
        raise ValueError(f"device: expected a CPU or CUDA device of this machine, found {name!r}")
    return device


def plan_of(args: argparse.Namespace, device: torch.device) -> Plan:
    """The plan; refuses what no model could be measured with."""
    if args.directory is None and args.shape is None:
        if not args.quick:
            raise ValueError("directory: expected an adapter directory, --shape or --quick, found none of them")
        args.shape = QUICK_SHAPE
    if args.directory is not None and args.shape is not None:
        raise ValueError("shape: expected no --shape beside an adapter directory, found both")
    for option in ("repetitions", "lora_rank"):
        if getattr(args, option) < 1:
            raise ValueError(f"{option}: expected an integer >= 1, found {getattr(args, option)}")
    if args.profile and device.type != "cuda":
        raise ValueError(f"profile: expected a CUDA device, found {device.type}")
    drafted = drafted_of(args.rows)
    forced = args.forced_acceptance
    if forced is not None and not 0 <= forced <= max(drafted):
        raise ValueError(f"forced_acceptance: expected 0 to {max(drafted)} drafts, which the rows hold, found {forced}")
    attentions = list(dict.fromkeys(args.attention.split(",")))
    if not set(attentions) <= set(ATTENTIONS):
        raise ValueError(f"attention: expected some of {', '.join(ATTENTIONS)}, found {args.attention!r}")
    has_head = args.directory is not None and load_adapter(args.directory).metadata.head is not None
    return Plan(
        variants=[
            Variant(compile, lora, attention, head)
            for attention in attentions
            for compile in SETTINGS[args.compile]
            for lora in SETTINGS[args.lora]
            for head in SETTINGS[args.head or (BOTH if has_head else NO)]
        ],
        contexts=integers("contexts", args.contexts),
        drafted=sorted({0, *(K for K in drafted if forced is None or forced <= K)}),
        steps_per_block=STEPS_PER_BLOCK[device.type],
        repetitions=args.repetitions,
        forced_acceptance=forced,
        profile=args.profile,
        seed=args.seed,
    )


def drafted_of(rows: str) -> list[int]:
    """K of every row count, ascending."""
    drafted = [math.isqrt(number) - 1 for number in integers("rows", rows)]
    if [(K + 1) ** 2 for K in drafted] != integers("rows", rows):
        raise ValueError(f"rows: expected squares (K + 1)^2 such as 1, 4, 9, found {rows}")
    most = (MAX_SPECULATIVE_TOKENS + 1) ** 2
    if (drafted[-1] + 1) ** 2 > most:
        raise ValueError(f"rows: expected at most {most}, found {rows}")
    return drafted


def load_subject(args: argparse.Namespace, device: torch.device, max_drafted: int) -> Subject:
    """Random numbers in the shape that was asked for, or an adapter with its base."""
    if args.directory is not None:
        model = pardec.load(args.directory, device=device, dtype=args.dtype)
        adapter = model.adapter
        assert adapter is not None
        shared, trained = adapter.metadata.mask_sharing == "shared", adapter.metadata.num_speculative_tokens
        masks = adapter.embeddings_for(max_drafted if shared else min(max_drafted, trained))
        masks = masks.to(model.target.device, model.target.dtype)
        return Subject(model.target, masks, adapter.lora, model.engines.head)
    default = torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = default if args.dtype is None else getattr(torch, args.dtype)
    base = random_model(config_of(args.shape), device, dtype, args.seed)
    lora = None if args.lora == NO else random_lora(base, args.lora_rank, args.seed)
    return Subject(TargetModel.wrap(base), random_mask_embeddings(base, max(max_drafted, 1), args.seed), lora)


def facts(args: argparse.Namespace, subject: Subject, plan: Plan, bound: StepBound) -> dict:
    """What the rows depend on."""
    base, head = subject.target.base, subject.target.base.get_output_embeddings()
    return {
        "model": args.shape if args.directory is None else load_adapter(args.directory).metadata.base.name,
        "adapter": args.directory,
        "num_parameters": base.num_parameters(),
        "tied_embeddings": head is not None and head.weight is base.get_input_embeddings().weight,
        "lora_rank": None if subject.lora is None else subject.lora.rank,
        **vars(bound),
        "steps_per_block": plan.steps_per_block,
        "repetitions": plan.repetitions,
        "forced_acceptance": plan.forced_acceptance,
        "captured": subject.target.device.type == "cuda",
        "seed": plan.seed,
        "dtype": dtype_name(subject.target.dtype),
        **provenance(subject.target.device),
    }


if __name__ == "__main__":
    main()
