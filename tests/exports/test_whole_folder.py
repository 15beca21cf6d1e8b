"""A folder that is made: whole or not there, whoever makes it at the same time and whatever goes wrong meanwhile."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

import pardec
from pardec.exports.whole_folder import made_whole
from pardec.run import NoRoomError

ROOT = Path(pardec.__file__).parents[1]


def make(output: Path, text: str = "mine") -> None:
    with made_whole(output) as aside:
        (aside / "sub").mkdir()
        (aside / "file").write_text(text)


def test_all_files_are_there_at_once_and_may_be_read_by_others(tmp_path):
    with made_whole(tmp_path / "runs/out") as aside:
        (aside / "file").write_text("mine")
        (aside / "file").chmod(0o600)
        assert not (tmp_path / "runs/out").exists()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["out"]
    assert (tmp_path / "runs/out").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "runs/out/file").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_what_is_there_already_stays(tmp_path, kind):
    output = tmp_path / "out"
    if kind == "folder":
        output.mkdir()
    elif kind == "file":
        output.write_text("theirs")
    else:
        output.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"output: expected a folder that is not there yet, found .*out$"):
        make(output)
    assert kind != "file" or output.read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_where_no_folder_can_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match=f"output: expected a folder that can be made, found {tmp_path}/file/out: "):
        make(tmp_path / "file/out")
    assert (tmp_path / "file").read_text() == "kept"


def test_what_was_killed_goes_with_the_next_one_of_that_name(tmp_path):
    killed, another = tmp_path / ".writing-out-abcd_123", tmp_path / ".writing-out-more-abcd_123"
    killed.mkdir()
    another.mkdir()
    (killed / "half").write_text("x")
    make(tmp_path / "out")
    assert not killed.exists()
    assert another.exists()  # of a folder `out-more`


def test_the_first_of_two_to_end_has_the_name_and_the_other_is_told(tmp_path):
    output = tmp_path / "out"
    with (  # noqa: PT012
        pytest.raises(ValueError, match=r"output: expected a folder that is not there yet, found"),
        made_whole(output) as aside,
    ):
        (aside / "file").write_text("of the one that began first")
        make(output, "of the one that ended first")
        assert (aside / "file").exists()  # it is no leftover
    assert (output / "file").read_text() == "of the one that ended first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("taken", ["folder", "file"])
def test_what_somebody_puts_there_meanwhile_stays(tmp_path, taken):
    output = tmp_path / "out"
    with (
        pytest.raises(ValueError, match=r"output: expected a folder that is not there yet, found"),
        made_whole(output),
    ):
        output.mkdir() if taken == "folder" else output.write_text("theirs")
    assert output.is_dir() if taken == "folder" else output.read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError(errno.ENOSPC, "No space left on device", "out/.writing-x/a.safetensors"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    NoRoomError("out/.writing-x/a.safetensors: expected room for 2,048 bytes, found Error: No space left on device"),
]


@pytest.mark.parametrize("error", FULL, ids=str)
def test_a_full_disk_is_told_in_one_line_and_nothing_is_left(tmp_path, error):
    words = f"{tmp_path}/out: expected room for all its files, found .*(space|quota)"
    with pytest.raises(OSError, match=words) as told:  # noqa: PT012, SIM117
        with made_whole(tmp_path / "out") as aside:
            (aside / "file").write_text("half")
            raise error
    assert ".writing" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_what_is_written_is_told_as_it_is_and_nothing_is_left(tmp_path):
    with pytest.raises(ValueError, match="no such layer"), made_whole(tmp_path / "out"):
        raise ValueError("no such layer")
    assert list(tmp_path.iterdir()) == []


PROGRAM = """
import sys, time
from pathlib import Path
from pardec.exports.whole_folder import made_whole
from pardec.run import exit_on_unusable_input

with exit_on_unusable_input(), made_whole(Path(sys.argv[1])) as aside:
    (aside / "file").write_text("half")
    print("begun", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("sent", "code", "left"), [(signal.SIGINT, 130, 0), (signal.SIGKILL, -signal.SIGKILL, 1)])
def test_a_process_that_is_stopped_leaves_no_folder_of_that_name(tmp_path, sent, code, left):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "out")], env=environment, stdout=-1, stderr=-1, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.1)
    process.send_signal(sent)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert said == ("stopped\n" if sent == signal.SIGINT else "")
    assert len(list(tmp_path.iterdir())) == left
    make(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
