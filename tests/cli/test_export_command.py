"""`pardec export`: what it prints, and its exit codes 0, 1 and 2."""

import json

import pytest
from export_samples import sample
from typer.testing import CliRunner

from pardec.adapters.files import save_adapter
from pardec.cli.program import app


@pytest.fixture
def saved(packaged_adapter, tmp_path, monkeypatch):
    """An adapter for SGLang in the folder `adapter` of the current one."""
    save_adapter(sample(packaged_adapter, "sglang"), tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    return "adapter"


def run(*arguments: str):
    return CliRunner().invoke(app, ["export", *arguments])


def test_an_adapter_is_written_and_the_command_that_serves_it_is_shown(saved, tmp_path):
    done = run(saved, "--to", "sglang", "--output", "runs/out")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("runs/out: written and checked; to use it:\n\nBASE=$(python -c ")
    assert 'python -m sglang.launch_server --model-path "$BASE" \\\n' in done.stdout
    assert "--uno-lora-path runs/out \\\n" in done.stdout
    assert done.stderr == ""
    again = run("--check", "runs/out")
    assert again.exit_code == 0
    assert again.stdout == done.stdout.replace("written and checked", "unchanged")


def test_the_row_of_the_mask_token_and_what_to_beware_of_are_shown(packaged_adapter, tmp_path):
    save_adapter(sample(packaged_adapter, "vllm-stock"), tmp_path / "adapter")
    done = run(str(tmp_path / "adapter"), "--to", "vllm-stock", "--output", str(tmp_path / "out"))
    row = json.loads((tmp_path / "out/config.json").read_text())["pard_token"]
    *_, about = done.stdout.rstrip("\n").split("\n\n")
    assert about.startswith(f"The mask embedding stands in row {row} of the draft's input embeddings")
    assert "On a CPU decode greedily" in about
    assert about in (tmp_path / "out/README.md").read_text()


def test_a_changed_file_ends_the_check_with_its_name_and_exit_code_1(saved):
    run(saved, "--to", "sglang", "--output", "out")
    with open("out/adapter_config.json", "a") as file:
        file.write("\n")
    done = run("--check", "out")
    assert done.exit_code == 1
    assert len(done.stdout.splitlines()) == 1
    assert done.stdout.startswith("out/adapter_config.json: expected sha256 ")


def test_an_engine_of_another_version_is_a_warning(saved, monkeypatch):
    from pardec.exports import export

    monkeypatch.setattr(export, "version", lambda name: "9.9.9")
    done = run(saved, "--to", "sglang", "--output", "out")
    assert done.exit_code == 0
    assert done.stderr.startswith("warning: sglang: expected 0.5.23, which this form was checked against, found 9.9.9")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "export: expected DIRECTORY, --to and --output, or --check, found no DIRECTORY, --to, --output"),
        (["adapter", "--to", "sglang"], "export: expected DIRECTORY, --to and --output, or --check, found no --output"),
        (["adapter", "--check", "x"], "--check: expected the exported folder alone, found DIRECTORY as well"),
        (["--check", "x", "--with-base"], "--check: expected the exported folder alone, found --with-base as well"),
        (["--check", "adapter"], "adapter: expected an exported folder with export.json, found none"),
        (["adapter", "--to", "ollama", "--output", "x"], "--to: expected one of vllm, vllm-stock, sglang, transf"),
        (["adapter", "--to", "vllm-stock", "--output", "x"], "found draft_input uniform_noise; sglang, transformers "),
        (["adapter", "--to", "sglang", "--output", "adapter"], "output: expected a folder that is not there yet"),
        (["nowhere", "--to", "sglang", "--output", "x"], "nowhere: expected an adapter directory, found nothing"),
        (
            ["adapter", "--to", "transformers", "--with-base", "--output", "x", "--base", "/no/base"],
            "base '/no/base': expected a folder or hub name",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(saved, tmp_path, arguments, words):
    done = run(*arguments)
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
    assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_malformed_record_is_one_line_and_exit_code_2(saved, tmp_path):
    run(saved, "--to", "sglang", "--output", "out")
    record = json.loads((tmp_path / "out/export.json").read_text())
    (tmp_path / "out/export.json").write_text(json.dumps(record | {"door": "onnx"}))
    done = run("--check", "out")
    assert done.exit_code == 2
    assert (
        "out/export.json: door: expected 'vllm', 'vllm-stock', 'sglang', 'transformers' or 'peft', found" in done.stderr
    )
