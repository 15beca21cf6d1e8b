"""Runs vLLM's own engine on prompts of token ids, in the environment that holds it: `python vllm_run.py ASKED FOUND`.

ASKED is a JSON file with `model`, `prompts`, `max_new_tokens`, `batch_size`, and `draft` (the folder, or null for plain
decoding), `num_speculative_tokens`, `options` (more of the speculative configuration). FOUND gets tokens and counters.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}


def main() -> None:
    from vllm import LLM, SamplingParams

    asked = json.loads(Path(sys.argv[1]).read_text())
    speculative = None
    if asked["draft"] is not None:
        speculative = {
            "method": "draft_model",
            "model": asked["draft"],
            "num_speculative_tokens": asked["num_speculative_tokens"],
            "parallel_drafting": True,
            **asked.get("options", {}),
        }
    llm = LLM(
        model=asked["model"],
        dtype="float32",
        enforce_eager=not asked.get("compile", False),
        max_model_len=asked.get("max_model_len", 1024),
        max_num_seqs=asked["batch_size"],
        disable_log_stats=False,
        enable_prefix_caching=False,
        speculative_config=speculative,
        **asked.get("engine", {}),
    )
    law = SamplingParams(temperature=0.0, max_tokens=asked["max_new_tokens"], ignore_eos=asked.get("ignore_eos", False))
    done = llm.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], law, use_tqdm=False)
    counted = {
        metric.name.removeprefix("vllm:spec_decode_"): metric.value if hasattr(metric, "value") else list(metric.values)
        for metric in llm.get_metrics()
        if "spec_decode" in metric.name
    }
    found = {"tokens": [list(one.outputs[0].token_ids) for one in done], "counted": counted}
    found["own_parameters"], found["target_parameters"] = llm.collective_rpc(parameters)[0]
    Path(sys.argv[2]).write_text(json.dumps(found))


def parameters(worker) -> tuple[int, int]:
    """Numbers that the draft holds and the target does not, and numbers of the target."""
    target, drafter = worker.model_runner.model, getattr(worker.model_runner, "drafter", None)
    theirs = {id(parameter) for parameter in target.parameters()}
    size = sum(parameter.numel() for parameter in target.parameters())
    if drafter is None:
        return 0, size
    return sum(parameter.numel() for parameter in drafter.model.parameters() if id(parameter) not in theirs), size


if __name__ == "__main__":
    main()
