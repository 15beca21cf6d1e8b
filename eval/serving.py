"""How many tokens does a second of CPU time bring in vLLM, plain and with an adapter, beside pardec itself?

    python eval/serving.py DIR [DIR2 ...] --vllm-python runs/engines/vllm/bin/python [--batch-sizes 1,8] [--quick]

Exports every adapter by those doors of vLLM that take it, starts vLLM in its own environment, once for each way of
serving, and lets all ways decode the same prompts in turn: greedily, in float32, equally many tokens, EOS ignored. What
is counted is the CPU time of the process that decodes, prefill included, on one thread unless --threads says otherwise;
starting is not, nor is a first pass over the prompts. vLLM compiles its steps, as it does by itself, unless
--enforce-eager is given; those of pardec are not compiled. Writes JSON and a table into eval/results; the last line
printed is one JSON object. Exit code 1 if tokens of any way are not those of `model.generate` for each prompt alone,
ties of the arithmetic aside.
"""

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from reporting.result_files import output_stem, provenance, write_page
from reporting.serving_tables import page_of, print_result
from timing.options import add_prompt_options, full_or_quick, integers
from timing.references import References
from timing.serving_ways import Engines, Way, decode_in_turn, row_of, ways_of
from tqdm.auto import tqdm
from transformers.utils import logging

import pardec
from pardec.adapters.files import load_adapter
from pardec.data.benchmarks import Prompt, read_prompts
from pardec.model import SelfSpeculativeModel
from pardec.run import exit_on_unusable_input
from pardec.target.base import load_base, neutral_generation_config

FULL = {"num_prompts": 8, "max_new_tokens": 128, "batch_sizes": "1,8", "repetitions": 2}
QUICK = {"num_prompts": 2, "max_new_tokens": 16, "batch_sizes": "1", "repetitions": 1}
MAX_PROMPT_TOKENS = 512
DRAFT_ROOM = 16  # positions behind the last token, into which vLLM drafts
CPU = torch.device("cpu")


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("directories", nargs="+", help="adapters, all of one base")
    add("--vllm-python", required=True, help="of an environment with vLLM and pardec, such as make test-vllm makes")
    add("--base", help="base model, if not the one that the first adapter names")
    add_prompt_options(parser)
    add("--chat", action="store_true", help="each prompt of a file is a user's message for the chat template")
    add("--num-prompts", type=int, help=f"default {FULL['num_prompts']}")
    add("--max-new-tokens", type=int, help=f"default {FULL['max_new_tokens']}")
    add("--batch-sizes", help=f"prompts that are decoded together, numbers with commas, default {FULL['batch_sizes']}")
    add("--num-speculative-tokens", help="numbers with commas; default 1 and what an adapter was trained with")
    add("--repetitions", type=int, help=f"counted passes, default {FULL['repetitions']}; one more warms up")
    add("--threads", type=int, default=1, help="of every way, default 1")
    add("--enforce-eager", action="store_true", help="vLLM does not compile")
    add("--output", help="path of the results without suffix; default eval/results/serving_cpu")
    add("--quick", action="store_true", help="few prompts and tokens, for a first look: runs/serving_quick")
    args = full_or_quick(parser, FULL, QUICK)
    with exit_on_unusable_input():
        sys.exit(report(args))


def report(args: argparse.Namespace) -> int:
    """The whole measurement; returns the exit code."""
    logging.disable_progress_bar()
    for option in ("num_prompts", "max_new_tokens", "repetitions", "threads"):
        if getattr(args, option) < 1:
            raise ValueError(f"{option}: expected an integer >= 1, found {getattr(args, option)}")
    sizes, asked_k = integers("batch_sizes", args.batch_sizes), args.num_speculative_tokens
    asked_k = None if asked_k is None else integers("num_speculative_tokens", asked_k)
    torch.set_num_threads(args.threads)
    directories = labelled(args.directories)
    base_name, models = load_models(directories, args.base)
    model = next(iter(models.values()))
    prompts = prompts_for(model, args)
    if sizes[-1] > len(prompts):
        raise ValueError(f"batch_sizes: expected at most {len(prompts)}, the number of prompts, found {sizes[-1]}")
    references, rows, problems = References(model.base_model, args.max_new_tokens), [], []
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory()))
        settings = vllm_settings(args, model, prompts, sizes[-1])
        engines = Engines(args.vllm_python, base_name, settings, args.threads, folder, running)
        ways, left_out, version = ways_of(models, directories, asked_k, engines)
        for size in sizes:
            batches = [prompts[start : start + size] for start in range(0, len(prompts) - size + 1, size)]
            with tqdm(
                total=len(ways) * len(batches) * (args.repetitions + 1), unit="call", desc=f"batch {size}"
            ) as bar:
                ids = [[prompt.token_ids for prompt in batch] for batch in batches]
                limits = {"max_new_tokens": args.max_new_tokens, "repetitions": args.repetitions}
                decode_in_turn(ways, ids, **limits, on_call=bar.update)
            for way in ways:
                wrong, num_ties = compare(way, batches, references)
                problems += [f"batch {size}, {way.label}: {one}" for one in wrong]
                rows.append({"batch_size": size, **row_of(way, ways), "identical": not wrong, "num_ties": num_ties})
    asked = ("prompts", "split", "chat", "max_new_tokens", "repetitions", "threads", "enforce_eager")
    result = {
        "rows": rows,
        "left_out": left_out,
        "problems": problems,
        **{name: getattr(args, name) for name in asked},
        "num_prompts": len(prompts),
        "prompt_tokens": [f([len(prompt.token_ids) for prompt in prompts]) for f in (min, max)],
        "adapters": directories,
        "base": base_name,
        "dtype": "float32",
        **provenance(CPU),
    }
    result["versions"] = result["versions"] | {"vllm": version}
    write_page(result, output_stem("serving", args.output, args.quick, CPU), page_of(result))
    print_result(result)
    print(json.dumps(result))
    return 1 if problems else 0


