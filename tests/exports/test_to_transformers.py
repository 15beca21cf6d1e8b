"""transformers: exported folders decode in a process that knows nothing but their names, with the base's own tokens."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from export_samples import exported, sample
from greedy_oracle import plain_generate

import pardec
from pardec.adapters.adapter import BaseReference
from pardec.adapters.files import load_adapter, save_adapter
from pardec.exports import custom_generate
from pardec.exports.export import check_export
from pardec.exports.record import read_record
from pardec.exports.to_transformers import TRANSFORMERS

PROMPT, NEW = "def quicksort(xs):\n", 16
# what a user does with the folders in its arguments, alone and with the base; prints what came out
PROGRAM = """
import copy, io, json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextStreamer, pipeline
from pardec.target.base import resolve_base

alone, whole, prompt, new = *sys.argv[1:4], int(sys.argv[4])
tokenizer = AutoTokenizer.from_pretrained(whole)
inputs = tokenizer(prompt, return_tensors="pt")
options = {"max_new_tokens": new, "do_sample": False}
base = AutoModelForCausalLM.from_pretrained(resolve_base("tiny-python"), dtype=torch.float32)
own = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32, trust_remote_code=True)
asked = {"custom_generate": alone, "trust_remote_code": True}
found = {}

class Kept(TextStreamer):
    tokens = None
    def put(self, value):
        self.tokens = (self.tokens or []) + value.flatten().tolist()
    def end(self):
        pass

def tokens(ids):
    return ids[0].tolist()

found["plain"] = tokens(base.generate(**inputs, **options))
found["alone"] = tokens(base.generate(**inputs, **options, **asked))
found["alone, positional"] = tokens(base.generate(inputs.input_ids, GenerationConfig(**options), **asked))
found["alone, two forwards"] = tokens(base.generate(**inputs, **options, **asked, mode="two_pass", use_head=False))
found["whole"] = tokens(own.generate(**inputs, **options))
found["whole, positional"] = tokens(own.generate(inputs.input_ids, GenerationConfig(**options)))
found["whole, another adapter"] = tokens(own.generate(**inputs, **options, adapter=alone))
found["whole, asked for the other"] = tokens(own.generate(**inputs, **options, **asked))
streamers = Kept(tokenizer), Kept(tokenizer)
own.generate(**inputs, **options, streamer=streamers[0])
own.generate(inputs.input_ids, GenerationConfig(**options), None, None, None, None, None, streamers[1])
found["streamer"], found["streamer, positional"] = (streamer.tokens for streamer in streamers)
twin = copy.deepcopy(own)
found["copied"] = tokens(twin.generate(**inputs, **options))
pipe = pipeline("text-generation", model=own, tokenizer=tokenizer)
found["pipeline"] = pipe(prompt, return_tensors=True, **options)[0]["generated_token_ids"]
stop = {"stop_strings": [tokenizer.decode(found["plain"][-4:-2])], "tokenizer": tokenizer}
ways = ((base, {}), (base, asked), (own, {}))
stopped = [tokens(model.generate(**inputs, **options, **stop, **more)) for model, more in ways]
config = GenerationConfig(**options, stop_strings=stop["stop_strings"])
stopped += [tokens(model.generate(**inputs, generation_config=config, tokenizer=tokenizer, **more))
            for model, more in ways]
assert config.stop_strings == stop["stop_strings"]

def refusal(model, **more):
    try:
        model.generate(**inputs, **options, **more)
    except ValueError as error:
        return str(error)

ending = copy.deepcopy(own)
ending.generation_config.stop_strings = ["x"]
refused = {
    "tokenizer": refusal(own, stop_strings="x"),
    "own config": refusal(ending, tokenizer=tokenizer),
    "assistant": refusal(own, assistant_model=base),
    "assistant, alone": refusal(base, assistant_model=base, **asked),
    "paged": refusal(own, cache_implementation="paged"),
    "K": refusal(own, num_speculative_tokens=9),
}
adapters = {"base": sorted(base._pardec_adapters), "own": sorted(own._pardec_adapters)}

tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
batch = tokenizer(["import os", "class Queue:\\n    def put("], padding=True, return_tensors="pt")
batches = [model.generate(**batch, **options, **more).tolist() for model, more in ways]
torch.manual_seed(0)
sampled = tokens(own.generate(**inputs, max_new_tokens=new, do_sample=True, temperature=0.8, top_k=10))
print(json.dumps({"stopped": stopped}))
print(json.dumps({"found": found, "batches": batches, "sampled": sampled, "refused": refused, "adapters": adapters}))
"""


def run(folder: Path, *command: str, **variables: str) -> str:
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "CUDA_VISIBLE_DEVICES": "", **variables}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(pardec.__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def adapter(packaged_adapter):
    return sample(packaged_adapter, "transformers")


@pytest.fixture(scope="module")
def folders(adapter, tmp_path_factory):
    """The adapter alone, and with the base's own files; for reading only."""
    alone, whole = (tmp_path_factory.mktemp(name) for name in ("alone", "whole"))
    return exported(adapter, "transformers", alone), exported(adapter, "transformers", whole, with_base=True)


def test_folders_decode_in_another_process(folders, tiny_base, tokenizer, tmp_path):
    *_, first, second = run(tmp_path, PROGRAM, *map(str, folders), PROMPT, str(NEW)).splitlines()
    out = json.loads(first) | json.loads(second)
    prompt = tokenizer(PROMPT).input_ids
    expected = prompt + plain_generate(tiny_base, prompt, NEW)
    assert len(out["found"]) == 12
    for way, tokens in out["found"].items():
        assert tokens == expected, way
    assert all(tokens == out["stopped"][0] for tokens in out["stopped"])
    assert len(out["stopped"]) == 6
    assert len(prompt) < len(out["stopped"][0]) < len(expected)
    assert out["batches"][0] == out["batches"][1] == out["batches"][2]
    assert len(out["sampled"]) > len(prompt)
    assert out["sampled"][: len(prompt)] == prompt
    refused = out["refused"]
    assert "stop_strings: expected the model's tokenizer" in refused["tokenizer"]
    assert "stop_strings: expected them in the call, found some in the model's own" in refused["own config"]
    said = "assistant_model: expected none, as the adapter drafts, found one"
    assert refused["assistant"] == refused["assistant, alone"] == said
    assert refused["paged"] == "cache_implementation: expected one that the adapter drafts with, found 'paged'"
    assert "num_speculative_tokens: expected at most 3" in refused["K"]  # the adapter's own
    alone, whole = map(str, folders)
    assert out["adapters"] == {"base": [alone], "own": sorted([alone, whole])}


@pytest.mark.parametrize("number", [0, 1], ids=["alone", "whole"])
def test_what_the_page_says_works_as_it_stands(folders, number):
    page = (folders[number] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    text = run(folders[number].parent, code)
    assert text.startswith("def quicksort(xs):")
    assert len(text) > len("def quicksort(xs):\n")


def test_the_adapter_is_the_one_that_was_exported(adapter, folders):
    for folder in folders:
        found = load_adapter(folder)
        assert torch.equal(found.mask_embeddings, adapter.mask_embeddings)
        assert all(torch.equal(found.head[name], tensor) for name, tensor in adapter.head.items())
        assert all(torch.equal(found.lora.tensors[name], tensor) for name, tensor in adapter.lora.tensors.items())
        assert found.metadata.measured == adapter.metadata.measured
        assert found.metadata.training == {
            "device": "a CPU (of 2024), 2 threads",
            "command": "train_adapter.py recipes/mine.yaml data.path=texts.jsonl",
            "recipe": {"base": "tiny", "data": {"path": "texts.jsonl"}, "seeds": [1, "x"]},
        }


def test_a_base_that_a_machine_keeps_in_a_folder_is_named_by_it_alone(adapter, tiny_base, tokenizer, tmp_path):
    adapter = copy.deepcopy(adapter)
    adapter.metadata.base.name = str(tmp_path / "models/mine")
    tiny_base.save_pretrained(tmp_path / "models/mine")
    tokenizer.save_pretrained(tmp_path / "models/mine")
    folder = exported(adapter, "transformers", tmp_path, with_base=True)
    assert read_record(folder).base.name == load_adapter(folder).metadata.base.name == "mine"
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "models/mine/model.safetensors").read_bytes()
    assert not [path for path in folder.rglob("*.json") if str(tmp_path) in path.read_text()]


