"""How fast is each way to decode, beside plain decoding and what transformers offers?

    python eval/speed.py runs/quickstart [DIR2 ...] [--assistant NAME_OR_PATH] [--prompts FILE.jsonl] [--quick]

All ways of decoding run in one process on the same prompts, in turn; the first pass warms up and is not counted. EOS
is ignored unless --stop-at-eos is given, so that all ways decode equally many tokens. Writes a table, JSON and a
picture into eval/results; the last line printed is one JSON object. Exit code 1 if greedy tokens of any way are not
those of `model.generate` for each prompt alone, ties of the arithmetic aside.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from reporting.result_files import output_stem, provenance
from reporting.speed_tables import print_results, write_results
from timing.baselines import ALWAYS, Setting, Way, check_assistant, model_bytes, ways_for
from timing.calls import rows_of, time_ways
from timing.options import add_prompt_options, check_device, full_or_quick, integers
from timing.references import References
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

import pardec
from pardec.adapters.files import load_adapter
from pardec.data.benchmarks import Prompt, read_prompts
from pardec.decoding.sampling import make_warpers
from pardec.model import SelfSpeculativeModel
from pardec.run import dtype_name, exit_on_unusable_input
from pardec.target.base import load_base, neutral_generation_config

DTYPES = ("float32", "bfloat16", "float16", "float64")
FULL = {"num_prompts": 16, "max_new_tokens": 128, "batch_sizes": "1,4,16", "repetitions": 3}
QUICK = {"num_prompts": 2, "max_new_tokens": 16, "batch_sizes": "1,2", "repetitions": 1}
MAX_PROMPT_TOKENS = 1024
OUT_OF_MEMORY = "one of the ways ran out of the device's memory at this batch size"


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("directories", nargs="+", help="adapter directories, all of one base")
    add("--base", help="base model, if not the one that the first adapter names")
    add("--assistant", help="folder or hub name of a smaller model with the same vocabulary")
    add_prompt_options(parser)
    add("--num-prompts", type=int, help=f"default {FULL['num_prompts']}")
    add("--max-new-tokens", type=int, help=f"default {FULL['max_new_tokens']}")
    add("--batch-sizes", help=f"numbers with commas, default {FULL['batch_sizes']}")
    add("--num-speculative-tokens", help="of fused mode, with commas; default 1,2,4 and what was trained")
    add("--tuned-only", action="store_true", help="of what drafts with mask tokens, only what pardec tune chose")
    add(
        "--without",
        default="",
        metavar="WAYS",
        help="names of ways to leave out, with commas: 'prompt lookup,two_pass'",
    )
    add("--temperature", type=float, default=0.8, help="of the sampled setting")
    add("--top-k", type=int, default=10, help="of the sampled setting")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--greedy-only", action="store_true")
    only.add_argument("--sampled-only", action="store_true")
    add("--repetitions", type=int, help=f"counted passes, default {FULL['repetitions']}; one more warms up")
    add("--warm-up", type=int, help="batches that warm up; default all, as on CUDA shapes are captured one by one")
    add("--stop-at-eos", action="store_true", help="end at EOS; speeds then count emitted tokens only")
    add("--compile", action="store_true", help="compile pardec's own steps, plain ones too")
    add("--device", help="default CUDA where there is one")
    add("--dtype", choices=DTYPES, help="default float32 on a CPU, the checkpoint's own on CUDA")
    add("--output", help="path of the results without suffix; default eval/results/speed_<device>")
    add("--quick", action="store_true", help="few prompts and tokens, for a first look: runs/speed_quick")
    args = full_or_quick(parser, FULL, QUICK)
    with exit_on_unusable_input():
        sys.exit(report(args))


def report(args: argparse.Namespace) -> int:
    """The whole measurement; returns the exit code."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # `generate` warns of what its own assisted decoding passes to it
    settings, batch_sizes, asked_k = check_options(args)
    models = load_models(args)
    model = next(iter(models.values()))
    base, device = model.base_model, model.target.device
    base.generation_config = neutral_generation_config(base, args.stop_at_eos)
    assistant = load_assistant(args.assistant, base, args.stop_at_eos)
    prompts = prompts_for(model, args)
    if batch_sizes[-1] > len(prompts):
        raise ValueError(
            f"batch_sizes: expected at most {len(prompts)}, the number of prompts, found {batch_sizes[-1]}"
        )
    batches = {size: batches_of(prompts, size) for size in batch_sizes}
    which = {"tuned_only": args.tuned_only, "without": left_out_names(args.without)}
    plan = [
        (setting, size, *ways_for(models, asked_k, assistant, setting, size, **which))
        for setting in settings
        for size in batch_sizes
    ]
    result: dict[str, Any] = {"rows": [], "left_out": [], "problems": [], "is_complete": False}
    result |= facts(args, model, prompts, batch_sizes)
    stem, references = output_stem("speed", args.output, args.quick, device), References(base, args.max_new_tokens)
    for number, found in enumerate(measure_each(plan, batches, models, references, args), start=1):
        for key, values in found.items():
            result[key] += values
        result["is_complete"] = number == len(plan)
        if result["rows"]:  # after each group, so that a run that is cut off leaves what it had
            write_results(result, stem)
    if not result["rows"]:
        raise ValueError("device: expected memory for one batch size at least, found too little for all")
    print_results(result)
    print(json.dumps(result))
    return 1 if result["problems"] else 0


