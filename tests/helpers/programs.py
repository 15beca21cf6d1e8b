"""Runs of this project's programs: in this process, as starting one takes seconds, or in a process of its own."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers.utils import logging

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """How a program ended: its exit code, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> dict:
        """The object that stands as the last line of standard output."""
        return json.loads(self.out.splitlines()[-1])

    @property
    def error(self) -> str:
        """What was wrong with the input; asserts exit code 2 and a single line of standard error that says so."""
        # a progress bar that is being cleared may leave codes of the terminal in front of it
        lines = [line[line.index("error: ") :] for line in self.err.splitlines() if "error: " in line]
        assert self.code == 2, self.err
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


def run(main: Callable[[], None], *arguments: object) -> Ended:
    """Calls a program's `main` with a command line, as on a machine without a GPU; leaves this process as it was."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    command = [file_of(main), *map(str, arguments)]
    with pytest.MonkeyPatch.context() as patch, global_state_kept(), redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", command)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    return Ended(code, out.getvalue(), err.getvalue())


def file_of(main: Callable[[], None]) -> str:
    """The program's file."""
    path = sys.modules[main.__module__].__file__
    assert path is not None
    return path


@contextmanager
def global_state_kept() -> Iterator[None]:
    """Gives back what programs set for the whole process, and begins without the Accelerator of another."""
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    forget_accelerators()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        forget_accelerators()
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar() if has_bars else logging.disable_progress_bar()


def forget_accelerators() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run_in_own_process(script: str, *arguments: object, launcher: tuple[str, ...] = ()) -> Ended:
    """Starts a program as a user does, on a machine without a GPU.

    Args:
        script: its path in the project.
        arguments: of its command line.
        launcher: of the interpreter's, in front of the script.
    """
    command = [sys.executable, *launcher, str(ROOT / script), *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    return Ended(done.returncode, done.stdout, done.stderr)


_SCRIPTS = """
import io, json, runpy, sys, traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

ended = []
for script, *arguments in json.loads(sys.argv[1]):
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
    ended.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(ended))
"""


def run_as_scripts(*command_lines: Sequence[object]) -> list[Ended]:
    """Starts programs as a user does, one after another in one process, as what they import takes seconds.

    Args:
        command_lines: of each, a script's path in the project, and arguments.
    """
    commands = [[str(ROOT / script), *map(str, arguments)] for script, *arguments in command_lines]
    command = [sys.executable, "-c", _SCRIPTS, json.dumps(commands)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [Ended(*one) for one in json.loads(done.stdout.splitlines()[-1])]


def start_here(monkeypatch: pytest.MonkeyPatch, *mains: Callable[[], None]) -> None:
    """Has these programs run in this process when another program starts them, and a process end as they have."""
    by_name = {Path(file_of(main)).name: main for main in mains}

    class Started(subprocess.Popen):
        def __init__(self, command, **options):
            main = by_name.get(Path(command[1]).name)
            if main is not None:
                ended = run(main, *command[2:])
                options["stdout"].write(ended.out + ended.err)
                command = [sys.executable, "-c", f"raise SystemExit({ended.code})"]
            super().__init__(command, **options)

    monkeypatch.setattr(subprocess, "Popen", Started)
