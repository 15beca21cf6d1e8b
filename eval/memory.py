"""How much memory does training with the recipes for published models take, and does it fit the card?

    python eval/memory.py [recipes/qwen3.yaml ...]

Reads the launch commands at the top of these recipes, builds layers of each model in its published size without
weights, and recomputes the estimate that `train/train_adapter.py` prints before its first step: weights, what is
learned with its gradients and moments, and what tiny steps, run on shapes alone, leave alive. Estimated, not measured.
Prints a table and one JSON object as the last line. Exit code 1 if a recipe states another figure or one beyond its
card, 0 otherwise.
"""

import argparse
import json
import re
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from matrix.published_sizes import num_layers_of, published_model
from reporting.text_tables import TextTable, print_tables
from transformers import PreTrainedModel

from pardec.config.adapter_recipe import AdapterConfig, Recipe
from pardec.config.recipe_files import load_recipe
from pardec.run import exit_on_unusable_input
from pardec.training.memory import StepMemory, learned_bytes, measure_step
from pardec.training.module import MaskTokenTrainer
from pardec.training.peft_lora import inject_lora
from pardec.training.prefix_memory import line

ROOT = Path(__file__).parents[1]
RECIPES = tuple(
    ROOT / "recipes" / f"{name}.yaml"
    for name in ("qwen3", "llama3", "smollm3", "gemma3", "mistral_7b", "phi4_mini", "gpt_oss_20b")
)
# share of a card that an estimate may take: the rest is the device's own, fragments, and decoding of held-out prompts
ROOM = 0.85
# of the models that are built and whose steps are run on shapes: what further layers take is carried on
LAYERS = (1, 2)
_COMMAND = re.compile(r"^# (\d+) GB, ([\d.]+) GiB: accelerate launch train/train_adapter\.py (\S+)(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Launch:
    """A command at the top of a recipe.

    Attributes:
        recipe: its file's name.
        base: hub name of the model.
        card_gb: memory of the card that it is for.
        stated_gib: memory estimate that stands beside it.
        overrides: of the recipe.
    """

    recipe: str
    base: str
    card_gb: int
    stated_gib: float
    overrides: list[str]


@dataclass(frozen=True)
class Estimate:
    """What a training process holds, in GiB, and how much is learned."""

    weights_gib: float
    num_learned: int
    total_gib: float


def launches_of(path: Path) -> list[Launch]:
    """The commands of a recipe.

    Raises:
        ValueError: if there are none, or one is of another recipe.
    """
    found = []
    for card, stated, name, rest in _COMMAND.findall(path.read_text()):
        if name != f"recipes/{path.name}":
            raise ValueError(f"{path.name}: expected commands with recipes/{path.name}, found {name}")
        recipe = load_recipe(path, rest.split(), Recipe)
        found.append(Launch(path.name, recipe.base, int(card), float(stated), rest.split()))
    if not found:
        raise ValueError(f"{path.name}: expected commands that begin '# 24 GB, 1.0 GiB: accelerate launch', found none")
    return found


def estimate(recipe: Recipe) -> Estimate:
    """Of a training process with this recipe, whose base is a published one."""
    train, adapter = recipe.train, recipe.adapter.model_dump_json()
    sizes = train.batch_size, recipe.data.max_length, recipe.mask_rows(recipe.anchors_to_try()[0])
    weights, step, num_learned = _built(recipe.base, adapter, 0.0)
    of_step, share = step.bytes_for(*sizes), train.gradient_checkpointing
    if share:  # models of so few layers have no share of them but all: what lies between is a line
        of_step = round((1 - share) * of_step + share * _built(recipe.base, adapter, 1.0)[1].bytes_for(*sizes))
    total = weights + learned_bytes(num_learned) + of_step
    return Estimate(weights / 2**30, num_learned, total / 2**30)


@lru_cache
def _built(base_name: str, adapter: str, checkpointing: float) -> tuple[int, StepMemory, int]:
    """Bytes of a model in bfloat16, its steps, and how many numbers are learned for it.

    Args:
        base_name: of a published model.
        adapter: section of a recipe, as JSON.
        checkpointing: share of the layers, none or all.
    """
    what = AdapterConfig.model_validate_json(adapter)
    few, more = (_module(published_model(base_name, layers), what) for layers in LAYERS)
    for module in (few, more):
        module.run_layers_twice(checkpointing)
    share = (num_layers_of(base_name) - LAYERS[0]) / (LAYERS[1] - LAYERS[0])
    weights, learned = map(round, line(_sizes(few), _sizes(more), share))
    return weights, measure_step(few).carried_on(measure_step(more), share), learned


def _sizes(module: MaskTokenTrainer) -> tuple[int, int]:
    """Bytes of what is frozen, and how many numbers are learned."""
    frozen = sum(p.numel() * p.element_size() for p in module.parameters() if not p.requires_grad)
    return frozen, sum(p.numel() for p in module.parameters() if p.requires_grad)


def _module(base: PreTrainedModel, what: AdapterConfig) -> MaskTokenTrainer:
    if what.lora is not None:
        inject_lora(base, r=what.lora.r, alpha=what.lora.alpha, target_modules=what.lora.target_modules)
    module = MaskTokenTrainer(base, what.drafter())
    for parameter in module.parameters():
        if parameter.requires_grad:  # in float32, but rows meet them in bfloat16, by autocast, which is not on here
            parameter.data = parameter.data.to(base.dtype)
    return module


def report(paths: list[Path]) -> bool:
    """Prints the table and the line of JSON; whether every recipe states what is estimated, within its card."""
    lines, results = [], []
    for path in paths:
        for launch in launches_of(path):
            found = estimate(load_recipe(path, launch.overrides, Recipe))
            is_right = f"{found.total_gib:.1f}" == f"{launch.stated_gib:.1f}"
            verdict = "ok" if is_right else f"states {launch.stated_gib:.1f}"
            if found.total_gib > ROOM * launch.card_gb:
                verdict = f"more than {ROOM:.0%} of the card"
            figures = (f"{found.weights_gib:.1f}", f"{found.num_learned / 1e6:.1f}", f"{found.total_gib:.1f}")
            lines.append([launch.recipe, launch.base, f"{launch.card_gb}", *figures, verdict])
            results.append({**asdict(launch), **asdict(found), "verdict": verdict})
    header = ("recipe", "base", "card, GB", "weights, GiB", "learned, million numbers", "estimate, GiB", "verdict")
    print_tables([TextTable("Memory of training, estimated", header, lines)], [], ("recipe", "base", "verdict"))
    print(json.dumps({"rows": results}))
    return all(one["verdict"] == "ok" for one in results)


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path, help="default all recipes for published models")
    args = parser.parse_args()
    with exit_on_unusable_input():
        sys.exit(0 if report(args.recipes or list(RECIPES)) else 1)


if __name__ == "__main__":
    main()