def measure_each(
    plan: Sequence[tuple[Setting, int, list[Way], list[dict[str, str]]]],
    batches: dict[int, list[list[Prompt]]],
    models: dict[str, SelfSpeculativeModel],
    references: References,
    args: argparse.Namespace,
) -> Iterator[dict[str, list]]:
    """Rows, what is left out, and problems of each setting and batch size of the plan, which stand with their ways."""
    device = next(iter(models.values())).target.device
    num_calls = sum(
        len(ways) * (len(batches[size]) * args.repetitions + len(batches[size][: args.warm_up]))
        for _, size, ways, _ in plan
    )
    with tqdm(total=num_calls, unit="call") as bar:
        for setting, size, ways, without in plan:
            bar.set_description(f"{setting.name}, batch {size}")
            ids = [[prompt.token_ids for prompt in batch] for batch in batches[size]]
            place = {"setting": setting.name, "batch_size": size}
            left_out = [place | one for one in without]
            options = {"repetitions": args.repetitions, "num_warm_up": args.warm_up, "on_call": bar.update}
            try:
                with room_for(models.values(), len(ways)):
                    timed = time_ways(ways, ids, device=device, **options)
            except torch.OutOfMemoryError:  # what smaller batches gave is worth keeping
                left_out += [place | {"way": w.name, "adapter": w.adapter, "reason": OUT_OF_MEMORY} for w in ways]
                yield {"left_out": left_out}
                continue
            if size == 1 and not setting.temperature:
                references.take(timed, ids)
            found, wrong = rows_of(timed, batches[size], None if setting.temperature else references.compare)
            problems = [f"batch {size}, {problem}" for problem in wrong]
            yield {"rows": [place | row for row in found], "left_out": left_out, "problems": problems}


