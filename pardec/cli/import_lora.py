"""`pardec import`: what it is asked for and what it prints.

Imports torch and transformers inside the command only. Exit codes as in `pardec.cli`.
"""

from typing import Annotated

import typer

from pardec.cli.loading import errors_in_a_line


def import_lora(
    source: Annotated[
        str, typer.Argument(help="folder of a LoRA trained for UNO, as SGLang takes it", show_default=False)
    ],
    base: Annotated[str, typer.Option("--base", help="base model that it was trained for", show_default=False)],
    output: Annotated[str, typer.Option("--output", help="the folder to make", show_default=False)],
    num_speculative_tokens: Annotated[
        int,
        typer.Option(
            help="drafted tokens per step; one less than SGLang's --speculative-num-draft-tokens", show_default=False
        ),
    ],
) -> None:
    """Make an adapter of a LoRA that was trained for SGLang's algorithm UNO."""
    with errors_in_a_line():
        from transformers.utils import logging

        from pardec.exports.from_sglang import import_uno

        logging.disable_progress_bar()
        adapter = import_uno(source, base, output, num_speculative_tokens)
        assert adapter.lora is not None
        print(
            f"{output}: imported, a LoRA of rank {adapter.lora.rank} on {len(adapter.lora.pairs())} layers, "
            f"K = {num_speculative_tokens}; pardec check {output} shows whether it drafts"
        )
