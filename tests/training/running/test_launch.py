"""What a launcher may have started: refused where gradients would be lost, or work be done again, in silence."""

import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from pardec.training.running.launch import (
    idle_processors,
    launch_told,
    refuse_other_number,
    refuse_other_type,
    refuse_other_ways,
    right_command,
)


@pytest.fixture(autouse=True)
def typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train/train_adapter.py", "my recipe.yaml"])


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "Mega"),
    ],
)
def test_what_wraps_the_module_in_another_way_is_refused_with_the_command_that_is_right(name, what):
    refuse_other_ways({name: "false"})
    with pytest.raises(ValueError, match=rf"^launcher: expected copies .*, found {what}") as refused:
        refuse_other_ways({name: "true"})
    assert "start it with `torchrun --nproc-per-node N train/train_adapter.py 'my recipe.yaml'`" in str(refused.value)
    assert "shards a base that is too large for one device by train.shard_base=true" in str(refused.value)


def test_only_copies_of_the_module_are_taken_from_accelerate():
    for one in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        refuse_other_type(one)
    for one in set(DistributedType) - {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}:
        with pytest.raises(ValueError, match=rf"^launcher: expected copies .*, found {one.value}; start it with"):
            refuse_other_type(one)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_processes_that_do_not_know_of_each_other_are_refused(name):
    refuse_other_number(4, {name: "4"})
    with pytest.raises(
        ValueError, match=rf"^processes: expected 4 .*, as {name} says, found 1; .*--nproc-per-node 4 tr"
    ):
        refuse_other_number(1, {name: "4"})


def test_the_innermost_launcher_counts():
    """As where a scheduler starts torchrun once on each of two machines."""
    refuse_other_number(16, {"WORLD_SIZE": "16", "SLURM_STEP_NUM_TASKS": "2"})


def test_one_process_where_accelerate_was_asked_for_several_is_refused():
    asked_for_one = {"ACCELERATE_USE_CPU": "False", "ACCELERATE_MIXED_PRECISION": "no"}
    refuse_other_number(1, asked_for_one)
    refuse_other_number(1, {"MASTER_ADDR": "127.0.0.1"})  # of a cluster, which need not mean this process
    with pytest.raises(ValueError, match=r"^processes: expected several, .* found one, .*`torchrun --nproc-per-node N"):
        refuse_other_number(1, asked_for_one | {"MASTER_ADDR": "127.0.0.1"})


def test_the_command_can_be_pasted():
    assert right_command("8") == "`torchrun --nproc-per-node 8 train/train_adapter.py 'my recipe.yaml'`"


def test_the_first_lines_of_a_single_process(monkeypatch):
    accelerator = Accelerator(cpu=True)
    lines = launch_told(accelerator, batch_size=3, accumulation=2, max_length=500).splitlines()
    assert lines[0].startswith("1 process on ")
    assert lines[0].endswith("; the base whole")
    assert lines[1] == (
        "a step: 6 sequences (1 x train.batch_size 3 x train.gradient_accumulation_steps 2), at most 3,000 tokens"
    )
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    used = torch.get_num_threads()
    assert idle_processors(accelerator) == (
        f"\n{used} of 64 processors in use; accelerate launch --num_cpu_threads_per_process 64 uses all"
    )
