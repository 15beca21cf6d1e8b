"""`pardec push`: what it prints, and its exit codes 0 and 2; in processes of their own, too."""

import os
import subprocess
import sys

import pytest
from hub_server import GOOD
from typer.testing import CliRunner

from pardec.adapters.files import load_adapter, save_adapter
from pardec.cli.program import app

NAME = "me/adapter"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def saved(hub, packaged_adapter, tmp_path, monkeypatch):
    save_adapter(packaged_adapter(2), tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", GOOD)
    return "mine"


def run(*arguments: str):
    return CliRunner().invoke(app, ["push", *arguments])


@pytest.mark.parametrize(("flags", "seen"), [([], "private"), (["--public"], "public")])
def test_it_says_where_it_is_and_who_sees_it(hub, saved, flags, seen):
    done = run(saved, NAME, *flags)
    assert done.exit_code == 0, done.output
    commit = hub.repos[NAME].branches["main"]
    assert done.stdout == f"{hub.url}/{NAME}/commit/{commit}: pushed, {seen}; pardec.load('{NAME}') loads it\n"
    assert done.stderr == ""


def test_a_base_that_others_cannot_find_is_a_warning(saved):
    adapter = load_adapter(saved)
    adapter.metadata.base.name = "/home/me/model"
    save_adapter(adapter, saved)
    said = run(saved, NAME).stderr
    assert said == "warning: base: expected a hub name, found model: others need base= or --base to load it\n"
    assert run(saved, NAME, "--base", "some/model").stderr == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere", NAME), "nowhere: expected an adapter directory, found nothing"),
        (("no/such", NAME), "no/such: expected an adapter directory or a hub name, found no folder of that name in "),
        (("mine", "adapter"), "repo: expected user/name or user/name@branch, found 'adapter'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(hub, saved, arguments, words):
    done = run(*arguments)
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
    assert done.stdout == ""
    assert hub.repos == {}


def test_what_one_process_pushes_another_one_loads(hub, saved, tmp_path):
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }

    def pardec(*arguments: str, **more: str) -> str:
        command = [sys.executable, "-m", "pardec", *arguments]
        done = subprocess.run(command, env=environment | more, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert GOOD not in done.stdout + done.stderr
        return done.stdout

    assert "pushed, private" in pardec("push", saved, NAME)
    asked = ("generate", NAME, "--prompt", "def f(", "--max-new-tokens", "8", "--json")
    first = pardec(*asked)
    hub.requests.clear()
    assert pardec(*asked, HF_HUB_OFFLINE="1").partition('"seconds"')[0] == first.partition('"seconds"')[0]
    assert hub.requests == []
