"""The command line: `pardec generate`, `pardec check` and `pardec tune`.

Imports torch and transformers inside the commands only, so that `--help` is quick.
Exit codes: 0 done, 1 a check found a difference, 2 unusable input.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

if TYPE_CHECKING:
    import torch

    from pardec.model import GenerationOutput, SelfSpeculativeModel

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Decode several exact tokens per forward pass with learned mask tokens.",
)

Directory = Annotated[str, typer.Argument(help="adapter directory, e.g. runs/quickstart", show_default=False)]
BaseOption = Annotated[
    str | None, typer.Option("--base", help="base model, if not the one that the adapter names", show_default=False)
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="e.g. cpu, cuda:1; default CUDA where there is one", show_default=False)
]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="e.g. float32, bfloat16; default float32 on a CPU", show_default=False)
]


def main() -> None:
    """The console script."""
    app()


@app.command()
def generate(
    directory: Directory,
    source: Annotated[
        str | None, typer.Argument(metavar="[-]", help="- reads the prompt from standard input", show_default=False)
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="the prompt; - reads standard input", show_default=False)] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(help="file with one prompt, or .jsonl with a 'prompt' per line; - reads standard input"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="limit per prompt")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="keep the k likeliest tokens", show_default=False)] = None,
    top_p: Annotated[float | None, typer.Option(help="keep the likeliest that sum to p", show_default=False)] = None,
    min_p: Annotated[
        float | None, typer.Option(help="keep those min_p times the likeliest", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="makes sampling repeatable", show_default=False)] = None,
    mode: Annotated[str, typer.Option(help="fused, two_pass or plain")] = "fused",
    num_speculative_tokens: Annotated[
        int | None,
        typer.Option(help="drafted tokens per step; default the tuned choice, else all trained", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object per prompt")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="run plain decoding too, side by side")] = False,
    show_drafts: Annotated[bool, typer.Option("--show-drafts", help="colour accepted drafted tokens")] = False,
    base: BaseOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="run the base's own code")] = False,
) -> None:
    """Continue prompts exactly as the base model would, several tokens per forward."""
    from pardec.run import exit_on_unusable_input

    with exit_on_unusable_input():
        chosen = [flag for flag, on in (("--json", as_json), ("--show-drafts", show_drafts)) if on]
        if len(chosen) > 1:
            raise ValueError(f"options: expected one of {' and '.join(chosen)}, found both")
        prompts = _read_prompts(source, prompt, prompt_file)
        model = _load(directory, base, device, dtype, trust_remote_code)
        options = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "seed": seed,
            "num_speculative_tokens": num_speculative_tokens,
        }
        if compare:
            identical = [_compare(model, text, mode, options, as_json) for text in prompts]
            # sampled texts differ by design: they follow one law, not one stream of random numbers
            sys.exit(0 if temperature > 0 or all(identical) else 1)
        for text in prompts:
            if as_json:
                print(json.dumps(_as_object(text, model.generate(text, mode=mode, **options))), flush=True)
            else:
                _stream(model, text, mode, options, show_drafts)


@app.command()
def check(
    directory: Directory,
    base: BaseOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="run the base's own code")] = False,
) -> None:
    """Show what an adapter is, and that its output with this base is the base's own."""
    from pardec.run import exit_on_unusable_input

    with exit_on_unusable_input():
        model = _load(directory, base, device, dtype, trust_remote_code)
        identical = _print_check(model)
    sys.exit(0 if identical else 1)


