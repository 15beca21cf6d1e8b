"""What the command line does around loading: options judged before it, a line while it lasts, advice behind it.

Imports torch and transformers inside its functions only. Nothing is said where standard error is no terminal.
"""

import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pardec.model import SelfSpeculativeModel


def check_options(
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    num_speculative_tokens: int | None = None,
    mode: str | None = None,
    verification: str | None = None,
    copy_tokens: int | None = None,
) -> None:
    """Refuses values that no model could be asked with, before one is loaded; all as in `generate`.

    Raises:
        ValueError: as `generate` says it.
    """
    from pardec.arguments import integer, one_of
    from pardec.decoding.sampling import make_warpers
    from pardec.decoding.step import MODES
    from pardec.decoding.verify import VERIFICATIONS
    from pardec.layout import MAX_COPY_TOKENS, MAX_SPECULATIVE_TOKENS

    make_warpers(temperature, top_k, top_p, min_p)
    if max_new_tokens is not None:
        integer("max_new_tokens", max_new_tokens, 1)
    if seed is not None:
        integer("seed", seed, 0, 2**63 - 1)
    if num_speculative_tokens is not None:
        integer("num_speculative_tokens", num_speculative_tokens, 0, MAX_SPECULATIVE_TOKENS)
    if copy_tokens is not None:
        integer("copy_tokens", copy_tokens, 0, MAX_COPY_TOKENS)
    if mode is not None:
        one_of("mode", mode, MODES)
    if verification is not None:
        one_of("verification", verification, VERIFICATIONS)


def tell(notice: str) -> None:
    """A line on standard error, for whoever reads it: texts go on without."""
    if sys.stderr is not None:
        with suppress(BrokenPipeError):
            print(notice, file=sys.stderr, flush=True)


def tell_of_unused(temperature: float, **narrowed: float | None) -> None:
    """A line where what narrows the law of samples was asked for, and nothing is sampled.

    Args:
        temperature: 0 is greedy.
        narrowed: top_k, top_p and min_p; None where it was not asked for.
    """
    unused = [f"--{name.replace('_', '-')}" for name, value in narrowed.items() if value is not None]
    if temperature == 0 and unused:
        tell(f"greedy, so nothing is changed by {' and '.join(unused)}; --temperature above 0 samples")


def tell_of_compiling(compile: bool) -> None:
    """A line before steps are compiled, as nothing moves meanwhile."""
    if compile:
        tell("steps are compiled when they first come up, up to minutes, and speeds count that; torch keeps the code")


def tell_of_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """For `warnings.showwarning`: in one line as errors are, without the place in the code that it comes from."""
    tell(f"warning: {' '.join(str(message).split())}")


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """`exit_on_unusable_input` around a command. Until torch is imported for that, Ctrl-C ends the process at once:

    torch drops an interrupt while it imports numpy, and goes on with half of that until something else breaks.
    """
    handler = signal.getsignal(signal.SIGINT)
    is_ours = handler is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if is_ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from pardec.run import exit_on_unusable_input
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, handler)
    with exit_on_unusable_input():
        yield


@contextmanager
def told_in_a_terminal(doing: str) -> Iterator[None]:
    """A line that moves on standard error, while the work inside lasts."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(doing):
        yield


def load_model(
    directory: str,
    base: str | None,
    device: str | None,
    dtype: str | None,
    trust_remote_code: bool,
    compile: bool = False,
) -> "SelfSpeculativeModel":
    """`pardec.load`, with a line that moves instead of a bar for each of the base's files."""
    from transformers.utils import logging

    import pardec

    logging.disable_progress_bar()
    with told_in_a_terminal(f"loading {directory}"):
        return pardec.load(
            directory, base=base, device=device, dtype=dtype, compile=compile, trust_remote_code=trust_remote_code
        )


def advise_tuning(
    model: "SelfSpeculativeModel",
    directory: str,
    *asked: object,
    base: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    as_chat: bool = False,
) -> None:
    """One line of how drafts are made where nobody asks: as trained or as is fastest elsewhere, which may be slower
    than without, or as was fastest here.

    Args:
        model: as it was loaded.
        directory: of its adapter.
        asked: what the user asked for of all that tuning chooses; None where it is left to tuning.
        base: that was asked for, which tuning is to be asked for as well.
        device: likewise.
        trust_remote_code: likewise.
        as_chat: texts go through the chat template, so prompts to tune on are to be a user's messages.
    """
    if any(one is not None for one in asked) or model.adapter is None or sys.stderr is None or not sys.stderr.isatty():
        return
    from pardec.run import device_name, dtype_name

    here = device_name(model.target.device), dtype_name(model.target.dtype), model.compile
    given = {"dtype": here[1], "device": device, "base": base}
    options = " ".join(f"--{name} {shlex.quote(value)}" for name, value in given.items() if value is not None)
    options += " --trust-remote-code" * trust_remote_code + " --compile" * model.compile
    options += " --chat --prompt-file YOUR_PROMPTS.jsonl" * as_chat
    command, how = f"pardec tune {shlex.quote(directory)} {options}", f"{here[1]}{', compiled,' * model.compile}"
    if model.tuned is None:
        tell(f"not tuned for {how} on this device, perhaps slower than plain: {command}")
    elif (model.tuned.device, model.tuned.dtype, model.tuned.compile) != here:
        fastest = f"{model.tuned.dtype}{', compiled,' * model.tuned.compile} on {model.tuned.device}"
        is_plain = model.tuned.mode == "plain"
        does = f"decodes plain, as drafts may be slower in {how}" if is_plain else f"drafts as was fastest in {fastest}"
        tell(f"{does}; for {how} here: {command}")
    else:
        from pardec.tuning.report import describe

        tell(f"as tuned for this device: {describe(model.tuned)}")


def mode_beside_plain(mode: str | None, chosen: str, num_speculative_tokens: int | None = None) -> str:
    """What a comparison with plain decoding decodes in: what drafts, also where tuning chose not to.

    Args:
        mode: that was asked for.
        chosen: the one that a call without comparison decodes in.
        num_speculative_tokens: that was asked for.

    Raises:
        ValueError: where nothing is to be drafted by what was asked for.
    """
    if mode == "plain":
        raise ValueError("mode: expected fused or two_pass to compare plain decoding with, found 'plain'")
    if mode is None and chosen == "plain" and num_speculative_tokens == 0:
        raise ValueError("num_speculative_tokens: expected at least 1 to compare plain decoding with, found 0")
    if mode is None and chosen == "plain":
        tell("without --compare this decodes plain, as tuned or asked for; fused stands beside it")
    return mode or ("fused" if chosen == "plain" else chosen)
