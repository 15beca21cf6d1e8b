"""Conversations: what is said is what a fresh run says, what no longer fits leaves, and what a terminal shows."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from chat_templates import GEMMA3_LIKE, MISTRAL_LIKE, QWEN3_LIKE, R1_LIKE, SMOLLM3_LIKE
from rich.console import Console
from typer.testing import CliRunner

import pardec
from pardec.adapters.files import save_adapter
from pardec.chat import PLAIN_TOKENS, Answer, Chat
from pardec.cli import chat_terminal, program
from pardec.cli.chat_terminal import TerminalTalk, run_chat
from pardec.decoding import verifier
from pardec.decoding.output import StreamChunk, TextStream, pieces_of
from pardec.decoding.verify import VERIFICATIONS
from pardec.model import SelfSpeculativeModel

K = 2
MODES = ["plain", "two_pass", "fused"]
OPTIONS = {"max_new_tokens": 12, "seed": None}
GREEN = "\x1b[32m"


@pytest.fixture
def model(tiny_base, chat_tokenizer, packaged_adapter):
    return SelfSpeculativeModel(tiny_base, chat_tokenizer, packaged_adapter(K, lora_rank=2))


def said(chat: Chat, text: str, mode: str = "fused") -> str:
    return "".join(chunk.text for chunk in chat.say(text, mode))


def roles(chat: Chat) -> list[str]:
    return [message["role"] for message in chat.messages]


# ---------------------------------------------------------------------- the conversation


@pytest.mark.parametrize(
    ("template", "system"),
    [
        (None, "Be brief."),
        (QWEN3_LIKE, "Be brief."),
        (R1_LIKE, None),
        (MISTRAL_LIKE, "Be brief."),
        (GEMMA3_LIKE, "Be brief."),
        (SMOLLM3_LIKE, None),
    ],
    ids=["appends", "qwen3", "r1", "mistral", "gemma3", "smollm3"],
)
@pytest.mark.parametrize("mode", MODES)
def test_every_answer_is_that_of_a_fresh_run_of_the_whole_conversation(model, mode, template, system):
    model.tokenizer.chat_template = template or model.tokenizer.chat_template
    chat = Chat(model, system, OPTIONS)
    messages = [{"role": "system", "content": system}] if system else []
    for number, text in enumerate(("def f(x):", "and now\nagain", "import os")):
        messages.append({"role": "user", "content": text})
        fresh = model.generate(messages=messages, mode=mode, max_new_tokens=12)
        assert said(chat, text, mode) == fresh.text[0]
        assert chat.answer.token_ids == fresh.token_ids[0]
        assert chat.answer.prompt_tokens == fresh.prompt_lengths[0]
        assert (chat.answer.reused_tokens > 0) == (number > 0)
        messages.append({"role": "assistant", "content": fresh.text[0]})
    assert chat.messages == messages


def test_an_answer_that_is_cut_off_is_told_from_one_that_ends_at_its_limit(model, monkeypatch):
    chat = Chat(model, None, OPTIONS)
    said(chat, "def f(x):")
    assert chat.answer.is_cut
    first = chat.answer.token_ids[:1]
    monkeypatch.setattr(model.base_model.generation_config, "eos_token_id", first)
    chat = Chat(model, None, {**OPTIONS, "max_new_tokens": 1})
    said(chat, "def f(x):")
    assert chat.answer.token_ids == first
    assert not chat.answer.is_cut


def test_sampled_turns_have_seeds_of_their_own_and_can_be_repeated(model):
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    chats = [Chat(model, None, options) for _ in range(2)]
    first, second = ([said(chat, "x = 1") for _ in range(2)] for chat in chats)
    assert first == second
    messages = chats[0].messages[:3]
    again = model.generate(messages=messages, max_new_tokens=12, temperature=1.0, seed=4)
    assert first[1] == again.text[0]


def test_behind_the_largest_seed_turns_go_on_with_the_smallest(model):
    chat = Chat(model, None, {"max_new_tokens": 12, "temperature": 1.0, "seed": 2**63 - 1})
    for _ in range(2):
        found = said(chat, "x = 1")
    again = model.generate(messages=chat.messages[:3], max_new_tokens=12, temperature=1.0, seed=0)
    assert found == again.text[0]


def test_an_answer_that_is_stopped_stays_as_far_as_it_was_said(model):
    chat = Chat(model, None, OPTIONS)
    chunks = chat.say("def f(x):")
    begun = next(chunks).text + next(chunks).text
    chunks.close()
    assert chat.messages == [{"role": "user", "content": "def f(x):"}, {"role": "assistant", "content": begun}]
    assert not chat.answer.is_complete
    asked = [*chat.messages, {"role": "user", "content": "go on"}]
    assert said(chat, "go on") == model.generate(messages=asked, max_new_tokens=12).text[0]
    assert chat.answer.is_complete
    assert chat.answer.reused_tokens > 0


def test_a_question_without_an_answer_is_not_kept(model, monkeypatch):
    chat = Chat(model, None, OPTIONS)
    monkeypatch.setattr(model, "stream", lambda **options: (StreamChunk("", [0], 0) for _ in range(1)))
    assert said(chat, "x") == ""
    assert chat.messages == []


def test_a_new_conversation_begins_behind_the_systems_message(model):
    chat = Chat(model, "Be brief.", OPTIONS)
    first = said(chat, "x = 1")
    chat.reset()
    assert roles(chat) == ["system"]
    assert said(chat, "x = 1") == first
    assert chat.answer.reused_tokens == 0


def test_what_no_longer_fits_leaves_the_oldest_first_and_the_system_stays(model, monkeypatch):
    monkeypatch.setattr(type(model.target), "max_positions", property(lambda target: 100))
    chat = Chat(model, "Be brief.", OPTIONS)
    for number in range(8):
        said(chat, f"question {number}")
        assert chat.answer.prompt_tokens + 12 <= 100
        if chat.num_forgotten:
            break
    assert number > 1
    assert chat.num_forgotten == 2
    assert chat.messages[0]["role"] == "system"
    assert chat.messages[1] == {"role": "user", "content": "question 1"}
    fresh = model.generate(messages=chat.messages[:-1], max_new_tokens=12)
    assert chat.messages[-1]["content"] == fresh.text[0]


def test_a_message_that_alone_does_not_fit_is_told_and_nothing_is_lost(model):
    chat = Chat(model, None, OPTIONS)
    said(chat, "x = 1")
    before = list(chat.messages)
    with pytest.raises(ValueError, match=r"^prompt and new tokens: expected at most 2048 positions of the model"):
        chat.say("x" * 9000)
    assert chat.messages == before


def test_a_conversation_needs_a_template_that_takes_its_system_message(model):
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}"
    Chat(model, None, OPTIONS)
    with pytest.raises(ValueError, match=r"^messages: expected no system message, as the chat template leaves it out"):
        Chat(model, "Be brief.", OPTIONS)
    model.tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"^messages: expected a tokenizer with a chat template"):
        Chat(model, None, OPTIONS)


def test_plain_speed_is_measured_behind_the_same_messages_and_disturbs_nothing(model, monkeypatch):
    chat = Chat(model, None, {**OPTIONS, "max_new_tokens": 40})
    said(chat, "def f(x):")
    messages, calls, stream = list(chat.messages), [], model.stream

    def noting(**options):
        calls.append(options)
        return stream(**options)

    monkeypatch.setattr(model, "stream", noting)
    assert chat.plain_tokens_per_second() > 0
    assert [(one["mode"], one["max_new_tokens"], one["messages"]) for one in calls] == [
        ("plain", PLAIN_TOKENS, messages[:1])
    ]
    assert chat.messages == messages
    said(chat, "go on")
    assert chat.answer.reused_tokens > chat.answer.prompt_tokens / 2


# ---------------------------------------------------------------------- a terminal


class TerminalFile(io.StringIO):
    """Says that a person sits behind it."""

    def isatty(self) -> bool:
        return True


class Terminal:
    """A person's terminal, at which lines are typed or keys pressed that raise; then Ctrl-D."""

    def __init__(self, monkeypatch, *typed: str | type[BaseException]):
        lines, self._out = iter(typed), TerminalFile()

        def typing(prompt: str) -> str:
            line = next(lines, EOFError)
            if isinstance(line, str):
                return line
            raise line

        console = partial(Console, file=self._out, force_terminal=True, color_system="standard", width=500)
        monkeypatch.setattr(sys, "stdin", TerminalFile())
        monkeypatch.setattr(sys, "stdout", self._out)
        monkeypatch.setattr("builtins.input", typing)
        monkeypatch.setattr(chat_terminal, "Console", console)

    @property
    def text(self) -> str:
        """What is shown, with its colours."""
        return self._out.getvalue()