@contextmanager
def room_for(models: Iterable[SelfSpeculativeModel], num_ways: int) -> Iterator[None]:
    """Lets each model keep what it has captured or compiled for that many ways, which take turns under the clock."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(model.engines.room_for(num_ways))
        yield


def check_options(args: argparse.Namespace) -> tuple[list[Setting], list[int], list[int] | None]:
    """Settings, batch sizes and K of fused mode, None for the default ones; refuses what no model could use."""
    for option in ("num_prompts", "max_new_tokens", "repetitions", "warm_up"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise ValueError(f"{option}: expected an integer >= 1, found {getattr(args, option)}")
    if args.temperature == 0:
        raise ValueError("temperature: expected more than 0, which is what the greedy rows have, found 0")
    make_warpers(args.temperature, args.top_k, None, None)
    batch_sizes = integers("batch_sizes", args.batch_sizes)
    check_device(args.device)
    greedy = Setting("greedy", args.max_new_tokens)
    sampled = Setting("sampled", args.max_new_tokens, args.temperature, args.top_k)
    settings = [greedy] * (not args.sampled_only) + [sampled] * (not args.greedy_only)
    asked = args.num_speculative_tokens
    return settings, batch_sizes, None if asked is None else integers("num_speculative_tokens", asked)


def left_out_names(asked: str) -> list[str]:
    """Names of ways that are not to be timed; refuses those that every table has."""
    names = [name.strip() for name in asked.split(",") if name.strip()]
    if set(names) & set(ALWAYS):
        raise ValueError(f"without: expected none of {', '.join(ALWAYS)}, to which all is compared, found {asked!r}")
    return names


def labelled(directories: Sequence[str]) -> dict[str, str]:
    """Adapter directories by what tables call them: the last folder's name where that is enough."""
    names = [Path(directory).resolve().name for directory in directories]
    return dict(zip(names if len(set(names)) == len(names) else directories, directories, strict=True))


def load_models(args: argparse.Namespace) -> dict[str, SelfSpeculativeModel]:
    """The models by label, all on one loaded base."""
    reference = load_adapter(args.directories[0]).metadata.base
    revision = reference.revision if args.base is None else None
    base = load_base(args.base or reference.name, device=args.device, dtype=args.dtype, revision=revision)
    return {
        label: pardec.load(directory, base=base, compile=args.compile)
        for label, directory in labelled(args.directories).items()
    }


def load_assistant(name: str | None, base: PreTrainedModel, stop_at_eos: bool) -> PreTrainedModel | None:
    """The assistant in the base's dtype, on its device."""
    if name is None:
        return None
    assistant = load_base(name, device=base.device, dtype=base.dtype)
    check_assistant(base, assistant)
    assistant.generation_config = neutral_generation_config(assistant, stop_at_eos)
    return assistant


def prompts_for(model: SelfSpeculativeModel, args: argparse.Namespace) -> list[Prompt]:
    """The prompts, with room in the model for what is decoded."""
    limit = model.target.max_positions
    room = MAX_PROMPT_TOKENS if limit is None else min(MAX_PROMPT_TOKENS, limit - args.max_new_tokens)
    if room < 1:
        raise ValueError(
            f"max_new_tokens: expected fewer than the model's {limit} positions, found {args.max_new_tokens}"
        )
    options = {"split": args.split, "num_prompts": args.num_prompts, "max_prompt_tokens": room}
    return read_prompts(args.prompts, model.tokenizer, **options)


def batches_of(prompts: Sequence[Prompt], size: int) -> list[list[Prompt]]:
    """Full batches, without the prompts that would not fill one; the longest first, as static caches only grow."""
    batches = [list(prompts[start : start + size]) for start in range(0, len(prompts) - size + 1, size)]
    return sorted(batches, key=lambda batch: -max(len(prompt.token_ids) for prompt in batch))


def facts(args: argparse.Namespace, model: SelfSpeculativeModel, prompts: Sequence[Prompt], sizes: list[int]) -> dict:
    """What the rows depend on: settings, base, device, versions, command."""
    assert model.adapter is not None
    asked = ("prompts", "split", "max_new_tokens", "repetitions", "temperature", "top_k", "stop_at_eos", "compile")
    return {
        **{name: getattr(args, name) for name in asked},
        "num_prompts": len(prompts),
        "batch_sizes": sizes,
        "adapters": labelled(args.directories),
        "base": args.base or model.adapter.metadata.base.name,
        "assistant": args.assistant,
        "weights_mib": round(model_bytes(model.base_model) / 2**20, 1),
        "dtype": dtype_name(model.target.dtype),
        **provenance(model.target.device),
    }


if __name__ == "__main__":
    main()
