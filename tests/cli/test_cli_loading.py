"""What is said around loading: options that no model could be asked with, that it lasts, that nothing was tuned."""

import io
import shlex
import subprocess
import sys
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from programs import ROOT, run

from pardec.adapters.tuned import TunedChoice
from pardec.cli import program, tune
from pardec.cli.loading import advise_tuning, mode_beside_plain, tell, told_in_a_terminal
from pardec.model import SelfSpeculativeModel
from pardec.run import device_name

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

    monkeypatch.setattr(program, "load_model", never)
    ended = run(program.main, command, "nowhere", *(["--prompt", "x"] if command == "generate" else []), *options)
    assert ended.code == 2
    assert BAD[options] in ended.error


@pytest.mark.parametrize(("temperature", "is_told"), [("0", True), ("0.7", False)])
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_who_narrows_the_law_of_greedy_texts_is_told_that_it_changes_nothing(
    command, temperature, is_told, monkeypatch
):
    monkeypatch.setattr(program, "load_model", lambda *_: sys.exit(0))
    options = ("--top-p", "0.9", "--min-p", "0.1", "--temperature", temperature)
    ended = run(program.main, command, "nowhere", *(["--prompt", "x"] if command == "generate" else []), *options)
    told = "greedy, so nothing is changed by --top-p and --min-p; --temperature above 0 samples\n"
    assert ended.err == told * is_told


def test_tune_judges_its_options_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr(tune, "load_model", lambda *_: pytest.fail("loaded"))
    assert "temperature: expected 0" in run(program.main, "tune", "nowhere", "--temperature", "-1").error


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


UNTUNED = "not tuned for float32 on this device, perhaps slower than plain: pardec tune runs/mine --dtype float32\n"
FOR_HERE = "; for float32 here: pardec tune runs/mine --dtype float32\n"
FOREIGN = f"drafts as was fastest in float32 on Another CPU{FOR_HERE}"
HERE = device_name(torch.device("cpu"))
TUNED = "as tuned for this device: K = 2, blocks 2 1 0, 6 rows, 2.00 x plain\n"
OTHER_DTYPE = f"drafts as was fastest in bfloat16 on {HERE}{FOR_HERE}"


def loaded(adapter: str | None, tuned: TunedChoice | None, *, compile: bool = False):
    target = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    return cast(SelfSpeculativeModel, SimpleNamespace(adapter=adapter, tuned=tuned, target=target, compile=compile))


def choice_for(device: str, dtype: str, compile: bool = False) -> TunedChoice:
    speeds = {"predicted_tokens_per_second": 20.0, "measured_tokens_per_second": 20.0, "plain_tokens_per_second": 10.0}
    return TunedChoice(device, dtype, compile, (2, 1, 0), {}, ms_per_step=1.0, conditional_acceptance=[0.5], **speeds)


@pytest.mark.parametrize(
    ("is_terminal", "mode", "adapter", "tuned_to", "said"),
    [
        (True, None, "adapter", None, UNTUNED),
        (False, None, "adapter", None, ""),
        (True, "fused", "adapter", None, ""),
        (True, None, None, None, ""),
        (
            True,
            None,
            "adapter",
            (HERE, "float32"),
            TUNED,
        ),
        (False, None, "adapter", (HERE, "float32"), ""),
        (True, None, "adapter", (HERE, "bfloat16"), OTHER_DTYPE),
        (True, None, "adapter", ("Another CPU", "float32"), FOREIGN),
        (False, None, "adapter", ("Another CPU", "float32"), ""),
        (True, "fused", "adapter", ("Another CPU", "float32"), ""),
    ],
)
def test_who_has_not_tuned_here_is_told_so_once(is_terminal, mode, adapter, tuned_to, said, monkeypatch):
    screen = Screen(is_terminal)
    monkeypatch.setattr("sys.stderr", screen)
    tuned = None if tuned_to is None else choice_for(*tuned_to)
    advise_tuning(loaded(adapter, tuned), "runs/mine", mode)
    assert screen.getvalue() == said


def test_who_decodes_plain_as_drafts_are_slow_here_is_told_so(monkeypatch):
    screen = Screen(is_terminal=True)
    monkeypatch.setattr("sys.stderr", screen)
    speeds = {"predicted_tokens_per_second": 20.0, "measured_tokens_per_second": 20.0, "plain_tokens_per_second": 10.0}
    plain = TunedChoice("Another", "float32", False, (0,), {}, ms_per_step=1.0, conditional_acceptance=[], **speeds)
    advise_tuning(loaded("adapter", plain), "runs/mine", None)
    assert screen.getvalue() == f"decodes plain, as drafts may be slower in float32{FOR_HERE}"


@pytest.mark.parametrize("asked", [(None, 2, None, None), (None, None, 4, None), (None, None, None, False)])
def test_who_asks_for_another_way_than_the_tuned_one_is_not_told_of_it(asked, monkeypatch):
    screen = Screen(is_terminal=True)
    monkeypatch.setattr("sys.stderr", screen)
    advise_tuning(loaded("adapter", None), "runs/mine", *asked)
    assert screen.getvalue() == ""


