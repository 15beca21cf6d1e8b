"""One run at a time in a folder."""

import errno
import fcntl

import pytest
import torch

import pardec.training.running.only_run
from pardec.training.running.checkpoints import save_state
from pardec.training.running.only_run import only_run


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch):
    monkeypatch.setattr(pardec.training.running.only_run, "_SECONDS", 0.001)


def test_a_folder_takes_a_second_run_only_where_the_first_has_ended(tmp_path):
    output = tmp_path / "deep" / "run"
    with only_run(output, 0):
        with pytest.raises(ValueError, match=r"^output_dir .*run: expected no other run that writes there, found one"):
            only_run(output, 0).__enter__()
        with only_run(tmp_path / "other", 0):
            pass
    with pytest.raises(KeyError), only_run(output, 0):
        raise KeyError
    with only_run(output, 0):
        pass
    assert not list(output.iterdir())


def test_a_run_whose_checkpoints_another_has_gone_on_with_meanwhile_is_refused(tmp_path):
    save_state(tmp_path / "checkpoints", 4, {"w": torch.zeros(1)}, [], {})
    with only_run(tmp_path, 4):
        pass
    for first_step in (0, 3):
        with pytest.raises(ValueError, match=rf"newest checkpoint to be that of step {first_step}, .*found step 4, wh"):
            only_run(tmp_path, first_step).__enter__()
        with only_run(tmp_path, 4):  # the refused one holds nothing
            pass


def test_a_file_system_without_such_locks_is_taken_as_it_is(tmp_path, monkeypatch):
    def unknown(*arguments):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with only_run(tmp_path, 0), only_run(tmp_path, 0):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"^output_dir .*file/run: expected a folder that can be made, found Not a direc"):
        only_run(tmp_path / "file" / "run", 0).__enter__()