def test_a_base_of_the_hub_is_taken_from_its_cache(adapter, tiny_base, tokenizer, tmp_path):
    adapter = copy.deepcopy(adapter)
    adapter.metadata.base = BaseReference(name="some/base", revision="a" * 40)
    save_adapter(adapter, tmp_path / "adapter")
    kept = tmp_path / "cache/models--some--base/snapshots" / ("a" * 40)
    tiny_base.save_pretrained(kept)
    tokenizer.save_pretrained(kept)
    arguments = ["adapter", "--to", "transformers", "--with-base", "--output", "out"]
    code = f"import sys; sys.argv[1:] = ['export', *{arguments}]; from pardec.cli.program import main; main()"
    assert "out: written and checked" in run(tmp_path, code, HF_HUB_CACHE=str(tmp_path / "cache"))
    record = read_record(tmp_path / "out")
    assert (record.base.name, record.base.revision) == ("some/base", "a" * 40)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (kept / "model.safetensors").read_bytes()
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_all_shards_of_a_base_go_with_the_adapter(adapter, tiny_base, tokenizer, tmp_path):
    adapter = copy.deepcopy(adapter)
    adapter.metadata.base.name = str(tmp_path / "sharded")
    tiny_base.save_pretrained(tmp_path / "sharded", max_shard_size="8MB")
    tokenizer.save_pretrained(tmp_path / "sharded")
    shards = {path.name for path in (tmp_path / "sharded").glob("*.safetensors")}
    assert len(shards) > 1
    folder = exported(adapter, "transformers", tmp_path, with_base=True)
    assert shards <= {path.name for path in folder.iterdir()}
    assert (folder / "model.safetensors.index.json").is_file()


def test_a_base_of_its_own_code_is_refused(adapter, tiny_base, tmp_path):
    adapter = copy.deepcopy(adapter)
    adapter.metadata.base.name = str(tmp_path / "coded")
    tiny_base.save_pretrained(tmp_path / "coded")
    path = tmp_path / "coded/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoConfig": "configuration_mine.C"}}))
    with pytest.raises(ValueError, match=r"expected a model of transformers itself, found code of its own"):
        exported(adapter, "transformers", tmp_path, with_base=True)


@pytest.mark.parametrize("name", ["pardec.json", "custom_generate/generate.py", "config.json"])
def test_files_that_cannot_be_read_are_told(adapter, tmp_path, name):
    folder = exported(adapter, "transformers", tmp_path, with_base=True)
    (folder / name).write_text("{ (")
    (said,) = TRANSFORMERS.problems(folder, read_record(folder))
    assert said.startswith(f"{folder}: expected a folder that transformers and pardec read, found")
    (said,) = check_export(folder).problems
    assert name in said


def test_only_transformers_own_generate_is_asked_where_the_folder_is():
    def generate(custom_generate):  # somebody else's function of the same name
        return custom_generate_folder()

    def custom_generate_folder():
        import inspect

        return custom_generate._asked_for(inspect.currentframe())

    assert generate("a/folder") is None


@pytest.mark.parametrize(("commit", "name"), [(None, "user/repo"), ("a" * 40, f"user/repo@{'a' * 40}")])
def test_the_adapter_beside_a_model_of_the_hub_is_of_the_same_commit(commit, name):
    config = SimpleNamespace(_name_or_path="user/repo", _commit_hash=commit)
    assert custom_generate._loaded_from(SimpleNamespace(config=config)) == name


def test_a_folder_is_another_one_where_we_have_gone_elsewhere(adapter, tiny_base, tmp_path, monkeypatch):
    """Its name alone does not tell which adapter was loaded."""
    model, expected = copy.deepcopy(tiny_base), None
    for number in (1, 2):
        here = tmp_path / str(number)
        exported(adapter, "transformers", here)
        monkeypatch.chdir(here)
        out = custom_generate.generate(torch.tensor([[5, 9, 2]]), model=model, adapter="out", max_new_tokens=4)
        expected = out if expected is None else expected
        assert torch.equal(out, expected)
    assert sorted(model._pardec_adapters) == [str(tmp_path / "1/out"), str(tmp_path / "2/out")]
