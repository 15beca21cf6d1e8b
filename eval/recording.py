"""What does a conversation look like? Records `pardec chat` as the picture of a terminal.

    python eval/recording.py DIR --output eval/results/chat.svg [--message TEXT ...]

Holds the conversation with the program's own lines and colours, greedily, and writes what a terminal of 100 columns
shows at its end, drawn by rich: a window with a background of its own, to be read on light and dark pages. Command,
device and versions are the picture's description. Ends with one line of JSON.
"""

import argparse
import io
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from reporting.result_files import provenance
from rich.ansi import AnsiDecoder
from rich.cells import chop_cells
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text
from transformers.utils import logging

import pardec
from pardec.chat import Chat
from pardec.cli.chat_terminal import PROMPT, TerminalTalk
from pardec.run import exit_on_unusable_input, written_aside

COLUMNS = 100
MESSAGES = ("Write a Python function that tests whether a text is a palindrome.", "Explain it in two sentences.")


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="adapter, as of `pardec chat`")
    parser.add_argument("--output", default="runs/chat.svg", help="default runs/chat.svg")
    parser.add_argument("--message", action="append", help="or a command such as /plain, in this order; default two")
    parser.add_argument("--max-new-tokens", type=int, default=160, help="limit per answer")
    args = parser.parse_args()
    with exit_on_unusable_input():
        report(args)


def report(args: argparse.Namespace) -> None:
    """Holds the conversation, draws the terminal, and prints the JSON line."""
    logging.disable_progress_bar()
    messages, output = args.message or list(MESSAGES), Path(args.output)
    model = pardec.load(args.directory)
    chat = Chat(model, None, {"max_new_tokens": args.max_new_tokens})
    mode = model.engines.drafting(None, None, None, None).mode  # as `pardec chat` begins
    for either in ("plain", mode):  # weights are packed once, which is no answer's time
        model.generate(messages=[{"role": "user", "content": "?"}], mode=either, max_new_tokens=8)
    shown, answers = converse(chat, mode, messages, f"$ pardec chat {args.directory}")
    result = {"answers": answers, "max_new_tokens": args.max_new_tokens, **provenance(model.target.device)}
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(output) as aside:
        aside.write_text(picture(shown, result))
    print(shown)
    print(json.dumps(result))


def converse(chat: Chat, mode: str, messages: Sequence[str], command: str) -> tuple[str, list[dict]]:
    """What the program writes to a terminal, with its codes, and the figures of every answer."""
    written, answers = io.StringIO(), []
    console = Console(file=written, force_terminal=True, color_system="standard", highlight=False, soft_wrap=True)

    def typed() -> Iterator[str]:
        for message in messages:
            console.print(Text(PROMPT + message))  # as the terminal shows what a person types
            before = chat.answer
            yield message
            if chat.answer is not before and chat.answer.token_ids:
                answers.append(figures(message, chat))

    console.print(Text(command))
    TerminalTalk(chat, mode, console).follow(typed())
    return written.getvalue(), answers


def figures(message: str, chat: Chat) -> dict:
    """Of the last answer."""
    answer = chat.answer
    return {
        "message": message,
        "mode": answer.mode,
        "text": answer.text,
        "num_new_tokens": len(answer.token_ids),
        "tokens_per_second": round(answer.tokens_per_second, 2),
        "tokens_per_step": round(answer.tokens_per_step, 4),
    }


def picture(shown: str, result: dict) -> str:
    """An SVG of a terminal that shows this text with its codes; `result` becomes its description."""
    console = Console(record=True, file=io.StringIO(), width=COLUMNS, force_terminal=True, highlight=False)
    for line in AnsiDecoder().decode(shown):
        console.print(*folded(line), sep="\n", soft_wrap=True)
    console.print()  # as rich clips to every line but the last
    svg = console.export_svg(title="pardec chat", theme=MONOKAI)
    # ends of lines are no text, and pages that show pictures load no fonts for them
    svg = re.sub(r"\s*@font-face \{.*?\}|<text [^>]*>\n</text>", "", svg, flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    return f"{head}>\n<desc>{escape(json.dumps(result))}</desc>{rest}"


def folded(line: Text) -> list[Text]:
    """The lines that a terminal makes of one, which it breaks wherever the last column is."""
    line.expand_tabs(8)
    lengths = [len(piece) for piece in chop_cells(line.plain, COLUMNS)]
    return list(line.divide(list(itertools.accumulate(lengths))[:-1]))


if __name__ == "__main__":
    main()