def test_a_terminal_shows_answers_with_their_speed_and_obeys(model, monkeypatch):
    monkeypatch.setattr(Chat, "plain_tokens_per_second", lambda self: 1e-3)
    terminal = Terminal(monkeypatch, "def f(x):", "/plain", "go on", "/help", "/what", "/reset", "", "/quit", "never")
    chat = Chat(model, None, {**OPTIONS, "max_new_tokens": 24})
    run_chat(chat, "fused", as_json=False)
    for words in ("24 tokens, ", " tokens/s, ", "tokens a step", "x plain, first token after", "from now on: plain"):
        assert words in terminal.text
    assert "expected a message, or /help for commands, found /what" in terminal.text
    assert "a new conversation" in terminal.text
    assert "Ctrl-C     stop the answer" in terminal.text
    assert "green      drafted tokens that were accepted; cyan, copied ones" in terminal.text
    assert chat.messages == []


def test_the_ratio_to_plain_is_of_what_was_measured(model, monkeypatch):
    Terminal(monkeypatch)
    chat = Chat(model, None, OPTIONS)
    talk, asked = TerminalTalk(chat, "fused", chat_terminal.Console()), []
    monkeypatch.setattr(chat, "plain_tokens_per_second", lambda: asked.append(1) or 20.0)
    drafted = Answer("fused", token_ids=[0] * 31, num_steps=20, seconds=1.0, is_complete=True)
    assert "31 tokens, 30.0 tokens/s, 1.50 tokens a step, 1.50 x plain" in talk._status(drafted)
    assert "1.50 x plain" in talk._status(drafted)
    assert asked == [1]  # once
    talk._status(Answer("plain", token_ids=[0] * 31, num_steps=30, seconds=2.0, is_complete=True))
    assert "2.00 x plain" in talk._status(drafted)  # /plain answers measure as well
    assert talk._status(Answer("fused", token_ids=[0])).endswith("; stopped")
    cut = Answer("fused", token_ids=[0], is_complete=True, is_cut=True)
    assert talk._status(cut).endswith("; cut off (--max-new-tokens)")


