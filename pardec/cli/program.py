"""The commands `generate`, `chat` and `check`, and the program that all commands are of.

Imports torch and transformers inside the commands only, so that `--help` is quick. Exit codes as in `pardec.cli`.
"""

import sys
import warnings
from importlib.metadata import version
from typing import Annotated, Any

import typer

from pardec.cli.continuing import chosen_mode, compare_each, continue_each, ids_of_each
from pardec.cli.export import export
from pardec.cli.import_lora import import_lora
from pardec.cli.loading import (
    advise_tuning,
    check_options,
    errors_in_a_line,
    load_model,
    tell_of_compiling,
    tell_of_unused,
    tell_of_warning,
)
from pardec.cli.options import (
    AsChat,
    BaseOption,
    Compile,
    CopyTokens,
    DeviceOption,
    Directory,
    DtypeOption,
    MinP,
    Mode,
    NumSpeculativeTokens,
    Seed,
    Temperature,
    TopK,
    TopP,
    TrustRemoteCode,
    UseHead,
    Verification,
)
from pardec.cli.push import push
from pardec.cli.tune import tune
from pardec.data.prompt_files import read_prompts


def _show_version(asked: bool) -> None:
    if asked:
        print(f"pardec {version('pardec')}")
        raise typer.Exit


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Decode several exact tokens per forward pass with learned mask tokens.",
)


def main() -> None:
    """The console script; what is wrong with a command line is told in one line, too."""
    with warnings.catch_warnings():
        warnings.showwarning = tell_of_warning
        _run_command()


def _run_command() -> None:
    try:
        ended = typer.main.get_command(app).main(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # what cannot be written is to be known here, not when the interpreter ends
        sys.exit(ended)
    except OSError:  # of --help and --version, for which there is no room; commands tell of their own
        with errors_in_a_line():
            raise
    except Exception as error:
        kind, say = type(error).__name__, getattr(error, "format_message", None)  # of click, which typer has its own of
        if kind == "Abort":  # Ctrl-C
            sys.exit(130)
        if say is None:
            raise
        if kind != "NoArgsIsHelpError":  # which has shown the help
            context = getattr(error, "ctx", None)
            command = "pardec" if context is None or context.parent is None else f"pardec {context.info_name}"
            print(f"error: {' '.join(say().split())} ({command} --help)", file=sys.stderr)
        sys.exit(2)


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="print the version and end")
    ] = False,
) -> None:
    """Decode several exact tokens per forward pass with learned mask tokens."""


@app.command()
def generate(
    directory: Directory,
    source: Annotated[
        str | None, typer.Argument(metavar="[-]", help="- reads the prompt from standard input", show_default=False)
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="the prompt; - reads standard input", show_default=False)] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(
            help="a text, or .jsonl with a 'prompt' per line (or 'turns' of a --chat, whose first is taken); - reads "
            "standard input"
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="limit per prompt")] = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    mode: Mode = None,
    num_speculative_tokens: NumSpeculativeTokens = None,
    use_head: UseHead = None,
    verification: Verification = "token",
    copy_tokens: CopyTokens = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object per prompt")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="decode plain too, side by side in equal time")] = False,
    show_drafts: Annotated[
        bool, typer.Option("--show-drafts", help="colour accepted drafted and copied tokens")
    ] = False,
    as_chat: AsChat = False,
    compile: Compile = False,
    base: BaseOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Continue prompts exactly as the base model would, several tokens per forward."""
    with errors_in_a_line():
        chosen = [flag for flag, on in (("--json", as_json), ("--show-drafts", show_drafts)) if on]
        if len(chosen) > 1:
            raise ValueError(f"options: expected one of {' and '.join(chosen)}, found both")
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "seed": seed,
            "num_speculative_tokens": num_speculative_tokens,
            "verification": verification,
            "copy_tokens": copy_tokens,
        }
        check_options(**options, mode=mode)
        tell_of_unused(temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        prompts = read_prompts(source, prompt, prompt_file, as_chat=as_chat)
        model = load_model(directory, base, device, dtype, trust_remote_code, compile)
        asked = mode, num_speculative_tokens, copy_tokens, use_head
        advise_tuning(
            model, directory, *asked, base=base, device=device, trust_remote_code=trust_remote_code, as_chat=as_chat
        )
        tell_of_compiling(compile)

        given = ids_of_each(model, prompts, as_chat, max_new_tokens)
        options |= {"use_head": use_head}
        if compare:
            compare_each(model, prompts, given, mode, options, as_json)
        else:
            continue_each(model, prompts, given, mode, options, as_json, show_drafts)


@app.command()
def chat(
    directory: Directory,
    system: Annotated[
        str | None, typer.Option(help="system prompt; default the chat template's own", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="limit per answer")] = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    mode: Mode = None,
    num_speculative_tokens: NumSpeculativeTokens = None,
    use_head: UseHead = None,
    verification: Verification = "token",
    copy_tokens: CopyTokens = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object per answer")] = False,
    compile: Compile = False,
    base: BaseOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk with the base model in its chat template; from a pipe, one message a line."""
    with errors_in_a_line():
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "seed": seed,
            "num_speculative_tokens": num_speculative_tokens,
            "verification": verification,
            "copy_tokens": copy_tokens,
        }
        check_options(**options, mode=mode)
        tell_of_unused(temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        model = load_model(directory, base, device, dtype, trust_remote_code, compile)
        asked = mode, num_speculative_tokens, copy_tokens, use_head
        advise_tuning(
            model, directory, *asked, base=base, device=device, trust_remote_code=trust_remote_code, as_chat=True
        )
        tell_of_compiling(compile)
        options |= {"use_head": use_head}

        from pardec.chat import Chat
        from pardec.cli.chat_terminal import run_chat

        mode = chosen_mode(model, mode, options)  # which may settle one of the options
        run_chat(Chat(model, system, options), mode, as_json=as_json)


@app.command()
def check(
    directory: Directory,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="minutes: long contexts, tokens of generate, the sampled law")
    ] = False,
    base: BaseOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show what an adapter is, and that its output with this base is the base's own."""
    with errors_in_a_line():
        model = load_model(directory, base, device, dtype, trust_remote_code)

        from pardec.cli.console import print_check, print_thorough_check

        identical = print_check(model)
        if thorough:
            identical = print_thorough_check(model) and identical
    sys.exit(0 if identical else 1)


app.command()(tune)
app.command()(export)
app.command(name="import")(import_lora)
app.command()(push)
