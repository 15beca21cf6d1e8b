"""What a run that was cut off may be continued with."""

import pytest
import torch

from pardec.training.checkpoints import check_same, save_state


def test_a_run_goes_on_with_the_values_that_it_was_saved_with(tmp_path):
    check_same(tmp_path, {"num_processes": 2})  # a run that begins
    save_state(tmp_path / "checkpoints", 3, {"w": torch.zeros(1)}, [], {"num_processes": 2, "data_sha256": "a" * 64})
    check_same(tmp_path, {"num_processes": 2, "data_sha256": "a" * 64})
    with pytest.raises(
        ValueError, match=r"expected the number of processes that it was begun with, 2, found 1; choose"
    ):
        check_same(tmp_path, {"num_processes": 1, "data_sha256": "b" * 64})
    with pytest.raises(ValueError, match=r"expected the data \(sha256\) that it was begun with, a{16}, found b{16}; "):
        check_same(tmp_path, {"num_processes": 2, "data_sha256": "b" * 64})


def test_a_checkpoint_of_before_such_values_were_kept_goes_on(tmp_path):
    save_state(tmp_path / "checkpoints", 3, {"w": torch.zeros(1)}, [], {"best": 1.0})
    check_same(tmp_path, {"num_processes": 2, "data_sha256": "a" * 64})