def test_accepted_drafted_tokens_are_coloured_and_characters_stay_whole(tokenizer):
    ids = tokenizer("x = 'é'").input_ids
    for mode, num_steps, places in (("fused", 1, range(2)), ("two_pass", 1, range(1, 3)), ("fused", 0, range(2))):
        pieces = list(pieces_of(TextStream(tokenizer), StreamChunk("", ids, 2), mode, is_first=num_steps == 0))
        assert [place for place, (_, origin) in enumerate(pieces) if origin == "drafted"] == list(places)
        assert "".join(piece for piece, _ in pieces) == "x = 'é'"


def test_drafts_are_green_in_a_terminal(model, monkeypatch):
    terminal = Terminal(monkeypatch, "x")
    ids = model.tokenizer("def main").input_ids
    chunks = [StreamChunk("", ids[:1], 0), StreamChunk("", ids[1:], 1)]
    monkeypatch.setattr(model, "stream", lambda **options: (chunk for chunk in chunks))
    run_chat(Chat(model, None, OPTIONS), "fused", as_json=False)
    assert f"{GREEN}{model.tokenizer.decode(ids[1:2])}" in terminal.text


def test_an_interrupt_stops_the_answer_and_not_the_program(model, monkeypatch):
    terminal, stream, before = Terminal(monkeypatch, KeyboardInterrupt, "x = 1", "y = 2"), model.stream, []

    def interrupted(**options):
        for number, chunk in enumerate(stream(**options)):
            if number == 2 and not before:
                before.append(signal.getsignal(signal.SIGINT))
                signal.raise_signal(signal.SIGINT)
            yield chunk

    monkeypatch.setattr(model, "stream", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    chat = Chat(model, None, {**OPTIONS, "max_new_tokens": 40})
    run_chat(chat, "plain", as_json=False)
    assert roles(chat) == ["user", "assistant"] * 2
    assert "Ctrl-D or /quit ends" in terminal.text
    assert "3 tokens, " in terminal.text
    assert terminal.text.count("; stopped") == 1
    assert chat.messages[1]["content"] == model.generate(messages=chat.messages[:1], max_new_tokens=3).text[0]
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_interrupt_while_plain_decoding_is_measured_does_not_end_the_program(model, monkeypatch):
    terminal = Terminal(monkeypatch, "x = 1", "y = 2")
    monkeypatch.setattr(Chat, "plain_tokens_per_second", lambda self: signal.raise_signal(signal.SIGINT) or 1.0)
    chat = Chat(model, None, {**OPTIONS, "max_new_tokens": 20})
    run_chat(chat, "fused", as_json=False)
    assert roles(chat) == ["user", "assistant"] * 2
    assert "; stopped" not in terminal.text


def test_a_second_interrupt_is_not_held_back():
    with chat_terminal._noted_interrupt() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_message_that_does_not_fit_is_told_in_a_terminal_and_the_next_is_answered(model, monkeypatch):
    terminal = Terminal(monkeypatch, "x" * 9000, "x = 1")
    chat = Chat(model, None, OPTIONS)
    run_chat(chat, "plain", as_json=False)
    assert "error: prompt and new tokens: expected at most 2048" in terminal.text
    assert roles(chat) == ["user", "assistant"]


# ---------------------------------------------------------------------- pipes and the command line


@pytest.fixture
def run(model, monkeypatch):
    """Runs the command line with this model."""
    monkeypatch.setattr(program, "load_model", lambda *options: model)
    return lambda *arguments, **options: CliRunner().invoke(program.app, list(arguments), **options)


def test_from_a_pipe_comes_one_message_a_line(model, run):
    result = run("chat", "x", "--max-new-tokens", "12", "--mode", "plain", input="x = 1\n\n/fused\ny = 2")
    assert result.exit_code == 0, result.output
    messages = [{"role": "user", "content": "x = 1"}]
    first = model.generate(messages=messages, max_new_tokens=12).text[0]
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "y = 2"}]
    second = model.generate(messages=messages, max_new_tokens=12).text[0]
    assert result.stdout == f"{first}\n{second}\n"
    cut = "that answer was cut off at 12 tokens (--max-new-tokens)\n"
    assert result.stderr == f"{cut}from now on: fused\n{cut}"