def labelled(directories: list[str]) -> dict[str, str]:
    """Adapters by what tables call them: the last folder's name where that is enough."""
    names = [Path(directory).resolve().name for directory in directories]
    return dict(zip(names if len(set(names)) == len(names) else directories, directories, strict=True))


def load_models(directories: dict[str, str], base: str | None) -> tuple[str, dict[str, SelfSpeculativeModel]]:
    """The base's name, and models by label, all on one loaded base that ends no text."""
    reference = load_adapter(next(iter(directories.values()))).metadata.base
    name, revision = (reference.name, reference.revision) if base is None else (base, None)
    loaded = load_base(name, device=CPU, dtype="float32", revision=revision)
    loaded.generation_config = neutral_generation_config(loaded, stop_at_eos=False)
    return name, {label: pardec.load(directory, base=loaded) for label, directory in directories.items()}


def prompts_for(model: SelfSpeculativeModel, args: argparse.Namespace) -> list[Prompt]:
    """The prompts, with room in the model for what is decoded and drafted behind it."""
    limit = model.target.max_positions
    room = MAX_PROMPT_TOKENS if limit is None else min(MAX_PROMPT_TOKENS, limit - args.max_new_tokens)
    if room < 1:
        raise ValueError(
            f"max_new_tokens: expected fewer than the model's {limit} positions, found {args.max_new_tokens}"
        )
    options = {"split": args.split, "num_prompts": args.num_prompts, "max_prompt_tokens": room, "as_chat": args.chat}
    return read_prompts(args.prompts, model.tokenizer, **options)


def vllm_settings(
    args: argparse.Namespace, model: SelfSpeculativeModel, prompts: list[Prompt], max_num_seqs: int
) -> dict[str, Any]:
    """How every engine of vLLM is started, by the words of vllm_engine.py."""
    assert model.adapter is not None
    engine = {"enforce_eager": args.enforce_eager}
    if model.adapter.metadata.fingerprint.architecture.get("sliding_window"):
        engine["disable_hybrid_kv_cache_manager"] = True  # without which vLLM takes no draft model
    limit = model.target.max_positions
    longest = max(len(prompt.token_ids) for prompt in prompts) + args.max_new_tokens + DRAFT_ROOM
    sizes = model.adapter.metadata.fingerprint.architecture
    heads = sizes.get("num_key_value_heads") or sizes["num_attention_heads"]
    width = sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]
    bytes_per_token = 4 * 2 * sizes["num_hidden_layers"] * heads * width  # keys and values in float32
    return {
        "dtype": "float32",
        "max_model_len": longest if limit is None else min(longest, limit),
        "max_num_seqs": max_num_seqs,
        # target and draft, and as much again for blocks that are not full
        "kv_cache_bytes": max(2**28, 4 * bytes_per_token * longest * max_num_seqs),
        "engine": engine,
    }


def compare(way: Way, batches: list[list[Prompt]], references: References) -> tuple[list[str], int]:
    """A line for each text that is not that of `generate`, and the number of those in which a tie decided."""
    wrong, num_ties = [], 0
    for call, batch in zip(way.calls, batches * (len(way.calls) // len(batches)), strict=True):
        for prompt, tokens in zip(batch, call.tokens, strict=True):
            found = references.compare(prompt, tokens)
            if found is not None and found.explained:
                num_ties += 1
            elif found is not None:
                wrong.append(f"{prompt.name}: another token {found.index} than that of generate")
    return wrong, num_ties


if __name__ == "__main__":
    main()
