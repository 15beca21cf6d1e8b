"""Study files: which variants of a recipe are compared, and how each is evaluated. Read, checked, trains nothing.

    recipe: recipes/quickstart.yaml          # what variants start from; a variant may name its own
    overrides: [train.steps=400]             # of all variants
    evaluate: {split: validation, num_prompts: 48, max_new_tokens: 128}
    budget: {cpu_minutes: 10}                # of each variant's training; only compared with what it took
    variants:
      - {name: kl}                           # the first one is the baseline
      - {name: lk, overrides: [train.objective=lk], evaluate: [{}, {num_speculative_tokens: 2}]}
      - {name: before, adapter: runs/quickstart}   # trained already
    grid:                                    # one label of each axis makes a variant: kl+flat, kl+falling, ...
      objective: {kl: [], lk: [train.objective=lk]}
      weights: {flat: [], falling: [train.position_weights=0.8]}

The entries under a variant's `evaluate` are views: each decodes the same adapter in its own way.
"""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pardec.adapters.adapter import AdapterMetadata
from pardec.adapters.files import load_adapter
from pardec.config.adapter_recipe import AdapterConfig, Recipe
from pardec.config.recipe_files import RecipeError, Section, load_recipe, parse_recipe
from pardec.data.python_sources import STDLIB, VALIDATION

USABLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,79}")
# sizes that show nothing, for a first look
QUICK = (
    "train.steps=2", "train.batch_size=2", "train.gradient_accumulation_steps=1", "train.anchors_per_sequence=4",
    "eval.every=2", "eval.num_prompts=2", "eval.max_new_tokens=8", "data.max_length=64",
)  # fmt: skip
QUICK_EVALUATION = {"num_prompts": 2, "max_new_tokens": 8}


class Evaluation(Section):
    """How every variant is evaluated, greedily and sampled.

    Attributes:
        split: of `python-stdlib` and `python-packages`.
        data: these, or a file of held-out data.
        num_prompts: the same ones for all.
        max_new_tokens: per prompt.
        temperature: of the sampled measurement.
        top_k: likewise.
        seed: likewise.
    """

    split: Literal["validation", "test"] = VALIDATION
    data: str = STDLIB
    num_prompts: int = Field(default=48, ge=1)
    max_new_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=0.8, gt=0, allow_inf_nan=False)
    top_k: int | None = Field(default=10, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)


class Budget(Section):
    """What the training of a variant may take; steps are not fitted to it, the table says which variants exceed it.

    Attributes:
        cpu_minutes: of all its threads.
        minutes: wall clock.
    """

    cpu_minutes: float | None = Field(default=None, gt=0)
    minutes: float | None = Field(default=None, gt=0)


class View(Section):
    """One way to decode with an adapter.

    Attributes:
        num_speculative_tokens: K; default what was trained.
        use_head: whether the sampler head is used; default as `generate` does.
        shortlist: tokens of each mask row that the sampler head scores; default what the adapter says.
    """

    num_speculative_tokens: int | None = Field(default=None, ge=1)
    use_head: bool | None = None
    shortlist: int | None = Field(default=None, ge=1)

    def label(self) -> str:
        """What tables add to the variant's name."""
        words = [] if self.num_speculative_tokens is None else [f"K={self.num_speculative_tokens}"]
        if self.use_head is not None:
            words.append("head" if self.use_head else "no head")
        if self.shortlist is not None:
            words.append(f"shortlist {self.shortlist}")
        return ", ".join(words)


class VariantEntry(Section):
    """A variant as it stands in the file."""

    name: str
    recipe: str | None = None
    overrides: list[str] = Field(default=[])
    adapter: str | None = None
    evaluate: list[dict[str, Any]] = Field(default=[{}], min_length=1)


class StudyFile(Section):
    """A study as it stands in the file; see the top of the module."""

    recipe: str | None = None
    overrides: list[str] = Field(default=[])
    evaluate: Evaluation = Evaluation()
    budget: Budget = Budget()
    variants: list[dict[str, Any]] = Field(default=[])
    grid: dict[str, dict[str, list[str]]] = Field(default={})


@dataclass(frozen=True)
class Variant:
    """An adapter to be trained, or one that is there, and the ways to decode with it.

    Attributes:
        name: unique, usable as a file name.
        differs: what it does not share with the others, for people.
        views: ways to decode.
        recipe_path: what it is trained by; None where `adapter` is given.
        overrides: all that stand behind the recipe on the command line, without output_dir.
        recipe: what these two say.
        adapter: directory of one that is trained already.
    """

    name: str
    differs: str
    views: tuple[View, ...]
    recipe_path: str | None = None
    overrides: tuple[str, ...] = ()
    recipe: Recipe | None = None
    adapter: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What its training depends on."""
        return {"adapter": self.adapter} if self.recipe is None else settings_of(self.recipe.model_dump())

    @property
    def key(self) -> str:
        """Name of its files: changed settings get new files, so that nothing is mixed up or overwritten."""
        text = json.dumps(self.settings, sort_keys=True)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def directory(self, work: Path) -> Path:
        """Where its adapter is."""
        return work / self.key if self.adapter is None else Path(self.adapter)

    def command(self, work: Path) -> list[str]:
        """Arguments of Python that train it; the recipe and the folder are relative to the current one."""
        assert self.recipe_path is not None
        arguments = [self.recipe_path, *self.overrides, f"output_dir={self.directory(work)}"]
        return ["train/train_adapter.py", *arguments]


@dataclass(frozen=True)
class Study:
    """Variants and what they share.

    Attributes:
        name: of its files.
        variants: at least one; the first is the baseline.
        evaluation: the same for all.
        budget: likewise.
    """

    name: str
    variants: tuple[Variant, ...]
    evaluation: Evaluation
    budget: Budget


def settings_of(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values without the place of its output."""
    return {key: value for key, value in recipe.items() if key != "output_dir"}


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Reads a study and checks every variant of it.

    Args:
        path: YAML file; paths in it are relative to the current folder.
        overrides: of all trained variants, before their own, which still set them apart.

    Raises:
        ValueError: for anything that could not be trained and compared, naming the variant.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: expected a study file, found nothing")
    file = load_recipe(path, (), StudyFile)
    entries = [_entry(raw, number, str(path)) for number, raw in enumerate(file.variants, start=1)]
    entries += _grid_entries(file.grid)
    if not entries:
        raise ValueError(f"{path}: expected variants or grid, found neither")
    _check_names(entries, str(path))
    variants = tuple(_variant(entry, file, overrides, str(path)) for entry in entries)
    _check_different(variants, str(path))
    return Study(Path(path).stem, variants, file.evaluate, file.budget)


