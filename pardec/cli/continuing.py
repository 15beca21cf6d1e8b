"""How the command line continues prompts, once a model is loaded: all judged first, then one by one.

Imports torch and transformers inside its functions only, as `pardec.cli` does.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pardec.cli.loading import mode_beside_plain, tell
from pardec.errors import short

if TYPE_CHECKING:
    from pardec.model import SelfSpeculativeModel


def ids_of_each(
    model: "SelfSpeculativeModel", prompts: list[str], as_chat: bool, max_new_tokens: int
) -> list[list[int]]:
    """Ids of all prompts, each judged before the first of them is continued.

    Raises:
        ValueError: for one that cannot be continued, by its number where there are several.
    """
    found: list[list[int]] = []
    for number, text in enumerate(prompts, start=1):
        messages = [{"role": "user", "content": text}] if as_chat else None
        with _errors_beginning_with(f"prompt {number} of {len(prompts)}: " if len(prompts) > 1 else ""):
            found += model.prompt_ids(None if as_chat else text, messages=messages)
            model.engines.check(found[-1:], max_new_tokens, 1)
    return found


def check_each(
    model: "SelfSpeculativeModel", prompts: Sequence[list[int]], max_new_tokens: int, source: str | None
) -> None:
    """Refuses prompts that the model has no positions for, before any of them is decoded.

    Raises:
        ValueError: naming the file that they are of, and the prompt's number in it.
    """
    file = "" if source is None else f"{source}: "
    for number, ids in enumerate(prompts, start=1):
        with _errors_beginning_with(f"{file}prompt {number} of {len(prompts)}: "):
            model.engines.check([ids], max_new_tokens, 1)


@contextmanager
def _errors_beginning_with(where: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None


def compare_each(
    model: "SelfSpeculativeModel",
    prompts: list[str],
    given: Sequence[list[int]],
    mode: str | None,
    options: dict[str, Any],
    as_json: bool,
) -> None:
    """Decodes each prompt plain as well, and ends the program: with 1 where greedy texts differ by more than a tie."""
    from pardec.cli.race_terminal import run_races

    asked = options["num_speculative_tokens"]
    beside = mode_beside_plain(mode, chosen_mode(model, mode, options), asked)
    identical = run_races(model, prompts, given, beside, options, as_json=as_json)
    # sampled texts differ by design: they follow one law, not one stream of random numbers
    sys.exit(0 if options["temperature"] > 0 or identical else 1)


def continue_each(
    model: "SelfSpeculativeModel",
    prompts: list[str],
    given: Sequence[list[int]],
    mode: str | None,
    options: dict[str, Any],
    as_json: bool,
    show_drafts: bool,
) -> None:
    """Prints each prompt's continuation, as it is decoded or as an object."""
    from pardec.cli.console import as_object, options_of, print_stream

    mode_of_each = chosen_mode(model, mode, options)
    for number, (text, asked) in enumerate(zip(prompts, given, strict=True)):
        own = options_of(number, options)
        if as_json:
            print(json.dumps(as_object(text, model.generate(asked, mode=mode, **own), mode_of_each)), flush=True)
            continue
        if len(prompts) > 1:
            beginning = "".join(letter if letter.isprintable() else "?" for letter in short(text))
            tell(f"[{number + 1} of {len(prompts)}] {beginning}")
        print_stream(model, asked, mode_of_each, own, show_drafts)


def chosen_mode(model: "SelfSpeculativeModel", mode: str | None, options: dict[str, Any]) -> str:
    """The mode in which a call with these options decodes.

    Where copies alone follow from a choice to draft nothing, the options say so from now on: with a mode beside them
    that choice no longer counts.
    """
    K, L = options["num_speculative_tokens"], options["copy_tokens"]
    way: dict[str, Any] = {"verification": options["verification"], "is_greedy": options["temperature"] == 0}
    drafting = model.engines.drafting(mode, K, None, options.get("use_head"), copy_tokens=L, **way)
    if K is None and L and drafting.mode == "fused" and drafting.num_speculative_tokens == 0:
        options["num_speculative_tokens"] = 0
    return drafting.mode
