"""Work for all processors, in one process and in several."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import pardec.all_cores
from pardec.all_cores import num_cores, on_all_cores
from pardec.data.row_checks import DataError


def leave_file(folder: Path, item: int) -> None:
    (folder / str(item)).write_text(str(os.getpid()))


def refuse(item: int) -> None:
    if item == 3:
        raise DataError("rows.jsonl:3: expected more, found less")


@pytest.fixture(params=[1, 2])
def cores(request, monkeypatch):
    monkeypatch.setattr(pardec.all_cores, "num_cores", lambda: request.param)
    return request.param


def test_every_item_is_worked_on_once(cores, tmp_path):
    on_all_cores(partial(leave_file, tmp_path), range(4, 40), title="working")
    assert sorted(int(file.name) for file in tmp_path.iterdir()) == list(range(4, 40))
    by = {file.read_text() for file in tmp_path.iterdir()}
    assert (str(os.getpid()) in by) == (cores == 1)
    assert len(by) <= cores


def test_what_the_function_raises_is_raised(cores):
    with pytest.raises(DataError, match=r"^rows\.jsonl:3: expected more, found less$"):
        on_all_cores(refuse, range(5), title="working")


@pytest.mark.parametrize("before", [None, "true"])
def test_the_environment_is_as_before(before, monkeypatch, tmp_path):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if before is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
    monkeypatch.setattr(pardec.all_cores, "num_cores", lambda: 2)
    on_all_cores(partial(leave_file, tmp_path), range(2), title="working")
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before


def test_nothing_to_do_is_done():
    on_all_cores(refuse, [], title="working")


def test_cores_are_those_that_the_process_may_use():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert num_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def kill_itself(item: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_one_line(monkeypatch):
    monkeypatch.setattr(pardec.all_cores, "num_cores", lambda: 2)
    with pytest.raises(OSError, match=r"^working: expected 2 processes to end, found one killed, as mem"):
        on_all_cores(kill_itself, range(3), title="working")


SLEEPERS = """
import os, pathlib, sys, time
import pardec.all_cores as a
a.num_cores = lambda: 2
def leave(item):
    pathlib.Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(60)
a.on_all_cores(leave, range(4), title="working")
"""


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no process is told that its parent is gone")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_end_with_the_one_that_started_them(tmp_path, number):
    command = [sys.executable, "-c", SLEEPERS, str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True) as main:
        while len(helpers := [int(file.name) for file in tmp_path.iterdir()]) < 2:
            assert main.poll() is None
            time.sleep(0.02)
        # Ctrl-C reaches all of a terminal's processes, other signals one
        os.killpg(main.pid, number) if number == signal.SIGINT else main.send_signal(number)
        main.communicate(timeout=20)
    deadline = time.monotonic() + 20
    while any(map(is_alive, helpers)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
