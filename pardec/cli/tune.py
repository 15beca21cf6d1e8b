"""`pardec tune`: what it is asked for, and what it measures, writes and prints.

Imports torch and transformers inside the command only. Exit codes as in `pardec.cli`.
"""

from pathlib import Path
from typing import Annotated

import typer

from pardec.cli.continuing import check_each
from pardec.cli.loading import check_options, errors_in_a_line, load_model, tell_of_unused
from pardec.cli.options import AsChat, BaseOption, DeviceOption, Directory, Temperature, TopK, TrustRemoteCode
from pardec.data.prompt_files import read_prompts


def tune(
    directory: Directory,
    prompt_file: Annotated[
        str | None,
        typer.Option(
            help="prompts to measure on, also with `turns` as MT-Bench has them; default python-stdlib, which is code",
            show_default=False,
        ),
    ] = None,
    as_chat: AsChat = False,
    num_prompts: Annotated[
        int | None,
        typer.Option(help="default 16 standard prompts, with --quick 4, or all of --prompt-file", show_default=False),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="for each prompt; default 128, with --quick 32", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="prompts decoded together")] = 1,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="tune for `generate --compile` and `pardec.load(..., compile=True)`")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="fewer and shorter measurements")] = False,
    picture: Annotated[
        str | None, typer.Option(help="PNG to draw ms per step against rows in", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")] = False,
    base: BaseOption = None,
    device: DeviceOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="to tune in; of several, such as float32,bfloat16, also the fastest", show_default=False),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure this device, choose how to decode for the most tokens/s, and keep the choice."""
    with errors_in_a_line():
        source = read_prompts(None, None, prompt_file) if prompt_file == "-" else prompt_file
        check_options(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k)
        tell_of_unused(temperature, top_k=top_k)
        dtypes = [None] if dtype is None else dict.fromkeys(dtype.split(","))
        models = [load_model(directory, base, device, one, trust_remote_code, compile) for one in dtypes]

        from pardec.tuning.measuring import QUICK, Effort
        from pardec.tuning.report import show_reports
        from pardec.tuning.tune import prompts_to_tune_on, tune_each

        if num_prompts is None and source is None:
            num_prompts = max(4 if quick else 16, batch_size)
        if max_new_tokens is None:
            max_new_tokens = 32 if quick else 128
        prompts = prompts_to_tune_on(models[0], source, num_prompts, as_chat=as_chat)
        check_each(models[0], prompts, max_new_tokens, prompt_file)
        reports, by_dtype = tune_each(
            models,
            directory,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            temperature=temperature,
            top_k=top_k,
            effort=QUICK if quick else Effort(),
        )
        show_reports(reports, by_dtype, as_json=as_json, picture=None if picture is None else Path(picture))