def test_the_advice_is_a_command_that_can_be_pasted(monkeypatch):
    screen = Screen(is_terminal=True)
    monkeypatch.setattr("sys.stderr", screen)
    model = loaded("adapter", None)
    advise_tuning(model, "my runs/mine", None, base="my base", device="cpu")
    command = screen.getvalue().split(": ", 1)[1]
    given = ["my runs/mine", "--dtype", "float32", "--device", "cpu", "--base", "my base"]
    assert shlex.split(command)[2:] == given
    advise_tuning(model, "my runs/mine", None, base="my base", device="cpu", trust_remote_code=True)
    assert shlex.split(screen.getvalue().splitlines()[1].split(": ", 1)[1])[2:] == [*given, "--trust-remote-code"]


@pytest.mark.parametrize(
    ("compiles", "tuned_compiled", "said"),
    [
        (True, None, "not tuned for float32, compiled, on this device, perhaps slower than plain: {}"),
        (True, False, f"drafts as was fastest in float32 on {HERE}; for float32, compiled, here: {{}}"),
        (False, True, f"drafts as was fastest in float32, compiled, on {HERE}; for float32 here: {{}}"),
        (True, True, TUNED),
    ],
)
def test_compiled_steps_are_tuned_for_themselves(compiles, tuned_compiled, said, monkeypatch):
    screen = Screen(is_terminal=True)
    monkeypatch.setattr("sys.stderr", screen)
    tuned = None if tuned_compiled is None else choice_for(HERE, "float32", tuned_compiled)
    advise_tuning(loaded("adapter", tuned, compile=compiles), "runs/mine", None)
    command = "pardec tune runs/mine --dtype float32" + " --compile" * compiles
    assert screen.getvalue().rstrip() == said.format(command).rstrip()


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_the_command_line_loads_compiled_steps_where_they_are_asked_for(command, monkeypatch):
    seen = []

    def load(*arguments, **options):
        seen.append(options["compile"])
        raise ValueError("seen")

    monkeypatch.setattr("pardec.load", load)
    prompt = ["--prompt", "x"] if command == "generate" else []
    for flags in ([], ["--compile"]):
        assert run(program.main, command, "somewhere", *prompt, *flags).error == "error: seen"
    assert seen == [False, True]


def test_the_advice_for_conversations_asks_for_messages(monkeypatch):
    screen = Screen(is_terminal=True)
    monkeypatch.setattr("sys.stderr", screen)
    advise_tuning(loaded("adapter", None), "mine", None, as_chat=True)
    assert screen.getvalue().endswith("pardec tune mine --dtype float32 --chat --prompt-file YOUR_PROMPTS.jsonl\n")


def test_a_comparison_of_plain_with_plain_is_refused():
    with pytest.raises(ValueError, match="mode: expected fused or two_pass to compare plain decoding with, found 'pl"):
        mode_beside_plain("plain", "plain")
    with pytest.raises(ValueError, match=r"num_speculative_tokens: expected at least 1 to compare .*, found 0"):
        mode_beside_plain(None, "plain", 0)


@pytest.mark.parametrize(
    ("mode", "chosen", "beside", "said"),
    [
        (None, "plain", "fused", True),
        (None, "two_pass", "two_pass", False),
        ("fused", "fused", "fused", False),
    ],
)
def test_a_comparison_drafts_where_tuning_chose_not_to_and_says_so(mode, chosen, beside, said, monkeypatch):
    screen = Screen(is_terminal=False)
    monkeypatch.setattr("sys.stderr", screen)
    assert mode_beside_plain(mode, chosen) == beside
    assert ("without --compare this decodes plain" in screen.getvalue()) == said


@pytest.mark.parametrize("gone", [None, "a pipe that nobody reads"])
def test_a_notice_that_nobody_reads_stops_nothing(gone, monkeypatch):
    def write(text):
        raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", gone and SimpleNamespace(write=write, flush=write))
    tell("a notice")


WATCHED = """
import signal, sys
from pardec.cli.loading import errors_in_a_line

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(signal.getsignal(signal.SIGINT) is signal.SIG_DFL)
            raise ImportError

signal.signal(signal.SIGINT, {before})
sys.meta_path.insert(0, Watch())
try:
    with errors_in_a_line():
        pass
except ImportError:
    print(signal.getsignal(signal.SIGINT) == {before})
"""


@pytest.mark.parametrize(
    ("before", "ends_at_once"), [("signal.default_int_handler", True), ("signal.SIG_IGN", False), ("print", False)]
)
def test_ctrl_c_ends_the_process_at_once_while_torch_is_imported_where_nobody_else_has_a_say(before, ends_at_once):
    command = [sys.executable, "-c", WATCHED.format(before=before)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert ended.stdout.splitlines() == [str(ends_at_once), "True"]
