"""The recording of a conversation: what a terminal shows, as a picture that stands by itself."""

import io
import re
from xml.etree import ElementTree

import pytest
import recording
from programs import run
from rich.console import Console
from rich.text import Text

import pardec
from pardec.model import SelfSpeculativeModel

SVG = "{http://www.w3.org/2000/svg}"


def lines_of(svg: str) -> list[str]:
    """The lines of text in the picture, from the top."""
    matrix = next(g for g in ElementTree.fromstring(svg).iter(f"{SVG}g") if g.get("class", "").endswith("-matrix"))
    by_height: dict[float, list[tuple[float, str]]] = {}
    for text in matrix.iter(f"{SVG}text"):
        by_height.setdefault(float(text.attrib["y"]), []).append((float(text.attrib["x"]), text.text or ""))
    return ["".join(text for _, text in sorted(by_height[y])).replace("\xa0", " ").rstrip() for y in sorted(by_height)]


def coloured(*parts: tuple[str, str]) -> str:
    """Text as a terminal is sent it."""
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="standard", soft_wrap=True).print(Text.assemble(*parts))
    return out.getvalue()


def test_a_conversation_is_held_by_the_program_and_drawn(
    tiny_base, chat_tokenizer, packaged_adapter, tmp_path, monkeypatch
):
    model = SelfSpeculativeModel(tiny_base, chat_tokenizer, packaged_adapter(2, lora_rank=2))
    monkeypatch.setattr(pardec, "load", lambda directory: model)
    asked, output = ["def f(x):", "/plain", "import os"], tmp_path / "new" / "chat.svg"
    messages = [word for text in asked for word in ("--message", text)]
    ended = run(recording.main, "some/adapter", "--output", output, "--max-new-tokens", 20, *messages)
    assert ended.code == 0, ended.err[-2000:]
    said = [{"role": "user", "content": asked[0]}]
    first = model.generate(messages=said, max_new_tokens=20)
    said += [{"role": "assistant", "content": first.text[0]}, {"role": "user", "content": asked[2]}]
    second = model.generate(messages=said, max_new_tokens=20)
    answers = ended.result["answers"]
    assert [one["text"] for one in answers] == [*first.text, *second.text]
    assert [(one["message"], one["mode"]) for one in answers] == [(asked[0], "fused"), (asked[2], "plain")]
    assert answers[0]["tokens_per_step"] == pytest.approx(first.stats.tokens_per_step, abs=1e-4)
    shown = lines_of(output.read_text())
    for words in ("$ pardec chat some/adapter", "> def f(x):", "> /plain", "from now on: plain", "> import os"):
        assert words in shown
    assert [line for line in shown if "20 tokens, " in line and " x plain, first token after" in line]
    for answer in answers:
        assert {line.rstrip() for line in answer["text"].splitlines() if line.strip()} <= set(shown)
    assert recording.json.loads(ElementTree.parse(output).findtext(f"{SVG}desc")) == ended.result


def test_the_picture_needs_nothing_else():
    svg = recording.picture("one\ntwo\n", {"command": "<a> & b --output c"})
    root = ElementTree.fromstring(svg)
    clips = {clip.get("id") for clip in root.iter(f"{SVG}clipPath")}
    assert set(re.findall(r"url\(#([^)]+)\)", svg)) <= clips
    assert not re.findall(r"url\([^#]", svg)
    assert len(root.findall(f"{SVG}rect")) == 1  # a background of its own, whatever the page's


def test_lines_break_where_the_terminal_ends_and_colours_stay():
    sent = coloured(("x" * 98, ""), ("yyyyy", "green"), ("zz [bold] 漢字", ""))
    svg = recording.picture(sent + "\n" + "漢" * 51 + "\n\n\tend\n", {})
    assert lines_of(svg) == ["x" * 98 + "yy", "yyyzz [bold] 漢字", "漢" * 50, "漢", "        end"]
    green = re.search(r"\.(terminal-\d+-r\d+) \{ fill: #98e024", svg)
    assert green
    drawn = [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text") if text.get("class") == green[1]]
    assert drawn == ["yy", "yyy"]
