"""What `generate --compare` shows: two panels that grow, what a pipe gets, and the summary."""

import io
import json
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

from pardec.cli import program, race_terminal
from pardec.cli.race_terminal import _panels
from pardec.decoding.sampling import TokenLaw
from pardec.model import SelfSpeculativeModel

K, PROMPT = 2, "def main():"
GREEN = "\x1b[32m"


@pytest.fixture
def model(tiny_base, tokenizer, packaged_adapter):
    return SelfSpeculativeModel(tiny_base, tokenizer, packaged_adapter(K, lora_rank=2))


@pytest.fixture
def run(model, monkeypatch):
    """Runs `pardec generate --compare` with this model."""
    monkeypatch.setattr(program, "load_model", lambda *options: model)
    command = ["generate", "x", "--compare", "--max-new-tokens"]
    return lambda *arguments, tokens=12: CliRunner().invoke(program.app, [*command, str(tokens), *arguments])


class Screen:
    """A terminal; what stands in its live part after each frame, and all that is written to it.

    Attributes:
        frames: without colours.
    """

    def __init__(self, monkeypatch, width: int, height: int):
        self.frames, self._out = [], io.StringIO()
        console = partial(
            Console, file=self._out, force_terminal=True, color_system="standard", width=width, height=height
        )
        screen, live = self, race_terminal.Live

        class Noted(live):
            def update(self, renderable, *, refresh=False):
                shown = io.StringIO()
                Console(file=shown, width=width).print(renderable)
                screen.frames.append(shown.getvalue())
                super().update(renderable, refresh=refresh)

        monkeypatch.setattr(race_terminal, "Console", console)
        monkeypatch.setattr(race_terminal, "Live", Noted)
        monkeypatch.setattr(race_terminal, "_SECONDS_PER_FRAME", -1)  # every step is drawn

    @property
    def text(self) -> str:
        """All that was written, with its colours."""
        return self._out.getvalue()


@pytest.fixture
def terminal(monkeypatch):
    return partial(Screen, monkeypatch)


def numbers_of_tokens(frame: str) -> list[int]:
    """In the order of the panels."""
    return [int(found) for found in re.findall(r"(\d+) tokens(?!/)", frame)]


def test_both_grow_side_by_side_until_both_are_done(model, run, terminal):
    screen = terminal(100, 25)
    result = run("--prompt", PROMPT)
    assert result.exit_code == 0, result.output
    seen = [numbers_of_tokens(frame) for frame in screen.frames]
    assert (seen[:2], seen[-1]) == ([[1, 0], [1, 1]], [12, 12])
    assert all(sorted(counts) == list(counts) for counts in zip(*seen, strict=True))
    top = screen.frames[0].splitlines()[0]
    assert top.index("plain") < top.index("fused")
    assert screen.frames[-1].count("done in") == 2
    for words in (f"> {PROMPT}", "same tokens as plain: yes", "green: drafted tokens that were accepted"):
        assert words in screen.text
    assert "cyan" not in screen.text


def test_accepted_drafts_are_green_in_the_panel_of_the_mode_that_drafts(model, run, terminal, monkeypatch):
    ids = model.generate(PROMPT, mode="plain", max_new_tokens=K + 2).token_ids[0]
    monkeypatch.setattr(TokenLaw, "draw", lambda self, logits: (torch.tensor([ids[1 : K + 1]]), None))
    screen = terminal(100, 25)
    run("--prompt", PROMPT, tokens=K + 2)
    green = "".join(re.findall(r"\x1b\[32m(.*?)\x1b\[0m", screen.text))
    assert model.tokenizer.decode(ids[1 : K + 1]).split()[0] in green


def test_the_colour_of_copies_is_told_where_there_are_some(run, terminal):
    screen = terminal(100, 25)
    run("--prompt", "x = 1\n" * 9, "--num-speculative-tokens", "0", "--copy-tokens", "4", tokens=24)
    assert "\x1b[36m" in screen.text
    assert "green: drafted tokens that were accepted; cyan: copied ones" in screen.text


def test_panels_stand_one_above_the_other_where_the_terminal_is_narrow(run, terminal):
    screen = terminal(60, 25)
    run("--prompt", PROMPT)
    lines = screen.frames[-1].splitlines()
    assert [("plain" in line, "fused" in line) for line in lines if "─ plain" in line or "─ fused" in line] == [
        (True, False),
        (False, True),
    ]


@pytest.mark.parametrize("width", [60, 100])
def test_a_text_longer_than_the_terminal_shows_its_end_and_at_last_all_of_it(width):
    out = io.StringIO()
    console = Console(file=out, width=width, height=12)
    lines = [Text(f"line {number}") for number in range(20)]
    for mode, is_whole in (("plain", False), ("fused", True)):
        track = SimpleNamespace(lane=SimpleNamespace(mode=mode), lines=lambda console, width: lines, speed=lambda: "")
        console.print(_panels(console, [track, track], is_whole=is_whole))
    running, last = out.getvalue().split("─ fused", 1)
    assert len(running.splitlines()) <= 12
    assert running.count("line 19 ") == last.count("line 19 ") == 2
    assert "line 3 " not in running
    assert last.count("line 3 ") == 2


