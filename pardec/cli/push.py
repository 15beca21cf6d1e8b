"""`pardec push`: what it is asked for and what it prints.

Imports torch and transformers inside the command only. Exit codes as in `pardec.cli`.
"""

import sys
from typing import Annotated

import typer

from pardec.cli.loading import errors_in_a_line
from pardec.cli.options import Directory


def push(
    directory: Directory,
    repo: Annotated[str, typer.Argument(help="user/name, or user/name@branch", show_default=False)],
    public: Annotated[
        bool, typer.Option("--public", help="for everybody to see; a new repository is private otherwise")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option("--base", help="the base's hub name, where the adapter has another for it", show_default=False),
    ] = None,
) -> None:
    """Put an adapter on the Hugging Face hub, with a card; the token is that of HF_TOKEN or `hf auth login`."""
    with errors_in_a_line():
        from pardec.exports.push import push_adapter

        done = push_adapter(directory, repo, public=public, base=base)
        if not done.base_is_found:
            print(
                f"warning: base: expected a hub name, found {done.base}: others need base= or --base to load it",
                file=sys.stderr,
            )
        print(f"{done.url}: pushed, {'private' if done.private else 'public'}; pardec.load({repo!r}) loads it")
