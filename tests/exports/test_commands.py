"""The commands that an export prints, as a shell and Python take them: the base is found, or nothing is started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from export_samples import exported, sample
from gguf_samples import write_gguf

import pardec
from pardec.exports.doors import door_of
from pardec.exports.record import ExportRecord, read_record
from pardec.target.base import resolve_base

GGUF = 'the "tiny" model\'s.gguf'


@pytest.fixture(scope="module")
def record(packaged_adapter, tmp_path_factory) -> ExportRecord:
    folder = exported(sample(packaged_adapter, "sglang"), "sglang", tmp_path_factory.mktemp("sglang"))
    return read_record(folder)


def of_base(record: ExportRecord, name: str) -> ExportRecord:
    return record.model_copy(update={"base": record.base.model_copy(update={"name": name})})


def run_in(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    """What a user's shell or Python does with a command in a folder, where `vllm` tells what it was started with."""
    programs = folder / "programs"
    programs.mkdir()
    for name, does in (("vllm", 'printf "%s\\n" "$@"'), ("python", f'exec {sys.executable} "$@"')):
        (programs / name).write_text(f"#!/bin/sh\n{does}\n")
        (programs / name).chmod(0o755)
    variables = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(Path(pardec.__file__).parents[1]), *sys.path]),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    return subprocess.run(
        command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, check=False, timeout=120
    )


def test_a_file_is_converted_on_the_way_and_the_folder_alone_is_served(record, tiny_base, tmp_path):
    write_gguf(tmp_path / GGUF, tiny_base, Path(resolve_base("tiny-python")))
    done = run_in(tmp_path, ["sh", "-c", door_of("vllm-stock").commands(of_base(record, GGUF), "out")])
    serve, model, *_ = done.stdout.splitlines()
    assert serve == "serve"
    assert (Path(model) / "model.safetensors").is_file()
    assert "converting " in done.stderr


def test_transformers_takes_the_folder_of_a_file(record, tmp_path):
    command = door_of("peft").commands(of_base(record, GGUF), "out")
    line = next(line for line in command.splitlines() if line.startswith("base = "))
    assert line == r'base = AutoModelForCausalLM.from_pretrained(resolve_base("the \"tiny\" model' + r"""'s.gguf"))"""
    assert "from pardec.target.base import resolve_base\n" in command


def test_nothing_is_served_where_the_base_is_missing(record, tmp_path):
    done = run_in(tmp_path, ["sh", "-c", door_of("vllm").commands(of_base(record, "missing.gguf"), "out")])
    assert done.returncode != 0
    assert done.stdout == ""
    assert "expected a GGUF file, found nothing there" in done.stderr
