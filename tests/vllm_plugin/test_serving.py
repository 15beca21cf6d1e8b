"""Ways of serving that the draft is not made for are refused in one line."""

from types import SimpleNamespace

import pytest

from pardec.vllm_plugin.serving import refuse_unserved


def configuration(**changes):
    """Of vLLM, as far as it is read; `changes` by dotted name with __ for the dot."""
    found = SimpleNamespace(
        speculative_config=SimpleNamespace(
            method="draft_model",
            parallel_drafting=True,
            num_speculative_tokens=4,
            target_model_config=SimpleNamespace(hf_text_config=SimpleNamespace(hidden_size=256, head_dim=None)),
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        lora_config=None,
        model_config=SimpleNamespace(hf_config=SimpleNamespace(model_type="llama")),
    )
    for name, value in changes.items():
        *way, last = name.split("__")
        holder = found
        for step in way:
            holder = getattr(holder, step)
        setattr(holder, last, value)
    return found


@pytest.fixture
def adapter(packaged_adapter):
    return packaged_adapter(3)


@pytest.mark.parametrize("asked", [2, 3, 4])
def test_one_token_more_than_the_adapter_drafts_or_fewer_are_served(adapter, asked):
    refuse_unserved(configuration(speculative_config__num_speculative_tokens=asked), adapter)


def test_layers_of_two_kinds_are_served_where_their_keys_lie_together(adapter):
    two = {"model_config__hf_config__layer_types": ["sliding_attention", "full_attention"]}
    refuse_unserved(configuration(scheduler_config__disable_hybrid_kv_cache_manager=True, **two), adapter)
    refuse_unserved(configuration(model_config__hf_config__layer_types=["full_attention"] * 2), adapter)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"speculative_config": None}, "expected the folder as draft in --speculative-config with .* found none"),
        ({"speculative_config__parallel_drafting": False}, "found method draft_model, parallel_drafting False"),
        ({"speculative_config__method": "eagle"}, "found method eagle, parallel_drafting True"),
        ({"speculative_config__num_speculative_tokens": 1}, "num_speculative_tokens: expected 2 to 4, .* found 1"),
        (
            {"speculative_config__num_speculative_tokens": 5},
            "expected 2 to 4, one more than the adapter drafts, fo.* 5",
        ),
        ({"parallel_config__tensor_parallel_size": 2}, "pardec: expected tensor_parallel_size 1, found 2"),
        ({"parallel_config__pipeline_parallel_size": 4}, "pardec: expected pipeline_parallel_size 1, found 4"),
        (
            {"model_config__hf_config__layer_types": ["sliding_attention", "full_attention"]},
            "expected --disable-hybrid-kv-cache-manager for layers of full_attention, sliding_attention, found none",
        ),
        ({"lora_config": object()}, "pardec: expected a target without --enable-lora"),
        ({"model_config__hf_config__model_type": "opt"}, "pardec: expected a model_type of llama, .*, found opt"),
        (
            {"speculative_config__target_model_config__hf_text_config__hidden_size": 512},
            "expected the base that the adapter was trained for, with hidden_size 256, found a target with 512",
        ),
    ],
)
def test_other_ways_are_refused(adapter, changes, words):
    with pytest.raises(ValueError, match=words) as caught:
        refuse_unserved(configuration(**changes), adapter)
    assert "\n" not in str(caught.value)
