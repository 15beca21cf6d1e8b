"""vLLM's own engine behind a pipe: started by the python of an environment that holds vLLM, it decodes what it is told.

Standard input has a line of JSON with `model`, the folder of a draft or null, and how to serve; then one for each call
with `prompts`, token ids, `max_new_tokens` and perhaps `law`, more of how tokens are chosen. Standard output answers
every line by one: the first by the version and sizes, a call by its new tokens, greedy, never ended by EOS, the CPU
seconds of this process, all threads together, and vLLM's counters of drafts, by what they grew. Imports nothing of this
project, which is not on that python's path.
"""

# pyright: reportMissingImports=false

import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}


def main() -> None:
    """Answers until standard input ends."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # vLLM prints there
        asked = json.loads(sys.stdin.readline())
        llm = engine(asked)
        import vllm

        own, target = llm.collective_rpc(parameters)[0]
        about = {"version": vllm.__version__, "own_parameters": own, "target_parameters": target}
        print(json.dumps(about), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(decoded(llm, **json.loads(line))), file=answers, flush=True)


def engine(asked: Mapping[str, Any]) -> Any:
    """The engine.

    Args:
        asked: `model`, `dtype`, `max_model_len`, `max_num_seqs`, `draft` (a folder, or null for plain decoding) with
            `num_speculative_tokens` and `options` (more of the speculative configuration), `kv_cache_bytes` of target
            and draft together, default 256 MiB, `engine` (more of vLLM's).
    """
    from vllm import LLM

    speculative = None
    if asked.get("draft") is not None:
        speculative = {
            "method": "draft_model",
            "model": asked["draft"],
            "num_speculative_tokens": asked["num_speculative_tokens"],
            "parallel_drafting": True,
            **asked.get("options", {}),
        }
    return LLM(
        model=asked["model"],
        dtype=asked["dtype"],
        max_model_len=asked["max_model_len"],
        max_num_seqs=asked["max_num_seqs"],
        kv_cache_memory_bytes=asked.get("kv_cache_bytes", 2**28),
        disable_log_stats=False,
        enable_prefix_caching=False,
        speculative_config=speculative,
        **asked.get("engine", {}),
    )


def decoded(
    llm: Any, prompts: list[list[int]], max_new_tokens: int, law: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """New tokens of every prompt, what they cost and what was counted."""
    from vllm import SamplingParams

    asked = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, ignore_eos=True, **(law or {}))
    before, start = counters(llm), time.process_time()
    done = llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
    seconds = time.process_time() - start
    grown = {name: grown_by(before.get(name), value) for name, value in counters(llm).items()}
    return {"tokens": [list(one.outputs[0].token_ids) for one in done], "cpu_seconds": seconds, "counted": grown}


def counters(llm: Any) -> dict[str, Any]:
    """Of drafts: numbers, and a list by position."""
    return {
        metric.name.removeprefix("vllm:spec_decode_"): metric.value if hasattr(metric, "value") else list(metric.values)
        for metric in llm.get_metrics()
        if "spec_decode" in metric.name
    }


def grown_by(before: Any, after: Any) -> Any:
    """What was added to a counter, or to each of a list of them."""
    if isinstance(after, list):
        return [new - old for old, new in zip(before or [0] * len(after), after, strict=True)]
    return after - (before or 0)


def parameters(worker: Any) -> tuple[int, int]:
    """Numbers that the draft holds and the target does not, and numbers of the target."""
    target, drafter = worker.model_runner.model, getattr(worker.model_runner, "drafter", None)
    theirs = {id(parameter) for parameter in target.parameters()}
    size = sum(parameter.numel() for parameter in target.parameters())
    if drafter is None:
        return 0, size
    return sum(parameter.numel() for parameter in drafter.model.parameters() if id(parameter) not in theirs), size


if __name__ == "__main__":
    main()