def test_a_race_is_drawn_within_the_terminal_until_it_ends(run, terminal):
    screen = terminal(100, 12)
    run("--prompt", "import os\n", tokens=60)
    *running, last = (len(frame.splitlines()) for frame in screen.frames)
    assert max(running) < 12
    assert last > 12


def test_what_is_held_back_until_the_end_is_shown_then(model, run, terminal, monkeypatch):
    monkeypatch.setattr("pardec.decoding.output._cleans_up", lambda tokenizer: True)  # the last word waits for the next
    screen = terminal(100, 25)
    run("--prompt", PROMPT)
    last_word = model.generate(PROMPT, max_new_tokens=12).text[0].split()[-1]
    assert screen.frames[-1].count(last_word) == screen.frames[-2].count(last_word) + 2


def test_several_prompts_are_summed_and_the_ratio_is_their_median(run, tmp_path, terminal, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (PROMPT, "import ", "class A:")))
    ratios = iter((1.0, 3.0, 2.0))
    monkeypatch.setattr(race_terminal.Pair, "ratio", property(lambda pair: next(ratios)))
    screen = terminal(100, 25)
    assert run("--prompt-file", str(prompts)).exit_code == 0
    summary = screen.text[screen.text.index("ratio to") :]
    assert re.search(r"fused .* 36 .* 2\.00 x", summary)
    assert "ratio: the median of 3 prompts, from 1.00 to 3.00" in summary
    assert screen.text.count("green: ") == 1


def test_a_pipe_gets_the_text_and_the_summary_without_codes(model, run):
    result = run("--prompt", PROMPT)
    assert result.stdout.startswith(model.generate(PROMPT, max_new_tokens=12).text[0])
    assert "same tokens as plain: yes" in result.stdout
    assert "\x1b" not in result.stdout
    assert "─ plain" not in result.stdout


def test_what_a_pipe_gets_is_the_text_to_the_letter(model, run, monkeypatch):
    text = "[bold]" + "a long line of words " * 12 + "\t:smile:"
    paired = race_terminal._paired

    def with_text(*args, **options):
        pair = paired(*args, **options)
        pair.drafted.text[0] = text
        return pair

    monkeypatch.setattr(race_terminal, "_paired", with_text)
    assert run("--prompt", PROMPT).output.splitlines()[0] == text


def test_the_prompts_whose_tokens_differ_are_named(run, monkeypatch, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "def main():"}\n{"prompt": "import "}\n')
    monkeypatch.setattr(race_terminal.Pair, "identical", property(lambda pair: False))
    result = run("--prompt-file", str(prompts))
    assert result.exit_code == 1
    assert "same tokens as plain: prompt 1: no, prompt 2: no" in result.stdout
    sampled = run("--prompt-file", str(prompts), "--temperature", "1")
    assert sampled.exit_code == 0
    assert "(sampled: the law is the same, not the draw)" in " ".join(sampled.stdout.split())


@pytest.mark.parametrize("compiles", [False, True])
def test_nothing_is_compiled_while_the_clock_runs(run, model, tmp_path, monkeypatch, compiles):
    """Where steps are compiled, every prompt runs to its end before; else a few tokens of the first pack weights."""
    warmed, generate = [], SelfSpeculativeModel.generate

    def noting(self, prompts, *, max_new_tokens, mode, **options):
        warmed.append((mode, max_new_tokens))
        return generate(self, prompts, max_new_tokens=max_new_tokens, mode=mode, **options)

    monkeypatch.setattr(SelfSpeculativeModel, "generate", noting)
    monkeypatch.setattr(model, "compile", compiles)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("x = 1", "def f(a):")))
    ended = run("--prompt-file", str(prompts), tokens=20)
    assert ended.exit_code == 0, ended.output
    few = [("plain", 8), ("fused", 8)]
    assert warmed[:4] == ([("plain", 20), ("fused", 20)] * 2 if compiles else few)


@pytest.mark.parametrize(
    ("ratio", "is_tuned", "is_told"), [(0.9, False, True), (1.1, False, False), (0.9, True, False)]
)
def test_who_is_slower_than_plain_and_has_not_tuned_is_told_to(model, run, monkeypatch, ratio, is_tuned, is_told):
    monkeypatch.setattr(race_terminal.Pair, "ratio", ratio)
    if is_tuned:
        monkeypatch.setattr(SelfSpeculativeModel, "tuned", SimpleNamespace(mode="fused"))
        monkeypatch.setattr(SelfSpeculativeModel, "tuned_for", lambda self, *options, **more: None)
    result = run("--prompt", PROMPT, tokens=4)
    assert ("see `pardec tune`" in result.output) == is_told