@app.command()
def tune(
    directory: Directory,
    prompt_file: Annotated[
        str | None,
        typer.Option(
            help="prompts to measure on, as in generate; default the standard prompts of the validation split",
            show_default=False,
        ),
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(help="default 16, with --quick 4", show_default=False)] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="for each prompt; default 128, with --quick 32", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="prompts decoded together")] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="keep the k likeliest tokens", show_default=False)] = None,
    compile: Annotated[bool, typer.Option("--compile", help="tune for `pardec.load(..., compile=True)`")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="fewer and shorter measurements")] = False,
    picture: Annotated[
        str | None, typer.Option(help="PNG to draw ms per step against rows in", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")] = False,
    base: BaseOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="run the base's own code")] = False,
) -> None:
    """Measure this device, choose how many tokens to draft for the most tokens/s, and keep the choice."""
    from pardec.run import exit_on_unusable_input

    with exit_on_unusable_input():
        texts = None if prompt_file is None else _read_prompts(None, None, prompt_file)
        model = _load(directory, base, device, dtype, trust_remote_code, compile)

        from pardec.measuring import QUICK, Effort
        from pardec.tune import prompts_to_tune_on, show_report, tune

        if num_prompts is None and texts is None:
            num_prompts = max(4 if quick else 16, batch_size)
        if max_new_tokens is None:
            max_new_tokens = 32 if quick else 128
        report = tune(
            model,
            directory,
            prompts_to_tune_on(model, texts, num_prompts),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            temperature=temperature,
            top_k=top_k,
            effort=QUICK if quick else Effort(),
        )
        show_report(report, as_json=as_json, picture=None if picture is None else Path(picture))


def _load(
    directory: str,
    base: str | None,
    device: str | None,
    dtype: str | None,
    trust_remote_code: bool,
    compile: bool = False,
) -> "SelfSpeculativeModel":
    import torch
    from transformers.utils import logging

    import pardec

    logging.disable_progress_bar()
    if dtype not in (None, "float64", "float32", "float16", "bfloat16"):
        raise ValueError(f"dtype: expected a torch dtype, float64, float32, float16 or bfloat16, found {dtype!r}")
    where = None if device is None else _usable_device(device)
    return pardec.load(
        directory,
        base=base,
        device=where,
        dtype=None if dtype is None else getattr(torch, dtype),
        compile=compile,
        trust_remote_code=trust_remote_code,
    )


def _usable_device(name: str) -> "torch.device":
    """The device, if it is one that can hold a tensor here."""
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise ValueError(f"device: expected a torch device of this machine, such as cpu, found {name!r}") from None
    return device


def _read_prompts(source: str | None, prompt: str | None, prompt_file: str | None) -> list[str]:
    if source not in (None, "-"):
        raise ValueError(f"prompt: expected --prompt, --prompt-file or -, found argument {source!r}")
    given = [value for value in (source, prompt, prompt_file) if value is not None]
    if len(given) != 1:
        raise ValueError(f"prompt: expected exactly one of --prompt, --prompt-file and -, found {len(given)}")
    if given[0] == "-":
        texts = [sys.stdin.read()]
    elif prompt is not None:
        texts = [prompt]
    else:
        texts = _prompts_of_file(Path(given[0]))
    for text in texts:
        if not text:
            raise ValueError("prompt: expected some text, found an empty prompt")
    return texts


def _prompts_of_file(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"{path}: expected a prompt file, found {'a directory' if path.is_dir() else 'nothing'}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, found {error.reason} at byte {error.start}") from None
    if path.suffix != ".jsonl":
        return [text]
    prompts = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: expected a JSON object, found {error}") from None
        if not isinstance(value, dict) or not isinstance(value.get("prompt"), str) or not value["prompt"]:
            raise ValueError(f"{path}:{number}: expected an object with a non-empty text 'prompt', found {line[:60]}")
        prompts.append(value["prompt"])
    if not prompts:
        raise ValueError(f"{path}: expected at least one prompt, found none")
    return prompts


def _as_object(prompt: str, out: "GenerationOutput") -> dict:
    stats = out.stats.to_dict()
    stats.pop("sequences")
    stats["accepted_per_step"] = out.stats.sequences[0].accepted_per_step
    return {"prompt": prompt, "text": out.text[0], "token_ids": out.token_ids[0], "stats": stats}


