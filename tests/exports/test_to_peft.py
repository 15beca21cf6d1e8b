"""PEFT: its own loader takes an exported LoRA, and what it adds is what the gate adds to mask rows."""

import json

import peft
import pytest
import torch
from export_samples import exported, sample
from transformers import AutoModelForCausalLM

from pardec.adapters.gated_lora import LoraGate
from pardec.exports.record import read_record
from pardec.exports.to_peft import PEFT
from pardec.target.base import resolve_base

# peft reads an attribute that newer transformers versions rename
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def adapter(packaged_adapter):
    return sample(packaged_adapter, "peft")


@torch.no_grad()
def test_peft_loads_what_the_gate_adds(adapter, tiny_base, tmp_path):
    folder, ids = exported(adapter, "peft", tmp_path), torch.arange(3, 13)[None]
    base = AutoModelForCausalLM.from_pretrained(resolve_base("tiny-python"), dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, str(folder))(ids).logits
    gate = LoraGate(tiny_base, adapter.lora)
    with gate.attached(), gate.open(slice(0, 10), 1, 10):
        expected = tiny_base(ids).logits
    assert float((expected - tiny_base(ids).logits).abs().max()) > 0.1
    torch.testing.assert_close(loaded, expected, atol=1e-3, rtol=1e-3)


def test_a_stranger_learns_the_base_and_where_the_lora_belongs(adapter, tmp_path):
    folder = exported(adapter, "peft", tmp_path)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-python"
    assert "belongs at the rows of pardec's mask tokens only" in (folder / "README.md").read_text()


@pytest.mark.parametrize(("name", "text"), [("adapter_config.json", "{}"), ("adapter_model.safetensors", "x")])
def test_files_that_peft_does_not_read_are_told(adapter, tmp_path, name, text):
    folder = exported(adapter, "peft", tmp_path)
    (folder / name).write_text(text)
    (said,) = PEFT.problems(folder, read_record(folder))
    assert said.startswith(f"{folder}: expected a LoRA that PEFT reads, found")
