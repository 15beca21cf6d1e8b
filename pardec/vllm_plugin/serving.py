"""What the draft is not made for: ways of serving that would be wrong without a word, each told in one line.

Reads vLLM's configuration, imports nothing of vLLM.
"""

from typing import Any

from pardec.adapters.adapter import Adapter
from pardec.errors import shown
from pardec.vllm_plugin.architectures import ARCHITECTURES

# of the base that an adapter was trained for, by which its parts and the draft's attention are shaped
_SIZES = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


def refuse_unserved(vllm_config: Any, adapter: Adapter) -> None:
    """Checks the configuration that vLLM makes the draft with.

    Raises:
        ValueError: saying what was expected and what was found.
    """
    speculative, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    if speculative is None or speculative.method != "draft_model" or not speculative.parallel_drafting:
        found = "none"
        if speculative is not None:
            found = f"method {speculative.method}, parallel_drafting {speculative.parallel_drafting}"
        raise ValueError(
            "pardec: expected the folder as draft in --speculative-config with method draft_model and "
            f"parallel_drafting true, found {found}"
        )
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if getattr(parallel, name) != 1:
            raise ValueError(f"pardec: expected {name} 1, found {getattr(parallel, name)}")
    if vllm_config.lora_config is not None:
        raise ValueError("pardec: expected a target without --enable-lora, as its layers are the draft's, found one")
    kinds = set(getattr(vllm_config.model_config.hf_config, "layer_types", None) or ())
    if len(kinds) > 1 and not vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        names = ", ".join(sorted(kinds))
        raise ValueError(f"pardec: expected --disable-hybrid-kv-cache-manager for layers of {names}, found none")
    K, asked = adapter.metadata.num_speculative_tokens, speculative.num_speculative_tokens
    if not 2 <= asked <= K + 1:
        raise ValueError(
            f"num_speculative_tokens: expected 2 to {K + 1}, one more than the adapter drafts, found {asked}"
        )
    model_type = vllm_config.model_config.hf_config.model_type
    if model_type not in ARCHITECTURES:
        raise ValueError(f"pardec: expected a model_type of {', '.join(ARCHITECTURES)}, found {model_type}")
    _refuse_another_target(speculative.target_model_config.hf_text_config, adapter)


def _refuse_another_target(config: Any, adapter: Adapter) -> None:
    """Raises ValueError for a target whose layers the draft could borrow but not run; vLLM compares vocabularies."""
    trained = adapter.metadata.fingerprint.architecture
    for name in _SIZES:
        wanted, found = trained.get(name), getattr(config, name, None)
        if None not in (wanted, found) and wanted != found:
            raise ValueError(
                f"pardec: expected the base that the adapter was trained for, with {name} {shown(wanted)}, found a "
                f"target with {shown(found)}"
            )
