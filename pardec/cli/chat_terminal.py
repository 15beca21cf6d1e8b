"""The program of `pardec chat`: messages from a terminal or a pipe, answers as they are decoded.

Knows lines, colours and Ctrl-C; the conversation itself is `pardec.chat`.
"""

import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict

from rich.console import Console
from rich.text import Text

from pardec.chat import PLAIN_TOKENS, Answer, Chat
from pardec.cli.console import STYLES
from pardec.cli.loading import tell
from pardec.data.prompt_files import checked_input, standard_input
from pardec.data.reading import BYTE_ORDER_MARK
from pardec.decoding.output import Origin, TextStream, pieces_of
from pardec.decoding.step import MODES

_HELP = f"""\
/plain     answer without drafting, to feel the difference
/fused     draft and verify in one forward; /two_pass in two
/reset     begin a new conversation
/quit      end; so does Ctrl-D
Ctrl-C     stop the answer; what was said stays. Twice ends the program
green      drafted tokens that were accepted; cyan, copied ones
x plain    against a plain run of {PLAIN_TOKENS} tokens behind the first drafted answer, or the last answer of /plain"""
_COMMANDS = ("/help", "/reset", *(f"/{mode}" for mode in MODES))
PROMPT = "\n> "  # behind which a person types
# an answer of fewer tokens says little about speed
_FEWEST_TOKENS = 16


def run_chat(chat: Chat, mode: str, *, as_json: bool) -> None:
    """Answers one message a line until there are no more.

    Args:
        chat: the conversation.
        mode: of the first answers, one of `MODES`.
        as_json: one JSON object an answer, on standard output.

    Raises:
        ValueError: for messages that cannot be answered, but in a terminal, where they are told and the next is read.
    """
    if sys.stdin is None:
        raise ValueError("chat: expected messages on standard input, found it closed")
    talks = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
    if talks:
        TerminalTalk(chat, mode, Console(highlight=False, soft_wrap=True)).follow(_typed())
    else:
        _Talk(chat, mode, as_json).follow(standard_input())


class _Talk:
    """Answers on standard output, without colour; notices on standard error."""

    is_typed = False  # a word behind a slash is a mistyped command, else a message

    def __init__(self, chat: Chat, mode: str, as_json: bool = False):
        self.chat, self.mode, self.as_json = chat, mode, as_json

    def follow(self, lines: Iterable[str]) -> None:
        """Answers messages and obeys commands, one a line, until there are no more.

        Raises:
            ValueError: for a message that cannot be answered, naming its line.
        """
        for number, line in enumerate(lines, start=1):
            message = (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).strip()
            if message == "/quit":
                return
            if message in _COMMANDS or (self.is_typed and message.startswith("/") and len(message.split()) == 1):
                self.obey(message)
            elif message:
                checked_input(f"line {number}", line)
                try:
                    self.answer(message)
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from None

    def tell(self, notice: str) -> None:
        tell(notice)

    def obey(self, command: str) -> None:
        """Any command but /quit."""
        if command[1:] in MODES:
            self.mode = command[1:]
            self.tell(f"from now on: {self.mode}")
        elif command == "/reset":
            self.chat.reset()
            self.tell("a new conversation")
        else:
            self.tell(_HELP if command == "/help" else f"expected a message, or /help for commands, found {command}")

    def answer(self, message: str) -> None:
        chunks = self.chat.say(message, self.mode)
        self.tell_of_forgotten()
        for chunk in chunks:
            if not self.as_json:
                print(chunk.text, end="", flush=True)
        print(json.dumps(_as_object(message, self.chat)) if self.as_json else "", flush=True)
        if self.chat.answer.is_cut and not self.as_json:
            self.tell(f"that answer was cut off at {len(self.chat.answer.token_ids)} tokens (--max-new-tokens)")

    def tell_of_forgotten(self) -> None:
        """What left the conversation before this answer."""
        if self.chat.num_forgotten:
            self.tell(
                f"the oldest {self.chat.num_forgotten} messages are left out: with a whole answer the conversation "
                f"no longer fits the model's {self.chat.num_positions} positions"
            )


class TerminalTalk(_Talk):
    """Answers in a terminal, in colour, each with a line about its speed."""

    is_typed = True

    def __init__(self, chat: Chat, mode: str, console: Console):
        super().__init__(chat, mode)
        self.console = console
        self.plain_tokens_per_second: float | None = None

    def tell(self, notice: str) -> None:
        self.console.print(Text(notice, style="dim"))

    def answer(self, message: str) -> None:
        try:
            chunks = self.chat.say(message, self.mode)
        except ValueError as error:
            self.tell(f"error: {error}")
            return
        self.tell_of_forgotten()
        text = TextStream(self.chat.tokenizer)
        with _noted_interrupt() as interrupted:
            with closing(chunks):
                for chunk in chunks:
                    answer = self.chat.answer
                    self._print(pieces_of(text, chunk, answer.mode, is_first=answer.num_steps == 0))
                    if interrupted():
                        break
            if self.chat.answer.is_complete:
                self._print([(text.put([], last=True), "target")])
            self.console.print()
            self.tell(self._status(self.chat.answer))  # which may measure: Ctrl-C must not end the program there either

    def _print(self, pieces: Iterable[tuple[str, Origin]]) -> None:
        for piece, origin in pieces:
            self.console.print(Text(piece, style=STYLES[origin]), end="")

    def _status(self, answer: Answer) -> str:
        words = [f"{len(answer.token_ids)} tokens", f"{answer.tokens_per_second:.1f} tokens/s"]
        if answer.mode == "plain":
            if len(answer.token_ids) >= _FEWEST_TOKENS:
                self.plain_tokens_per_second = answer.tokens_per_second
            words.append("plain")
        else:
            words.append(f"{answer.tokens_per_step:.2f} tokens a step")
            if self.plain_tokens_per_second is None and len(answer.token_ids) >= _FEWEST_TOKENS:
                self.plain_tokens_per_second = self.chat.plain_tokens_per_second()
            if self.plain_tokens_per_second:
                words.append(f"{answer.tokens_per_second / self.plain_tokens_per_second:.2f} x plain")
        reused = f"{answer.reused_tokens} of {answer.prompt_tokens} prompt tokens reused"
        words += [f"first token after {answer.first_seconds:.2f} s", reused]
        ended = "; cut off (--max-new-tokens)" if answer.is_cut else "" if answer.is_complete else "; stopped"
        return ", ".join(words) + ended


def _as_object(message: str, chat: Chat) -> dict:
    """What `--json` prints of one answer."""
    answer = chat.answer
    rates = {"tokens_per_second": answer.tokens_per_second, "tokens_per_step": answer.tokens_per_step}
    return {"message": message, **asdict(answer), **rates, "forgotten_messages": chat.num_forgotten}


def _typed() -> Iterator[str]:
    """Lines that a person types; Ctrl-C gives up a line, Ctrl-D ends."""
    with suppress(ImportError):
        import readline  # noqa: F401  # `input` takes arrow keys then
    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\nCtrl-D or /quit ends")


@contextmanager
def _noted_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is noted, so that no step is torn in two; a second one acts as it does everywhere."""
    pressed = []

    def note(number: int, frame: object) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
