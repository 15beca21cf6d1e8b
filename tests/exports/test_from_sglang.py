"""A LoRA in SGLang's form becomes an adapter that decodes exactly, and goes back tensor for tensor."""

import json
import shutil

import pytest
import torch
from adapter_samples import files_in
from export_samples import exported, sample
from safetensors.torch import load_file, save_file

import pardec
from pardec.adapters.files import load_adapter
from pardec.exports.export import export_adapter
from pardec.exports.from_sglang import import_uno

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def of_sglang(packaged_adapter, tmp_path_factory):
    """A folder as SGLang takes it, and nothing else; for reading only."""
    root = tmp_path_factory.mktemp("uno")
    out = exported(sample(packaged_adapter, "sglang"), "sglang", root)
    folder = root / "theirs"
    folder.mkdir()
    for name in (WEIGHTS, CONFIG):
        shutil.copyfile(out / name, folder / name)
    return folder


@pytest.fixture
def source(of_sglang, tmp_path):
    return shutil.copytree(of_sglang, tmp_path / "theirs")


def rewrite(source, **changes) -> None:
    config = json.loads((source / CONFIG).read_text())
    (source / CONFIG).write_text(json.dumps(config | changes))


def refusal(source, base="tiny-python", output=None, K=3) -> str:
    output = output or source.parent / "out"
    with pytest.raises(ValueError) as caught:
        import_uno(source, base, output, K)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_there_and_back_the_tensors_are_the_same(source, tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(source / WEIGHTS).items()}
    save_file(tensors, source / WEIGHTS)
    rewrite(source, r=4, lora_alpha=64)
    import_uno(source, "tiny-python", tmp_path / "adapter", 3)
    assert export_adapter(tmp_path / "adapter", "sglang", tmp_path / "out").problems == []
    back = load_file(tmp_path / "out" / WEIGHTS)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor), name
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 64)


def test_the_adapter_is_one_of_random_tokens_for_its_base(source, tmp_path, tiny_base):
    import_uno(source, "tiny-python", tmp_path / "adapter", 5)
    adapter = load_adapter(tmp_path / "adapter")
    assert adapter.metadata.draft_input == "uniform_noise"
    assert adapter.metadata.num_speculative_tokens == 5
    assert adapter.mask_embeddings is None
    assert adapter.head is None
    assert adapter.metadata.base.name == "tiny-python"
    model = pardec.load(tmp_path / "adapter")  # which compares the fingerprints
    prompt = [5, 9, 2, 7]
    plain = model.generate([prompt], max_new_tokens=12, mode="plain").token_ids
    assert model.generate([prompt], max_new_tokens=12).token_ids == plain


def test_the_base_of_a_folder_is_remembered_as_it_was_typed(source, tmp_path, tiny_base, tokenizer):
    tiny_base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rewrite(source, base_model_name_or_path="/home/somebody/base")
    import_uno(source, str(tmp_path / "base"), tmp_path / "adapter", 3)
    adapter = load_adapter(tmp_path / "adapter")
    assert adapter.metadata.base.name == str(tmp_path / "base")
    assert adapter.lora is not None
    assert adapter.lora.config["base_model_name_or_path"] == "base"
    assert adapter.metadata.training["imported"]["base_model_name_or_path"] == "base"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "LOHA"}, "lora: expected peft_type LORA, found 'LOHA'"),
        ({"use_dora": True}, "lora: expected use_dora=False, found True"),
        ({"use_rslora": True}, "use_rslora: expected false, as SGLang divides lora_alpha by r, found true"),
        ({"r": 5}, "expected rank 5, found (4, 4) in lora_A and lora_B"),
        ({"lora_alpha": 0}, "expected lora_alpha as a finite number above 0, found 0"),
        ({"rank_pattern": {"q_proj": 8}}, "lora: expected rank_pattern={}"),
        ({"bias": "all"}, "lora: expected bias='none', found 'all'"),
    ],
)
def test_a_configuration_of_another_kind_is_refused(source, change, words):
    rewrite(source, **change)
    said = refusal(source)
    assert said.startswith(f"{source}: ")
    assert words in said
    assert not (source.parent / "out").exists()


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_files_that_are_missing_or_damaged_are_told(source, name):
    (source / name).write_bytes(b"x")
    assert str(source) in refusal(source)
    (source / name).unlink()
    assert refusal(source) == f"{source}: expected a folder with {CONFIG} and {WEIGHTS}, found no {name}"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("base_model.model.lm_head.lora_A.weight", "found only lora_A"),
        ("base_model.model.model.layers.0.mlp.down_proj.lora_magnitude_vector", "expected names base_model.model.*"),
        ("base_model.model.model.layers.0.linear_attn.q_proj", "found model.layers.0.linear_attn.q_proj"),
        ("base_model.model.model.layers.9.mlp.down_proj", "found 'model.layers.9.mlp.down_proj', which it has not"),
        ("base_model.model.model.layers.0.self_attn.qkv_proj", "found 'model.layers.0.self_attn.qkv_proj', which it h"),
    ],
)
def test_layers_that_are_not_those_of_the_base_are_told(source, name, words):
    tensors = load_file(source / WEIGHTS)
    more = [name] if "lora_" in name else [f"{name}.lora_A.weight", f"{name}.lora_B.weight"]
    save_file(tensors | {one: torch.zeros(4, 4) for one in more}, source / WEIGHTS)
    assert words in refusal(source)


def test_another_bases_shapes_are_told(source, make_llama):
    make_llama(num_hidden_layers=6).save_pretrained(source.parent / "other")
    said = refusal(source, base=str(source.parent / "other"))
    assert said.startswith(f"{source}: expected a LoRA for {source.parent / 'other'}: lora: model.layers.0.")
    assert "features, found" in said


def test_a_lora_without_tensors_is_told(source):
    save_file({}, source / WEIGHTS)
    assert refusal(source) == f"{source}: {WEIGHTS}: expected the tensors of a LoRA, found none"


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_what_is_there_already_stays(source, tmp_path, kind):
    output = tmp_path / "out"
    if kind == "folder":
        output.mkdir()
    elif kind == "file":
        output.write_text("mine")
    else:
        output.symlink_to(tmp_path / "nowhere")
    assert refusal(source, output=output) == f"output: expected a folder that is not there yet, found {output}"
    assert kind != "folder" or files_in(output) == set()


@pytest.mark.parametrize("K", [0, -1, 2.5, True, "3", None, 10**9])
def test_a_number_of_drafts_that_cannot_be_is_told(source, K):
    assert refusal(source, K=K).startswith("--num-speculative-tokens: expected an integer from 1 to ")


def test_a_base_that_is_not_there_is_told(source):
    assert "base '/no/base': expected a folder or hub name" in refusal(source, base="/no/base")
    assert not (source.parent / "out").exists()
