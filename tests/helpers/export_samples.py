"""Adapters of the packaged model to be exported, and what is said of folders."""

from pathlib import Path

from pardec.adapters.adapter import Adapter
from pardec.adapters.files import save_adapter
from pardec.adapters.gated_lora import LoraWeights
from pardec.exports.export import export_adapter

K = 3
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# what each door can hold, as arguments of `make_adapter`
PARTS = {
    "vllm": {"lora_rank": 4, "head_width": 8},
    "vllm-stock": {"mask_sharing": "shared"},
    "sglang": {"lora_rank": 4, "draft_input": "uniform_noise"},
    "transformers": {"lora_rank": 4, "head_width": 8},
    "peft": {"lora_rank": 4, "head_width": 8},
}
MEASURED = {
    "split": "validation",
    "num_prompts": 16,
    "sampled": {"temperature": 0.8, "top_k": 10, "mean_acceptance_length": 1.9},
    "greedy": {"mean_acceptance_length": 2.3},
}


def sample(packaged_adapter, door: str, **changes) -> Adapter:
    """An adapter that the door can hold, measured, trained from a path of its machine."""
    adapter = packaged_adapter(K, **(PARTS[door] | changes))
    adapter.metadata.measured.update(MEASURED)
    adapter.metadata.training.update(
        {
            "device": "a CPU (of 2024), 2 threads",
            "command": "train_adapter.py recipes/mine.yaml data.path=/home/me/texts.jsonl",
            "recipe": {"base": "/home/me/models/tiny", "data": {"path": "/home/me/texts.jsonl"}, "seeds": [1, "~/x"]},
        }
    )
    if adapter.lora is not None:
        written = {"base_model_name_or_path": "/home/me/models/tiny", "target_modules": list(PROJECTIONS)}
        adapter.lora.config.update(written)
    return adapter


def exported(adapter: Adapter, door: str, folder: Path, **options) -> Path:
    """The adapter, saved in `folder` and exported beside; asserts that nothing is wrong with it."""
    save_adapter(adapter, folder / "adapter")
    found = export_adapter(folder / "adapter", door, folder / "out", **options)
    assert found.problems == []
    return folder / "out"


def only(adapter: Adapter, *suffixes: str) -> LoraWeights:
    """The adapter's LoRA on some of its projections."""
    assert adapter.lora is not None
    tensors = {name: t for name, t in adapter.lora.tensors.items() if name.split(".")[-3] in suffixes}
    assert tensors
    return LoraWeights(adapter.lora.config, tensors)
