"""Arguments of other kinds than the one that is expected: told at once, in one line, and never converted.

Knows numbers, flags, devices and dtypes, not what they are for.
"""

import math
import numbers
import operator
from collections.abc import Collection

import torch

from pardec.errors import shown

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """An integer from `least` to `most`, of numpy or torch as well; a bool and a float are none.

    Raises:
        ValueError: beginning with `name`.
    """
    try:
        found = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        found = None
    if found is None or found < least or (most is not None and found > most):
        expected = f"an integer >= {least}" if most is None else f"an integer from {least} to {most}"
        raise ValueError(f"{name}: expected {expected}, found {shown(value)}")
    return found


def real(value: object) -> float:
    """A number as a float, NaN for what is none, so that every comparison with it fails; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def flag(name: str, value: object) -> bool:
    """True or False.

    Raises:
        ValueError: beginning with `name`.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, found {shown(value)}")
    return value


def one_of(name: str, value: object, names: Collection[str]) -> str:
    """One of these names.

    Raises:
        ValueError: beginning with `name`.
    """
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{name}: expected one of {', '.join(names)}, found {shown(value)}")
    return value


def usable_device(device: object) -> torch.device:
    """A device of this machine that can hold a tensor, from its name or as it is.

    Raises:
        ValueError: naming what was found.
    """
    try:
        if not isinstance(device, str | torch.device):
            raise RuntimeError
        usable = torch.device(device)
        torch.zeros(1, device=usable).item()
        torch.zeros(1, device=usable, dtype=torch.float64).item()
    except TypeError:  # MPS
        raise ValueError(
            f"device: expected one that computes in float64, in which tokens are drawn, found {usable}; cpu does"
        ) from None
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        found = str(device) if isinstance(device, torch.device) else device
        raise ValueError(
            f"device: expected a torch device of this machine, such as cpu, found {shown(found)}"
        ) from None
    return usable


def known_dtype(dtype: object) -> torch.dtype:
    """A dtype that models are run in, from its name or as it is.

    Raises:
        ValueError: naming those that there are.
    """
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in _DTYPES.values():
        raise ValueError(f"dtype: expected a torch dtype, {', '.join(_DTYPES)}, found {shown(dtype)}")
    return found
