"""Short runs of train/train_adapter.py on a small text."""

from pathlib import Path

import before_first_step
import pytest
import train_adapter
from programs import ROOT, Ended, run, run_in_own_process
from safetensors.torch import load_file
from torch import Tensor

from pardec.measures import examiner

SMALL = [
    "data.max_length=64", "train.batch_size=2", "train.anchors_per_sequence=8", "train.log_every=1",
    "train.warmup_steps=0", "eval.num_prompts=2", "eval.max_new_tokens=8", "adapter.num_speculative_tokens=2",
    "train.mixed_precision=no",
]  # fmt: skip


def command_line(output: Path, text: Path, *overrides: str) -> list[str]:
    paths = [f"output_dir={output}", f"data.path={text}", f"data.cache={text.parent / 'tokenised'}"]
    return [str(ROOT / "recipes/quickstart.yaml"), *paths, *SMALL, *overrides]


def train(output: Path, text: Path, *overrides: str) -> Ended:
    return run(train_adapter.main, *command_line(output, text, *overrides))


def train_in_own_process(output: Path, text: Path, *overrides: str, launcher: tuple[str, ...]) -> Ended:
    return run_in_own_process("train/train_adapter.py", *command_line(output, text, *overrides), launcher=launcher)


WHOLE = ("train.steps=4", "train.checkpoint_every=2", "eval.every=4", "eval.max_new_tokens=24")


def checkpoint(output: Path, file: str) -> dict[str, Tensor]:
    """Tensors of the only state of a run."""
    (newest,) = (output / "checkpoints").glob("step-*")
    return load_file(newest / file)


def brief(patch: pytest.MonkeyPatch) -> None:
    """Leaves out of runs in this process what takes longer than so short ones: curves, and tiny steps for memory."""
    patch.setattr(examiner, "redraw_curve", lambda metrics, picture: False)
    patch.setattr(before_first_step, "fit_step", lambda *arguments, **options: (1, 2**20))
