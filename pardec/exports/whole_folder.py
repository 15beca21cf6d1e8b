"""A folder that is there whole or not at all: it is written beside, and gets its name once all of it is on the disk.

Knows files, not what is in them.
"""

import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from pardec.errors import first_line
from pardec.run import NoRoomError, to_disk

_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def refuse_taken(output: Path) -> None:
    """Raises ValueError if something has the name of a folder that is to be made."""
    if os.path.lexists(output):
        raise ValueError(f"output: expected a folder that is not there yet, found {output}")


@contextmanager
def made_whole(output: Path) -> Iterator[Path]:
    """Gives a folder to write into, which becomes `output` when the context ends, and goes if that fails.

    Of several processes that make the same folder at once, the first to end has it. What processes left that were
    killed goes with the next.

    Raises:
        ValueError: if `output` is there already, or cannot be made.
        OSError: if there is no room.
    """
    refuse_taken(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output)
        aside, descriptor = _made_beside(output)
    except OSError as error:
        raise ValueError(f"output: expected a folder that can be made, found {output}: {error.strerror}") from None
    try:
        yield aside
        _settle(aside)
        refuse_taken(output)  # renaming would put it in the place of an empty folder
        os.rename(aside, output)
        to_disk(output.parent)
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if number in _TAKEN and os.path.lexists(output):  # made meanwhile
            refuse_taken(output)
        if number in _FULL or isinstance(error, SafetensorError | NoRoomError):
            # without the name that the file has aside
            found = getattr(error, "strerror", None) or first_line(error).rpartition(", found ")[2]
            raise OSError(f"{output}: expected room for all its files, found {found}") from None
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        os.close(descriptor)


def _begins(output: Path) -> str:
    return f".writing-{output.name}-"


def _made_beside(output: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock, by which others see that its process lives."""
    while True:
        aside = Path(tempfile.mkdtemp(prefix=_begins(output), dir=output.parent))
        try:
            descriptor = os.open(aside, os.O_RDONLY)
        except FileNotFoundError:  # somebody took it for a leftover in the moment before it is locked
            continue
        if _is_free(descriptor) and aside.is_dir():
            return aside, descriptor
        os.close(descriptor)


def _is_free(descriptor: int) -> bool:
    """Whether no other process holds a folder's lock; then this one does, until the descriptor is closed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_leftovers(output: Path) -> None:
    for path in output.parent.iterdir():
        if not re.fullmatch(re.escape(_begins(output)) + "[a-z0-9_]{8}", path.name):
            continue
        with suppress(OSError):  # of what is somebody else's, or gone by now
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if _is_free(descriptor):
                    shutil.rmtree(path)
            finally:
                os.close(descriptor)


def _settle(folder: Path) -> None:
    """Puts all files on the disk for good, readable for those who serve them."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors lets only the owner read
            to_disk(path)
    folder.chmod(0o755)  # mkdtemp lets only the owner in
