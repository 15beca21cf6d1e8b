"""One run at a time in a folder: two would write over each other's checkpoints and logs, and neither would say so.

Knows the folder and its checkpoints alone.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pardec.run import held_alone
from pardec.training.running.checkpoints import read_progress

# what a killed process leaves, such as helpers that are ending, may hold on for a moment
_TRIES, _SECONDS = 20, 0.1


@contextmanager
def only_run(output: Path, first_step: int) -> Iterator[None]:
    """Makes the folder of a run and keeps other runs out of it; where it ends, however it ends, others may come.

    Args:
        output: of the run.
        first_step: that of the checkpoint which it goes on from, 0 for a run that begins.

    Raises:
        ValueError: if another run is there, or has been meanwhile.
        OSError: if the folder cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        folder = os.open(output, os.O_RDONLY)
    except OSError as error:
        raise OSError(f"output_dir {output}: expected a folder that can be made, found {error.strerror}") from None
    try:
        if not _locked(folder):
            raise ValueError(
                f"output_dir {output}: expected no other run that writes there, found one; choose another output_dir "
                "or wait for its end"
            )
        step = (read_progress(output / "checkpoints") or {"step": 0})["step"]
        if step != first_step:
            raise ValueError(
                f"output_dir {output}: expected its newest checkpoint to be that of step {first_step}, as when this "
                f"run began, found step {step}, which another has left meanwhile; start again to go on from there"
            )
        yield
    finally:
        os.close(folder)


def _locked(folder: int) -> bool:
    for _ in range(_TRIES):
        if held_alone(folder):
            return True
        time.sleep(_SECONDS)
    return False
