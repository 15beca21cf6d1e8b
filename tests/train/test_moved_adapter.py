"""An adapter of one base moved to another by the training script, with blocks that grow meanwhile."""

import json
from pathlib import Path

import pytest
import torch
import train_adapter
from data_samples import code_text
from programs import ROOT, Ended, run

from pardec.adapters.files import load_adapter
from pardec.target.base import load_base, load_tokenizer

SMALL = [
    "data.max_length=64", "train.batch_size=2", "train.anchors_per_sequence=8", "train.log_every=1", "train.steps=2",
    "train.warmup_steps=0", "eval.num_prompts=2", "eval.max_new_tokens=8", "adapter.num_speculative_tokens=2",
    "train.mixed_precision=no", "adapter.head=null", "adapter.lora.r=2", "adapter.lora.alpha=32",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With texts, an adapter of the packaged base in `source`, and in `tuned` a base that was tuned from that one."""
    folder = tmp_path_factory.mktemp("moved")
    (folder / "code.txt").write_text(code_text(900))
    base = load_base("tiny-python", device="cpu")
    torch.manual_seed(0)
    for parameter in base.parameters():
        parameter += 0.05 * parameter.std() * torch.randn_like(parameter)
    base.save_pretrained(folder / "tuned")
    load_tokenizer("tiny-python").save_pretrained(folder / "tuned")
    ended = train(folder, "source")
    assert ended.code == 0, ended.err[-2000:]
    return folder


def train(folder: Path, output: str, *overrides: str) -> Ended:
    where = (f"output_dir={folder / output}", f"data.path={folder / 'code.txt'}")
    return run(train_adapter.main, ROOT / "recipes/quickstart.yaml", *where, *SMALL, *overrides)


def test_an_adapter_moves_to_a_tuned_base_and_says_from_where(folder):
    moving = (f"base={folder / 'tuned'}", f"adapter.start_from={folder / 'source'}")
    refused = train(folder, "refused", *moving)
    assert refused.error.endswith("; adapter.transfer=true starts from it nevertheless")
    assert not (folder / "refused").exists()
    growing = "train.grow_speculative_tokens=[1, 2]"
    ended = train(folder, "moved", *moving, "adapter.transfer=true", growing, "train.lora_learning_rate=1e-9")
    assert ended.code == 0, ended.err[-2000:]
    source, moved = load_adapter(folder / "source"), load_adapter(folder / "moved")
    told = moved.metadata.training
    assert told["started_from"] == source.metadata.files
    assert told["moved_from"]["base"] == "tiny-python"
    sampled = source.metadata.measured["sampled"]["mean_acceptance_length"]
    assert told["moved_from"]["mean_acceptance_length"]["sampled"] == sampled
    for name, tensor in source.lora.tensors.items():  # nearly no step was taken from where it started
        torch.testing.assert_close(moved.lora.tensors[name], tensor, atol=1e-6, rtol=0)
    rows = [json.loads(line) for line in (folder / "moved" / "metrics.jsonl").read_text().splitlines()]
    # what it had there before its first step, and blocks that grow from one token to two
    floor, before = rows[:2]
    assert floor["step"] == before["step"] == 0
    assert 1 < floor["floor/length"] < 3  # K = 2
    assert "floor/length_with_head" not in floor
    assert before["acceptance/sampled"] >= 1
    first, second = (row["overlap"] for row in rows if "overlap" in row)
    assert first[0] > 0
    assert first[1] == 0
    assert second[1] > 0


def test_an_adapter_of_the_same_base_is_not_told_as_moved(folder):
    ended = train(folder, "same", f"adapter.start_from={folder / 'source'}", "adapter.transfer=true")
    assert ended.code == 0, ended.err[-2000:]
    assert "moved_from" not in load_adapter(folder / "same").metadata.training
