"""Work for all processors, with `datasets` and without."""

import importlib.util
import os
from functools import partial
from pathlib import Path

import pytest

import pardec.all_cores
from pardec.all_cores import num_cores, on_all_cores
from pardec.data.reading import DataError


def leave_file(folder: Path, item: int) -> None:
    (folder / str(item)).write_text(str(os.getpid()))


def refuse(item: int) -> None:
    if item == 3:
        raise DataError("rows.jsonl:3: expected more, found less")


@pytest.fixture(params=["with datasets", "without"])
def several_cores(request, monkeypatch):
    monkeypatch.setattr(pardec.all_cores, "num_cores", lambda: 2)
    if request.param == "without":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return request.param


def test_every_item_is_worked_on_once(several_cores, tmp_path):
    on_all_cores(partial(leave_file, tmp_path), range(4, 9), title="working")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["4", "5", "6", "7", "8"]
    by = {file.read_text() for file in tmp_path.iterdir()}
    assert (by == {str(os.getpid())}) == (several_cores == "without")
    assert len(by) == (2 if several_cores == "with datasets" else 1)


def test_what_the_function_raises_is_raised(several_cores):
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
