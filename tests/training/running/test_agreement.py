"""Several processes, one of which cannot go on: all end with what it says, none waits for it."""

import time
from pathlib import Path

from launched import Launched
from programs import global_state_kept

from pardec.training.running.agreement import any_process, failing_together, main_process_first, of_all
from pardec.training.running.processes import make_accelerator


def one_fails(errors: dict[int, Exception]) -> list:
    """In one of several processes: what is raised in it where these are in some, and what it knows of all."""
    accelerator = make_accelerator("no")
    rank, told = accelerator.process_index, []
    for wrong in (None, errors.get(rank)):
        try:
            with failing_together(accelerator):
                if wrong is not None:
                    raise wrong
            told.append(None)
        except (ValueError, OSError) as error:
            told.append(str(error))
    return [*told, of_all(accelerator, 10 * rank), any_process(accelerator, rank == 1), any_process(accelerator, False)]


def test_what_is_wrong_in_one_process_is_said_by_all():
    found = Launched(2, one_fails, {1: OSError("disk: expected room, found none")}).results()
    assert found == [[None, "disk: expected room, found none", [0, 10], True, False]] * 2


def test_of_several_each_says_its_own():
    found = Launched(3, one_fails, {1: ValueError("one"), 2: ValueError()}).results()
    assert [told for _, told, *_ in found] == ["one", "one", ""]


def test_one_process_by_itself_raises_what_it_finds():
    with global_state_kept():
        assert one_fails({}) == [None, None, [0], False, False]
        assert one_fails({0: ValueError("alone")})[1] == "alone"


def in_turn(path: Path, errors: dict[int, Exception]) -> list:
    """In one of several processes: which of them have begun before it, and what it raises."""
    accelerator = make_accelerator("no")
    rank, told, before = accelerator.process_index, None, None
    try:
        with main_process_first(accelerator):
            before = path.read_text() if path.exists() else ""
            if rank in errors:
                raise errors[rank]
            if rank == 0:
                time.sleep(0.3)
                path.write_text("main")
    except ValueError as error:
        told = str(error)
    return [before, told]


def test_the_main_process_has_done_it_before_others_begin(tmp_path):
    assert Launched(2, in_turn, tmp_path / "seen", {}).results() == [["", None], ["main", None]]


def test_what_is_wrong_with_one_in_its_turn_is_said_by_all(tmp_path):
    found = Launched(2, in_turn, tmp_path / "seen", {0: ValueError("row 3")}).results()
    assert found == [["", "row 3"], [None, "row 3"]]
    found = Launched(2, in_turn, tmp_path / "other", {1: ValueError("row 4")}).results()
    assert found == [["", "row 4"], ["main", "row 4"]]
