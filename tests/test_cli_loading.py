"""What is said around loading: options that no model could be asked with, that it lasts, that nothing was tuned."""

import io
from types import SimpleNamespace

import pytest
from programs import run

from pardec import cli
from pardec.cli_loading import advise_tuning, told_in_a_terminal

BAD = {
    ("--temperature", "-1"): "temperature: expected 0 (greedy) or a finite number of at least 0.0001, found -1.0",
    ("--temperature", "1", "--top-k", "0"): "top_k: expected an integer >= 1, found 0",
    ("--max-new-tokens", "0"): "max_new_tokens: expected an integer >= 1, found 0",
    ("--seed", "-1"): "seed: expected an integer from 0 to",
    ("--num-speculative-tokens", "-1"): "num_speculative_tokens: expected an integer from 0 to",
    ("--mode", "slow"): "mode: expected one of plain, two_pass, fused, found 'slow'",
    ("--verification", "slow"): "verification: expected one of token",
    ("--copy-tokens", "-1"): "copy_tokens: expected an integer from 0 to 128, found -1",
}


@pytest.mark.parametrize("options", BAD)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_options_are_judged_before_a_model_is_loaded(command, options, monkeypatch):
    def never(*_):
        raise AssertionError("loaded")

    monkeypatch.setattr(cli, "_load", never)
    ended = run(cli.main, command, "nowhere", *(["--prompt", "x"] if command == "generate" else []), *options)
    assert ended.code == 2
    assert BAD[options] in ended.error


def test_tune_judges_its_options_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr(cli, "_load", lambda *_: pytest.fail("loaded"))
    assert "temperature: expected 0" in run(cli.main, "tune", "nowhere", "--temperature", "-1").error


class Screen(io.StringIO):
    """Standard error that is a terminal, or none."""

    def __init__(self, is_terminal: bool):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_is_told_that_loading_lasts(is_terminal, monkeypatch):
    screen = Screen(is_terminal)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with told_in_a_terminal("loading runs/mine"):
        pass
    assert ("loading runs/mine" in screen.getvalue()) == is_terminal


@pytest.mark.parametrize(
    ("is_terminal", "mode", "adapter", "tuned", "said"),
    [
        (True, None, "adapter", None, True),
        (False, None, "adapter", None, False),
        (True, "fused", "adapter", None, False),
        (True, None, None, None, False),
        (True, None, "adapter", "choice", False),
    ],
)
def test_who_has_not_tuned_is_told_so_once(is_terminal, mode, adapter, tuned, said, monkeypatch):
    screen = Screen(is_terminal)
    monkeypatch.setattr("sys.stderr", screen)
    advise_tuning(SimpleNamespace(adapter=adapter, tuned=tuned), "runs/mine", mode)  # type: ignore[arg-type]
    expected = "not tuned for this device, perhaps slower than plain: pardec tune runs/mine\n" if said else ""
    assert screen.getvalue() == expected