def _stream(model: "SelfSpeculativeModel", prompt: str, mode: str, options: dict, show_drafts: bool) -> None:
    """Prints text as it becomes final; accepted drafts in colour where asked for."""
    from rich.console import Console
    from rich.text import Text

    chunks = model.stream(prompt, mode=mode, **options)
    if not show_drafts:
        for chunk in chunks:
            print(chunk.text, end="", flush=True)
        print()
        return
    console = Console(highlight=False, soft_wrap=True, force_terminal=True)
    assert model.tokenizer is not None
    accepted = steps = 0
    for number, chunk in enumerate(chunks):
        # two_pass emits its exact token first; accepted drafts stand before the bonus token
        first = 1 if mode == "two_pass" and number else 0
        for index, token in enumerate(chunk.token_ids):
            drafted = first <= index < first + chunk.num_accepted_tokens
            text = cast(str, model.tokenizer.decode([token], skip_special_tokens=True))
            console.print(Text(text, style="bold green" if drafted else ""), end="")
        accepted, steps = accepted + chunk.num_accepted_tokens, steps + (number > 0)
    console.print(f"\n\n{accepted} drafted tokens accepted in {steps} steps (green)", style="dim")


def _compare(model: "SelfSpeculativeModel", prompt: str, mode: str, options: dict, as_json: bool) -> bool:
    """Runs plain decoding and `mode` in turn, prints both, says whether the tokens are the same."""
    from rich.console import Console
    from rich.table import Table

    model.generate(prompt, mode=mode, **{**options, "max_new_tokens": min(8, options["max_new_tokens"])})  # warm-up
    plain = model.generate(prompt, mode="plain", **options)
    drafted = model.generate(prompt, mode=mode, **options)
    identical = plain.token_ids == drafted.token_ids
    ratio = drafted.stats.tokens_per_second / plain.stats.tokens_per_second
    if as_json:
        both = {"plain": _as_object(prompt, plain), mode: _as_object(prompt, drafted)}
        print(json.dumps({**both, "identical": identical, "ratio_to_plain": ratio}), flush=True)
        return identical
    console = Console(highlight=False)
    console.print(drafted.text[0], markup=False)
    table = Table("mode", "new tokens", "forwards", "mean acceptance length", "tokens/s", "ratio to plain")
    for name, out, factor in (("plain", plain, 1.0), (mode, drafted, ratio)):
        stats = out.stats
        table.add_row(
            name,
            str(stats.num_new_tokens),
            str(stats.num_forwards),
            f"{stats.mean_acceptance_length:.2f}",
            f"{stats.tokens_per_second:.1f}",
            f"{factor:.2f} x",
        )
    console.print(table)
    same = (
        "yes"
        if identical
        else "no" + (" (sampled: the law is the same, not the draw)" if options["temperature"] else "")
    )
    console.print(f"same tokens as plain: {same}")
    return identical


def _print_check(model: "SelfSpeculativeModel") -> bool:
    """The adapter's facts, the probe's figure and a short comparison of every mode with plain decoding."""
    from rich.console import Console
    from rich.table import Table

    from pardec.probe import probe

    assert model.adapter is not None
    metadata, lora = model.adapter.metadata, model.adapter.lora
    table = Table(show_header=False)
    table.add_row("base", f"{metadata.base.name} (fingerprint matches)")
    table.add_row("mask tokens", f"{metadata.num_speculative_tokens}, {metadata.mask_sharing}")
    table.add_row("gated LoRA", "none" if lora is None else f"rank {lora.rank}, {len(lora.pairs())} modules")
    sampled = metadata.measured.get("sampled")
    if isinstance(sampled, dict):
        shown = ("mean_acceptance_length", "interval", "temperature", "top_k")
        table.add_row("measured when trained", ", ".join(f"{key} {sampled.get(key)}" for key in shown))
    deviation = probe(model.target)
    table.add_row("real rows against a plain forward", f"{deviation:.1e} standard deviations of the logits")
    prompt = [int(i) for i in range(1, 13)]
    plain = model.generate([prompt], mode="plain", max_new_tokens=32).token_ids
    identical = True
    for mode in ("two_pass", "fused"):
        same = model.generate([prompt], mode=mode, max_new_tokens=32).token_ids == plain
        identical = identical and same
        table.add_row(f"32 greedy tokens, {mode}", "identical to plain" if same else "DIFFERENT from plain")
    Console(highlight=False).print(table)
    return identical