def test_in_a_pipe_a_byte_order_mark_is_no_text_and_a_path_no_command(model, run):
    result = run("chat", "x", "--max-new-tokens", "4", "--json", input="\ufeff/plain\n/etc/x\n/etc\n")
    assert [json.loads(line)["message"] for line in result.stdout.splitlines()] == ["/etc/x", "/etc"]
    assert result.stderr == "from now on: plain\n"


@pytest.mark.parametrize(
    ("message", "words"),
    [(b"x" * 9000, "prompt and new tokens: expected at most 2048"), (b"\xff x", "expected UTF-8 text, found another")],
)
def test_in_a_pipe_a_message_that_cannot_be_answered_ends_the_program_with_its_line(model, run, message, words):
    result = run("chat", "x", "--max-new-tokens", "4", input=b"x = 1\n\n" + message + b"\ny = 2\n")
    assert result.exit_code == 2
    assert f"error: line 3: {words}" in result.stderr


@pytest.mark.parametrize("mode", MODES)
def test_json_is_one_object_an_answer(model, run, mode):
    options = ("--mode", mode, "--system", "Be brief.", "--max-new-tokens", "12")
    result = run("chat", "x", *options, "--json", input="x = 1\ny = 2\n")
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert (first["message"], second["message"]) == ("x = 1", "y = 2")
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x = 1"}]
    fresh = model.generate(messages=asked, mode=mode, max_new_tokens=12)
    assert (first["text"], first["token_ids"], first["mode"]) == (fresh.text[0], fresh.token_ids[0], mode)
    assert first["num_accepted_tokens"] == fresh.stats.num_accepted_tokens
    assert first["tokens_per_step"] == pytest.approx(fresh.stats.tokens_per_step)
    assert first["is_complete"]
    assert 0 == first["reused_tokens"] < second["reused_tokens"] < second["prompt_tokens"]


