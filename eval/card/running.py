"""Runs a step of the report as a process with a log and a time limit, and notes how it ended.

Knows nothing of what the steps are.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from card.steps import Step
from reporting.result_files import write_json

ROOT = Path(__file__).resolve().parents[2]
CUT_OFF = -1  # in place of an exit code
# files that several steps leave under one name
COMMON_NAMES = ("README.md", "metrics.jsonl", "pardec.json", "tuned.json")


def is_done(output: Path, step: Step) -> bool:
    """Whether the step ended well before, with the same command."""
    found = read_record(output, step)
    return found is not None and found["code"] == 0 and found["command"] == list(step.command)


def read_record(output: Path, step: Step) -> dict | None:
    """What `run_step` wrote of the step."""
    path = record_file(output, step)
    return json.loads(path.read_text()) if path.exists() else None


def record_file(output: Path, step: Step) -> Path:
    """Where it is noted how the step ended."""
    return output / f"{step.name}.step.json"


def run_step(output: Path, step: Step, limit_seconds: float) -> int:
    """Runs a step with its output in a log; returns its exit code, `CUT_OFF` if it took too long."""
    print(f"{step.name}: python {' '.join(step.command)}", flush=True)
    log, start, began = output / f"{step.name}.log", time.monotonic(), time.time()
    (output / "work").mkdir(exist_ok=True)
    with log.open("w") as file:
        command = [sys.executable, *step.command]
        options = {"stdout": file, "stderr": subprocess.STDOUT, "env": environment(), "start_new_session": True}
        process = subprocess.Popen(command, cwd=ROOT, **options)
        try:
            code = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            code = CUT_OFF
        finally:
            end_group(process)
    seconds = round(time.monotonic() - start, 1)
    # a program that found something wrong, or was cut off, may have written what it had
    left = [path for path in step.results if path.exists() and (code == 0 or is_newer(path, began))]
    gathered = [gather(path, output) for path in left]
    record = {"command": list(step.command), "code": code, "seconds": seconds, "results": gathered}
    write_json(record, record_file(output, step))
    said = "done" if code == 0 else "cut off; run again to continue" if code == CUT_OFF else f"failed, see {log}"
    print(f"{step.name}: {said} after {seconds:.0f} s", flush=True)
    return code


def environment() -> dict[str, str]:
    """That of every step."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # where the project is not installed
    return {
        "CUDA_VISIBLE_DEVICES": "0",  # one process on one device, so that figures are those of one
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        # warnings are errors in tests, and those of whatever plugins a machine has are not ours
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }


def end_group(process: subprocess.Popen) -> None:
    """Ends what is left of a step, the processes that it has started too: nothing may go on beside the next step."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def is_newer(path: Path, began: float) -> bool:
    """Whether a file, or one in a folder, was written since; `began` in seconds since the epoch."""
    files = path.rglob("*") if path.is_dir() else [path]
    # the clock of a file system may be a moment behind
    return any(file.stat().st_mtime > began - 0.1 for file in files)


def gather(path: Path, output: Path) -> str:
    """Copies a result file, or the files of a folder, beside the report; returns the name there."""
    name = f"{path.parent.name}-{path.name}" if path.name in COMMON_NAMES else path.name
    if path.is_dir():
        shutil.copytree(path, output / name, dirs_exist_ok=True)
    else:
        shutil.copy(path, output / name)
    return name
