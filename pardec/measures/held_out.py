"""Measures an adapter on held-out prompts with the real decoder, and measures again what was stored.

What training logs and keeps the best adapter by comes from here, and so does the proof that the saved adapter gives
the same. Knows a model, prompts and the records in `pardec.json`; no optimiser.
Legend: K num_speculative_tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pardec.config.adapter_recipe import DataConfig
from pardec.data.corpus import held_out_documents, open_held_out, prompts_with_room
from pardec.data.python_sources import VALIDATION, source_folder
from pardec.data.rows import hold_out_rows, open_rows
from pardec.data.shards import shards_folder
from pardec.decoding.verify import Verification
from pardec.measures.acceptance import BATCH_SIZE, Acceptance, digest, measure_acceptance
from pardec.measures.ranks import RankAccuracy, measure_ranks
from pardec.measures.share import ALL_OF_IT, Share
from pardec.model import SelfSpeculativeModel

TOLERANCE = 0.02  # relative
# tokens from one place to the next: half the time, and neighbouring places tell nearly the same
_RANK_STRIDE = 2


@dataclass(frozen=True)
class HeldOut:
    """Acceptance and ranks of one adapter over the same prompts, sampled and greedy.

    Attributes:
        settings: everything to measure the same again with, beside the prompts.
        num_prompts: how many.
        prompts_sha256: see `digest`.
        sampled: as drafts are made by default, with the sampler head where there is one.
        greedy: likewise.
        sampled_ranks: of the tokens that were drawn.
        greedy_ranks: of the target's argmaxes.
        sampled_without_head: None for an adapter without one.
    """

    settings: dict[str, Any]
    num_prompts: int
    prompts_sha256: str
    sampled: Acceptance
    greedy: Acceptance
    sampled_ranks: RankAccuracy
    greedy_ranks: RankAccuracy
    sampled_without_head: Acceptance | None = None

    def to_log(self) -> dict[str, Any]:
        """What trackers get: numbers by name, one for each position, and for the JSONL file one list."""
        values: dict[str, Any] = {
            "acceptance/sampled": self.sampled.mean_acceptance_length,
            "acceptance/greedy": self.greedy.mean_acceptance_length,
            "acceptance/greedy_outside_repetition": self.greedy.outside_repetition,
            "acceptance/sampled_per_position": self.sampled.stats.acceptance_rate_per_position["unconditional"],
        }
        if self.sampled_without_head is not None:
            values["acceptance/sampled_without_head"] = self.sampled_without_head.mean_acceptance_length
        for name, one in (("sampled", self.sampled), ("greedy", self.greedy)):
            rates = one.stats.acceptance_rate_per_position
            values |= _by_position(f"acceptance/{name}_position", rates["unconditional"])
            values |= _by_position(f"acceptance/{name}_conditional", rates["conditional"])
        for name, ranks in (("sampled", self.sampled_ranks), ("greedy", self.greedy_ranks)):
            for n, rates in ranks.unconditional.items():
                values |= _by_position(f"rank/{name}_top{n}_position", rates)
        return values

    def to_dict(self) -> dict[str, Any]:
        """The record for `pardec.json`; with the recipe's data all that is needed to measure again."""
        sampling = {key: self.settings[key] for key in ("temperature", "top_k")}
        shared = {key: value for key, value in self.settings.items() if key not in sampling}
        record = {
            "num_prompts": self.num_prompts,
            "prompts_sha256": self.prompts_sha256,
            **shared,
            "sampled": {**sampling, **self.sampled.to_dict(), "ranks": self.sampled_ranks.to_dict()},
            "greedy": {**self.greedy.to_dict(), "ranks": self.greedy_ranks.to_dict()},
        }
        if self.sampled_without_head is not None:
            record["sampled_without_head"] = {**sampling, **self.sampled_without_head.to_dict()}
        return record


def _by_position(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}_{position}": value for position, value in enumerate(values, start=1)}


def measure_held_out(
    model: SelfSpeculativeModel,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    batch_size: int = BATCH_SIZE,
    num_speculative_tokens: int | None = None,
    use_head: bool | None = None,
    verification: Verification = "token",
    categories: Sequence[str] | None = None,
    on_batch: Callable[[int], object] = lambda num_prompts: None,
    share: Share = ALL_OF_IT,
) -> HeldOut:
    """Decodes every prompt sampled and greedy, and ranks what was emitted.

    Args:
        model: with an adapter.
        prompts: token ids.
        max_new_tokens: see `generate`.
        temperature: of the sampled figures, above 0.
        top_k: likewise.
        seed: likewise; see `measure_acceptance`.
        batch_size: prompts decoded together.
        num_speculative_tokens: K; default what the adapter was trained with, never a tuned choice.
        use_head: see `generate`; where a head is used, sampled figures without it are measured too.
        verification: of the sampled figures.
        categories: of each prompt; default none.
        on_batch: told the number of prompts of each batch when it is decoded one way.
        share: the batches that this process decodes; figures are of all.

    Raises:
        ValueError: for input that `generate` refuses.
    """
    if model.adapter is None:
        raise ValueError("model: expected one with an adapter, found none")
    K = num_speculative_tokens or model.adapter.metadata.num_speculative_tokens
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed, "batch_size": batch_size}
    settings |= {"num_speculative_tokens": K, "use_head": use_head, "verification": verification}
    sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k}
    told: dict[str, Any] = {"categories": categories, "on_batch": on_batch, "share": share}
    sampled = measure_acceptance(model, prompts, **settings, **sampling, **told)
    greedy = measure_acceptance(model, prompts, **settings, **told)
    without_head = None
    if model.adapter.metadata.head is not None and use_head is not False:
        without_head = measure_acceptance(model, prompts, **{**settings, "use_head": False}, **sampling, **told)
    ranked: dict[str, Any] = {key: settings[key] for key in ("num_speculative_tokens", "use_head", "batch_size")}
    ranked |= {"stride": _RANK_STRIDE, "share": share}
    return HeldOut(
        settings=settings | sampling,
        num_prompts=len(prompts),
        prompts_sha256=digest(prompts),
        sampled=sampled,
        greedy=greedy,
        sampled_ranks=measure_ranks(model, prompts, sampled.token_ids, **ranked),
        greedy_ranks=measure_ranks(model, prompts, greedy.token_ids, **ranked),
        sampled_without_head=without_head,
    )


