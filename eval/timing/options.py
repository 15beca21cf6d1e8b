"""Options that several programs have, and what a command line gives as text."""

from argparse import ArgumentParser, Namespace
from typing import Any

import torch

from pardec.data.python_sources import STDLIB, TEST, VALIDATION


def add_prompt_options(parser: ArgumentParser) -> None:
    """--prompts and --split, as `read_prompts` takes them."""
    parser.add_argument("--prompts", default=STDLIB, help="python-stdlib, python-packages, a .jsonl or text file")
    parser.add_argument(
        "--split", default=TEST, choices=(VALIDATION, TEST), help="of python-stdlib and python-packages"
    )


def full_or_quick(parser: ArgumentParser, full: dict[str, Any], quick: dict[str, Any]) -> Namespace:
    """The options, with defaults of a full run, or of a quick one where --quick is among them."""
    parser.set_defaults(**full)
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**quick)
    return parser.parse_args()


def check_device(name: str | None) -> None:
    """Refuses a torch device that this machine has not.

    Raises:
        ValueError: naming it.
    """
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device: expected a torch device of this machine, found {name!r}") from None


def integers(option: str, text: str) -> list[int]:
    """The numbers of `1,2,4`, in ascending order.

    Raises:
        ValueError: for anything but integers >= 1, naming the option.
    """
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = [0]
    if numbers[0] < 1:
        raise ValueError(f"{option}: expected integers >= 1 with commas between them, found {text!r}")
    return numbers