@pytest.mark.parametrize("command", [("chat", "x"), ("generate", "x", "--chat", "--prompt", "x = 1")])
def test_sampled_drafts_are_verified_as_asked_for(run, command, monkeypatch):
    own, found = verifier.verify_sample, set()

    def noting(*given, verification="token", generator=None):
        if given[2].shape[1]:  # a draft
            found.add(verification)
        return own(*given, verification=verification, generator=generator)

    monkeypatch.setattr(verifier, "verify_sample", noting)
    for name in VERIFICATIONS:
        options = ("--max-new-tokens", "6", "--temperature", "1", "--seed", "1", "--verification", name)
        result = run(*command, *options, input="x = 1")
        assert result.exit_code == 0, result.output
        assert found == {name}
        found.clear()


def test_what_is_left_out_of_a_piped_conversation_is_told_on_standard_error(model, run, monkeypatch):
    monkeypatch.setattr(type(model.target), "max_positions", property(lambda target: 60))
    result = run("chat", "x", "--max-new-tokens", "12", "--json", input="question\n" * 4)
    told = "the oldest 2 messages are left out: with a whole answer the conversation no longer fits the model's 60 pos"
    assert told in result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["forgotten_messages"] == 2


@pytest.mark.parametrize(
    ("arguments", "lines", "words"),
    [
        (["--mode", "tree"], "x", "mode: expected one of plain, two_pass, fused, found 'tree'"),
        (["--verification", "all"], "x", "verification: expected one of token, block, found 'all'"),
        (["--max-new-tokens", "0"], "x", "max_new_tokens: expected an integer >= 1, found 0"),
        (["--temperature", "-1"], "x", "temperature: expected"),
        (["--seed", "-1"], "x", "seed: expected an integer from 0"),
        ([], "x" * 9000, "prompt and new tokens: expected at most 2048 positions of the model, found"),
    ],
)
def test_what_cannot_be_answered_from_a_pipe_is_one_line_and_exit_code_2(run, arguments, lines, words):
    result = run("chat", "x", *arguments, input=lines)
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert words in result.stderr
    assert result.stdout == ""


def test_a_base_without_chat_template_is_told(model, run):
    model.tokenizer.chat_template = None
    for arguments in (["chat", "x"], ["generate", "x", "--chat", "--prompt", "x"]):
        result = run(*arguments, input="x")
        assert result.exit_code == 2
        assert ": expected a tokenizer with a chat template for conversations, found none" in result.stderr


@pytest.mark.parametrize("way", [["--json"], ["--show-drafts"], ["--compare"], []])
def test_generate_chat_asks_each_prompt_by_the_template(model, run, way):
    fresh = model.generate(messages=[{"role": "user", "content": "x = 1"}], max_new_tokens=12)
    result = run("generate", "x", "--chat", "--prompt", "x = 1", "--max-new-tokens", "12", *way)
    assert result.exit_code == 0, result.output
    if way == ["--json"]:
        found = json.loads(result.stdout)
        assert (found["prompt"], found["token_ids"]) == ("x = 1", fresh.token_ids[0])
    else:
        shown = "".join(result.stdout.split())
        assert "".join(fresh.text[0].split()) in shown or way == ["--show-drafts"]


def test_a_real_pipe(tiny_base, chat_tokenizer, packaged_adapter, tmp_path):
    base, adapter = tmp_path / "base", packaged_adapter(K)
    shutil.copytree(Path(pardec.__file__).parent / "assets/tiny-python", base)
    chat_tokenizer.save_pretrained(base)
    adapter.metadata.base.name = str(base)
    save_adapter(adapter, tmp_path / "adapter")
    ended = subprocess.run(
        [sys.executable, "-m", "pardec", "chat", str(tmp_path / "adapter"), "--max-new-tokens", "12"],
        input="x = 1\ny = 2\n",
        capture_output=True,
        text=True,
        env=os.environ,
        check=True,
    )
    model = SelfSpeculativeModel(tiny_base, chat_tokenizer, None)
    chat = Chat(model, None, OPTIONS)
    assert ended.stdout == "".join(said(chat, text, "plain") + "\n" for text in ("x = 1", "y = 2"))
    assert "\x1b" not in ended.stdout + ended.stderr