def shortened(study: Study) -> Study:
    """The same study with sizes that take moments; its results mean nothing."""

    def short(variant: Variant) -> Variant:
        if variant.recipe_path is None:
            return variant
        overrides = (*variant.overrides, *QUICK)
        return replace(variant, overrides=overrides, recipe=load_recipe(variant.recipe_path, overrides, Recipe))

    evaluation = study.evaluation.model_copy(update=QUICK_EVALUATION)
    return replace(study, variants=tuple(map(short, study.variants)), evaluation=evaluation)


def _entry(raw: dict[str, Any], number: int, source: str) -> VariantEntry:
    name = f" ({raw['name']})" if isinstance(raw.get("name"), str) else ""
    return parse_recipe(raw, f"{source}: variant {number}{name}", VariantEntry)


def _grid_entries(grid: dict[str, dict[str, list[str]]]) -> list[VariantEntry]:
    """The product of the axes, the last one changing fastest."""
    if not grid:
        return []
    points = itertools.product(*(axis.items() for axis in grid.values()))
    return [
        VariantEntry(name="+".join(label for label, _ in point), overrides=[one for _, some in point for one in some])
        for point in points
    ]


def _check_names(entries: Sequence[VariantEntry], source: str) -> None:
    for entry in entries:
        if not USABLE_NAME.fullmatch(entry.name):
            raise ValueError(
                f"{source}: variant name: expected letters, digits and . _ + = - with a letter or digit first, at "
                f"most 80, found {entry.name!r}"
            )
    # files of both would be one where file names do not tell case
    folded = Counter(entry.name.lower() for entry in entries)
    alike = [entry.name for entry in entries if entry.name.lower() == folded.most_common(1)[0][0]]
    if len(alike) > 1:
        raise ValueError(f"{source}: expected variants of different names, found {alike[0]!r} and {alike[1]!r}")


def _check_different(variants: Sequence[Variant], source: str) -> None:
    for first, second in itertools.combinations(variants, 2):
        if first.settings == second.settings:
            raise ValueError(
                f"{source}: expected variants of different settings, found {first.name!r} and {second.name!r} with the "
                "same; several ways to decode with one adapter are entries of `evaluate`"
            )


def _variant(entry: VariantEntry, file: StudyFile, overrides: Sequence[str], source: str) -> Variant:
    where = f"{source}: variant {entry.name!r}"
    views = tuple(parse_recipe(raw, f"{where}: evaluate", View) for raw in entry.evaluate)
    if len({view.label() for view in views}) < len(views):
        raise ValueError(f"{where}: evaluate: expected different entries, found one twice")
    if entry.adapter is not None:
        if entry.recipe is not None or entry.overrides:
            raise ValueError(f"{where}: expected an adapter or what to train, found both")
        _check_views(views, load_adapter(entry.adapter).metadata, where)
        return Variant(entry.name, entry.adapter, views, adapter=entry.adapter)
    recipe_path = entry.recipe or file.recipe
    if recipe_path is None:
        raise ValueError(f"{where}: expected key 'recipe', here or for all, found neither")
    every = (*file.overrides, *overrides, *entry.overrides)
    try:
        recipe = load_recipe(recipe_path, every, Recipe)
    except RecipeError as error:
        raise ValueError(f"{where}: {error}") from None
    _check_views(views, recipe.adapter, where)
    differs = ([entry.recipe] if entry.recipe else []) + entry.overrides
    return Variant(entry.name, " ".join(differs), views, recipe_path, every, recipe)


def _check_views(views: Sequence[View], drafter: AdapterConfig | AdapterMetadata, where: str) -> None:
    trained = drafter.num_speculative_tokens
    is_limited = drafter.mask_sharing == "distinct" and drafter.draft_input == "mask_embeddings"
    for view in views:
        asked = view.num_speculative_tokens
        if asked is not None and asked > trained and is_limited:
            raise ValueError(
                f"{where}: evaluate: expected num_speculative_tokens of at most {trained}, the trained mask "
                f"embeddings, found {asked}"
            )
        for key in ("use_head", "shortlist"):
            if getattr(view, key) is not None and drafter.head is None:
                raise ValueError(f"{where}: evaluate: expected {key} only where there is a head, found none")
