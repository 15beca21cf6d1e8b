"""`pardec import`: what it prints, and its exit codes 0 and 2."""

import pytest
from export_samples import exported, sample
from typer.testing import CliRunner

from pardec.adapters.files import load_adapter
from pardec.cli.program import app


@pytest.fixture
def source(packaged_adapter, tmp_path, monkeypatch):
    """A LoRA as SGLang takes it, in the folder `out` of the current one."""
    exported(sample(packaged_adapter, "sglang"), "sglang", tmp_path)
    monkeypatch.chdir(tmp_path)
    return "out"


def run(*arguments: str):
    return CliRunner().invoke(app, ["import", *arguments])


def test_an_adapter_is_written_and_what_it_is_is_told(source, tmp_path):
    done = run(source, "--base", "tiny-python", "--output", "runs/uno", "--num-speculative-tokens", "4")
    assert done.exit_code == 0, done.output
    assert done.stdout == (
        "runs/uno: imported, a LoRA of rank 4 on 42 layers, K = 4; pardec check runs/uno shows whether it drafts\n"
    )
    assert load_adapter(tmp_path / "runs/uno").metadata.num_speculative_tokens == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": "nowhere"}, "nowhere: expected a folder with adapter_config.json and adapter_model.safetensors"),
        ({"--output": "out"}, "output: expected a folder that is not there yet, found out"),
        ({"--base": "/no/base"}, "base '/no/base': expected a folder or hub name"),
        ({"--num-speculative-tokens": "0"}, "--num-speculative-tokens: expected an integer from 1 to"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(source, change, words):
    asked = {"--base": "tiny-python", "--output": "uno", "--num-speculative-tokens": "3"} | change
    first = asked.pop("source", source)
    done = run(first, *[word for pair in asked.items() for word in pair])
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
    assert done.stdout == ""
