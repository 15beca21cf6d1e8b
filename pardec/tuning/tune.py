"""Chooses the fastest way to decode for one model, adapter and device, and keeps the choice beside the adapter.

The work of `pardec tune`: `measuring` measures and predicts, `choice` chooses, `report` shows what it rests on.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from pardec.adapters.tuned import TunedChoice, check_writable, weights_of, write_tuned
from pardec.data.benchmarks import read_prompts
from pardec.data.corpus import held_out_prompts
from pardec.data.python_sources import VALIDATION
from pardec.decoding.asking.messages import message_ids
from pardec.decoding.asking.prompts import text_ids
from pardec.decoding.stats import share_with_copies
from pardec.measures.drawn_paths import drawn_rows_by_place
from pardec.measures.ranks import ranks_by_place
from pardec.model import SelfSpeculativeModel
from pardec.run import device_name, dtype_name, has_bfloat16, library_versions
from pardec.tuning.choice import Way
from pardec.tuning.measuring import Effort, Findings, Rank, max_calls, max_ways_in_turn, measure
from pardec.tuning.report import TuneReport
from pardec.tuning.timing import Call, Decode, in_turn, median_call, tokens_per_second
from pardec.tuning.tree_growth import NUM_NODES

MAX_TREE_ROWS_ON_CPU, MAX_TREE_ROWS = 32, 256
MAX_SPECULATIVE_TOKENS = 16  # the full chain of more has over 300 rows, which no device runs in the time of a few


def tune(
    model: SelfSpeculativeModel,
    directory: str | Path,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 1,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    effort: Effort | None = None,
) -> TuneReport:
    """Measures, chooses, and writes the choice beside the adapter; `pardec.load` then uses it.

    Args:
        model: loaded from `directory`, on the device and in the dtype to tune for.
        directory: of the adapter.
        prompts: token ids, such as the standard prompts of the validation split; what does not fill a batch is left.
        max_new_tokens: for each prompt, at least 2.
        batch_size: prompts decoded together.
        temperature: see `generate`.
        top_k: see `generate`.
        seed: of sampling; the same for every measurement.
        effort: how much is measured.

    Raises:
        ValueError: for input that cannot be tuned with.
        OSError: if the folder cannot be written to; known before anything is measured.
    """
    effort = effort or Effort()
    if model.adapter is None:
        raise ValueError("model: expected one with an adapter, found none")
    if max_new_tokens < 2:
        raise ValueError(f"max_new_tokens: expected at least 2, to time a step, found {max_new_tokens}")
    batches = _full_batches(prompts, batch_size)
    check_writable(directory)
    K = min(model.adapter.metadata.num_speculative_tokens, MAX_SPECULATIVE_TOKENS)
    # steps are captured or compiled for every length that they meet
    warm_up = len(batches) if model.capture or model.compile else 1
    has_head = model.engines.head is not None
    with tqdm(total=max_calls(effort, len(batches), warm_up, has_head), unit="call", desc="tuning") as bar:
        decode = _decoding(model, batches, bar, temperature, top_k, seed)
        rows = _max_tree_rows(model)
        num_nodes = max(K, min(rows - 1, NUM_NODES[-1])) if effort.num_dynamic_trees else 0
        rank = _ranking(model, batches, K, num_nodes)
        with model.engines.room_for(max_ways_in_turn(effort, has_head)):
            found = measure(decode, len(batches), K, max_new_tokens, effort, warm_up, has_head, rank, rows)
        bar.total = bar.n  # fewer ways than allowed for may have been worth measuring
    weights = weights_of(directory, model.adapter.metadata.files)
    choice = _choice(model, weights, found, batch_size, temperature, top_k)
    path = write_tuned(directory, choice)
    untried = "bfloat16" if choice.dtype == "float32" and has_bfloat16(model.target.device) else None
    return TuneReport(choice, found, str(path), len(batches) * batch_size, max_new_tokens, untried)


def _choice(
    model: SelfSpeculativeModel,
    weights: dict[str, str],
    found: Findings,
    batch_size: int,
    temperature: float,
    top_k: int | None,
) -> TunedChoice:
    best = found.chosen
    return TunedChoice(
        device=device_name(model.target.device),
        dtype=dtype_name(model.target.dtype),
        compile=model.compile,
        block_lengths=best.candidate.way.block_lengths,
        weights=weights,
        ms_per_step=best.ms_per_step,
        predicted_tokens_per_second=best.candidate.tokens_per_second,
        measured_tokens_per_second=best.tokens_per_second,
        plain_tokens_per_second=found.plain.tokens_per_second,
        conditional_acceptance=found.conditional_acceptance,
        temperature=temperature,
        top_k=top_k,
        batch_size=batch_size,
        versions=library_versions(),
        mode=best.candidate.way.mode,
        use_head=best.candidate.way.use_head,
        copy_tokens=best.candidate.way.copy_tokens,
        tree=best.candidate.way.tree,
    )


def _decoding(
    model: SelfSpeculativeModel,
    batches: Sequence[list[list[int]]],
    bar: tqdm,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> Decode:
    """Decodes one of the batches with the model."""

    def decode(way: Way, batch: int, max_new_tokens: int) -> Call:
        bar.set_postfix_str(_told(way))
        out = model.generate(
            batches[batch],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            mode=way.mode,
            num_speculative_tokens=way.num_speculative_tokens if way.mode == "two_pass" and way.tree is None else None,
            block_lengths=way.block_lengths if way.mode == "fused" else None,
            use_head=None if way.use_head else False,
            copy_tokens=way.copy_tokens,
            tree=way.tree,
        )
        bar.update()
        new_tokens, accepted = [len(ids) for ids in out.token_ids], [one.accepted for one in out.counts]
        copying = share_with_copies(out.counts) if model.target.device.type == "cpu" and way.copy_tokens else 1.0
        return Call(out.stats.seconds, new_tokens, accepted, out.token_ids, copying)

    return decode


def _ranking(
    model: SelfSpeculativeModel, batches: Sequence[list[list[int]]], num_speculative_tokens: int, num_nodes: int
) -> Rank:
    """Ranks what was emitted in the model's drafts of K tokens, and finds it in drawn trees of so many nodes, if any.

    Not in trees that mask rows alone draw: these accept hardly more than those of ranks, as `eval/trees.py` found.
    """
    prompts = [prompt for batch in batches for prompt in batch]

    def rank(use_head: bool, calls: Sequence[Call]) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
        emitted = [ids for call in calls for ids in call.token_ids]
        options = {"num_speculative_tokens": num_speculative_tokens, "use_head": None if use_head else False}
        ranks = [one.numpy() for one in ranks_by_place(model, prompts, emitted, **options)]
        if model.engines.head is None or not use_head or not num_nodes:
            return ranks, None
        rows = drawn_rows_by_place(model, prompts, emitted, num_nodes, **options)
        return ranks, [one.numpy() for one in rows]

    return rank


def _max_tree_rows(model: SelfSpeculativeModel) -> int:
    """Rows beyond which no tree can pay: on a CPU every row takes time, elsewhere a few hundred come for little."""
    return MAX_TREE_ROWS_ON_CPU if model.target.device.type == "cpu" else MAX_TREE_ROWS


def _told(way: Way) -> str:
    """What is being measured, for the progress bar."""
    parts = [way.mode, f"K = {way.num_speculative_tokens}" if way.num_speculative_tokens else ""]
    parts += [f"{way.copy_tokens} copied" if way.copy_tokens else "", way.kind if way.tree is not None else ""]
    return ", ".join(filter(None, parts))


def tune_each(
    models: Sequence[SelfSpeculativeModel],
    directory: str | Path,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 1,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    effort: Effort | None = None,
) -> tuple[list[TuneReport], dict[str, float]]:
    """Tunes models of several dtypes one after another, then measures what was chosen in each in turn.

    Arguments and errors are those of `tune`.

    Returns:
        A report for each, and tokens/s by dtype, which is also written with the choices; empty for one model.
    """
    reports = [
        tune(
            model,
            directory,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            effort=effort,
        )
        for model in models
    ]
    if len(models) == 1:
        return reports, {}
    repetitions = (effort or Effort()).repetitions
    speeds = _compared(models, [report.choice for report in reports], prompts, max_new_tokens, seed, repetitions)
    reports = [replace(report, choice=replace(report.choice, by_dtype=speeds)) for report in reports]
    for report in reports:
        write_tuned(directory, report.choice)
    return reports, speeds


def _compared(
    models: Sequence[SelfSpeculativeModel],
    chosen: Sequence[TunedChoice],
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    seed: int,
    repetitions: int,
) -> dict[str, float]:
    """Tokens/s of what was chosen for each model, all measured in turn."""
    choices, first = {one.dtype: one for one in chosen}, chosen[0]
    batches = _full_batches(prompts, first.batch_size)
    keys = [(dtype, batch) for batch in range(len(batches)) for dtype in choices]
    with tqdm(total=len(keys) * repetitions, unit="call", desc="comparing dtypes") as bar:
        decode = {
            dtype: _decoding(model, batches, bar, first.temperature, first.top_k, seed)
            for dtype, model in zip(choices, models, strict=True)
        }

        def run(key: tuple[str, int]) -> Call:
            dtype, batch = key
            one = choices[dtype]
            way = Way(one.mode, one.block_lengths, one.use_head, one.copy_tokens, one.tree)
            return decode[dtype](way, batch, max_new_tokens)

        calls = in_turn(run, keys, repetitions)
    return {
        dtype: tokens_per_second([median_call(calls[dtype, batch]) for batch in range(len(batches))])
        for dtype in choices
    }


def _full_batches(prompts: Sequence[list[int]], batch_size: int) -> list[list[list[int]]]:
    if not 1 <= batch_size <= len(prompts):
        raise ValueError(f"batch_size: expected 1 to {len(prompts)}, the number of prompts, found {batch_size}")
    starts = range(0, len(prompts) - batch_size + 1, batch_size)
    return [list(prompts[start : start + batch_size]) for start in starts]


def prompts_to_tune_on(
    model: SelfSpeculativeModel, source: str | Sequence[str] | None, num_prompts: int | None, *, as_chat: bool = False
) -> list[list[int]]:
    """Token ids of a benchmark's prompts, of texts, or else of standard prompts of the validation split.

    Args:
        model: whose tokenizer is used.
        source: path of the file, see `pardec.data.benchmarks.read_prompts`; texts; or None.
        num_prompts: of so many, taken evenly over a file; None for all, or all standard ones.
        as_chat: each prompt is one user message, rendered by the chat template.

    Raises:
        ValueError: without a tokenizer, for no prompts, or for a chat of standard prompts, which are code.
    """
    if model.tokenizer is None:
        raise ValueError("base: expected a tokenizer beside the model, found none")
    if num_prompts is not None and num_prompts < 1:
        raise ValueError(f"num_prompts: expected an integer >= 1, found {num_prompts}")
    if source is None:
        if as_chat:
            raise ValueError("chat: expected prompts to render by the chat template (--prompt-file), found none")
        return held_out_prompts(model.tokenizer, VALIDATION, num_prompts=num_prompts)
    if isinstance(source, str):
        options = {"split": VALIDATION, "num_prompts": num_prompts, "max_prompt_tokens": None}
        return [prompt.token_ids for prompt in read_prompts(source, model.tokenizer, as_chat=as_chat, **options)]
    if as_chat:
        return message_ids([[{"role": "user", "content": text}] for text in source[:num_prompts]], model.tokenizer)
    return [text_ids(text, model.tokenizer) for text in source[:num_prompts]]