# ---------------------------------------------------------------------- the same again


@dataclass(frozen=True)
class Comparison:
    """A stored figure and the one found now.

    Attributes:
        figure: which, a key of the record.
        stored: mean acceptance length.
        found: likewise.
        same_tokens: whether it was counted on the same continuations; None if that was not stored. Others, from
            another device or version, are another sample, whose figures differ by chance.
        interval: 95 % interval of the stored figure.
    """

    figure: str
    stored: float
    found: float
    same_tokens: bool | None
    interval: tuple[float, float]

    @property
    def relative_difference(self) -> float:
        """Of the found figure from the stored one."""
        return self.found / self.stored - 1

    @property
    def agrees(self) -> bool:
        """Within `TOLERANCE`; of another sample, within what chance explains."""
        low, high = self.interval
        near = abs(self.relative_difference) <= TOLERANCE
        return near or (not self.same_tokens and low <= self.found <= high)


def measure_again(model: SelfSpeculativeModel) -> tuple[HeldOut, list[Comparison]]:
    """Repeats the measurement that was stored with the model's adapter, with all of its settings.

    Args:
        model: with a tokenizer and an adapter that training has left.

    Returns:
        what is found now, and for each stored figure how it compares.

    Raises:
        ValueError: if nothing is stored, or the prompts can no longer be had.
    """
    if model.adapter is None or model.tokenizer is None:
        raise ValueError("model: expected an adapter and a tokenizer, found only one of them or none")
    stored, training = model.adapter.metadata.measured, model.adapter.metadata.training
    needed = ("num_prompts", "max_new_tokens", "seed", "sampled", "greedy")
    missing = [key for key in needed if key not in stored]
    if missing or "recipe" not in training:
        raise ValueError(
            f"pardec.json: expected a measurement and the recipe that it belongs to, found no "
            f"{', '.join(missing) or 'recipe'}"
        )
    recipe = training["recipe"]
    prompts = validation_prompts(
        recipe["data"],
        model.tokenizer,
        recipe["eval"]["num_prompts"],
        max_new_tokens=stored["max_new_tokens"],
        max_positions=model.target.max_positions,
    )
    expected = (stored["num_prompts"], stored.get("prompts_sha256", digest(prompts)))
    if (len(prompts), digest(prompts)) != expected:
        raise ValueError(
            f"{recipe['data']['path']}: expected the {expected[0]} validation prompts that the adapter was measured "
            f"on (sha256 {expected[1][:12]}), found {len(prompts)} ({digest(prompts)[:12]}): the data have changed, or "
            "this is another Python's library"
        )
    found = measure_held_out(
        model,
        prompts,
        max_new_tokens=stored["max_new_tokens"],
        temperature=stored["sampled"]["temperature"],
        top_k=stored["sampled"]["top_k"],
        seed=stored["seed"],
        batch_size=stored.get("batch_size", BATCH_SIZE),
        num_speculative_tokens=stored.get("num_speculative_tokens"),
        use_head=stored.get("use_head"),
        verification=stored.get("verification", "token"),
    )
    return found, compare(stored, found)


def compare(stored: Mapping[str, Any], found: HeldOut) -> list[Comparison]:
    """Each mean acceptance length of a record beside that of `found`."""
    now = {"sampled": found.sampled, "greedy": found.greedy, "sampled_without_head": found.sampled_without_head}
    return [
        Comparison(
            figure,
            stored=stored[figure]["mean_acceptance_length"],
            found=round(one.mean_acceptance_length, 4),
            same_tokens=_same(stored[figure].get("tokens_sha256"), digest(one.token_ids)),
            interval=tuple(stored[figure]["interval"]),
        )
        for figure, one in now.items()
        if one is not None and figure in stored
    ]


def _same(stored: str | None, found: str) -> bool | None:
    return None if stored is None else stored == found


def validation_prompts(
    data: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    num_prompts: int,
    *,
    max_new_tokens: int,
    max_positions: int | None,
) -> list[list[int]]:
    """The prompts that a training run measures on, without tokenising what it trains on.

    Args:
        data: the section of the recipe.
        tokenizer: of the base.
        num_prompts: as asked for in the recipe.
        max_new_tokens: likewise.
        max_positions: of the base.

    Raises:
        ValueError: for data that cannot be used.
    """
    section = DataConfig.model_validate(data)
    checked = shards_folder() if section.cache is None else Path(section.cache)
    if section.validation_path is not None:
        rows = open_held_out(section.validation_path, VALIDATION, section.format, checked)
    elif source_folder(section.path) is not None:
        rows = open_held_out(section.path, VALIDATION, "auto", checked)
    else:
        rows = hold_out_rows(open_rows(section.path, section.format, section.split, section.subset, checked))[1]
    where = section.validation_path or section.path
    documents = held_out_documents(rows, tokenizer, num_prompts, where)
    return prompts_with_room(
        documents, num_prompts, max_new_tokens=max_new_tokens, max_positions=max_positions, where=where
    )[0]
