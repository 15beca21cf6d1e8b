"""`pardec export`: what it is asked for and what it prints.

Imports torch and transformers inside the command only. Exit codes as in `pardec.cli`.
"""

import sys
from typing import Annotated

import typer

from pardec.cli.loading import errors_in_a_line


def export(
    directory: Annotated[
        str | None,
        typer.Argument(
            help="adapter: a directory, a packaged one such as smollm2, or user/name@revision on the hub",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", help="vllm, vllm-stock, sglang, transformers or peft", show_default=False)
    ] = None,
    output: Annotated[str | None, typer.Option("--output", help="the folder to make", show_default=False)] = None,
    check: Annotated[
        str | None,
        typer.Option("--check", metavar="FOLDER", help="see whether an exported folder is whole", show_default=False),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="base model, if not the one that the adapter names", show_default=False)
    ] = None,
    with_base: Annotated[
        bool, typer.Option("--with-base", help="with the base's own files; --to transformers only")
    ] = False,
) -> None:
    """Write an adapter as an engine takes it, or check what was written."""
    with errors_in_a_line():
        from transformers.utils import logging

        from pardec.exports.export import check_export, export_adapter

        logging.disable_progress_bar()
        asked = {"DIRECTORY": directory, "--to": to, "--output": output}
        if check is not None:
            asked |= {"--base": base, "--with-base": with_base or None}
            given = [name for name, value in asked.items() if value is not None]
            if given:
                raise ValueError(f"--check: expected the exported folder alone, found {', '.join(given)} as well")
            found, done = check_export(check), f"{check}: unchanged"
        elif directory is None or to is None or output is None:
            missing = ", ".join(name for name, value in asked.items() if value is None)
            raise ValueError(f"export: expected DIRECTORY, --to and --output, or --check, found no {missing}")
        else:
            found = export_adapter(directory, to, output, base=base, with_base=with_base)
            done = f"{output}: written and checked"
        for note in found.notes:
            print(f"warning: {note}", file=sys.stderr)
        print("\n".join(found.problems) or f"{done}; to use it:\n\n{found.commands}\n\n{found.about}")
    sys.exit(1 if found.problems else 0)
