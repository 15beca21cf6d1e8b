"""Would steps whose shape follows the text beat the best shape for all of it? Texts decoded again on paper.

    python eval/following.py DIR [--prompts FILE.jsonl] [--head off] [--laws greedy,sampled]

The base decodes every prompt plainly; at every place of its texts it is found what drafts and copied tokens would have
brought there, greedily and sampled (drafts as the likeliest tokens), and steps are timed by their rows. From that come
the times of one shape throughout, of shapes that follow what steps have brought of late, and, in hindsight, of the best
shape for each text. Writes a table and JSON into eval/results; the last line printed is one JSON object. Exit code 0.
"""

import argparse
import json
from typing import Any

import numpy as np
import torch
from reporting.intervals import ratio_interval
from reporting.result_files import output_stem, provenance, write_page
from reporting.text_tables import TextTable, markdown_page, print_tables
from timing.options import add_prompt_options, full_or_quick
from timing.shape_replay import Cost, PlayedText, Shape, cost_of_rows, fixed, following
from tqdm.auto import tqdm
from transformers.utils import logging

import pardec
from pardec.data.benchmarks import Prompt, read_prompts
from pardec.decoding.copying import Copier, Texts, begin_context
from pardec.measures.ranks import ranks_by_place
from pardec.model import SelfSpeculativeModel
from pardec.run import exit_on_unusable_input
from pardec.tuning.choice import PLAIN_WAY, Way, full_chain, with_copies
from pardec.tuning.timing import Call, measure_costs

FULL = {"num_prompts": 24, "max_new_tokens": 128, "timed_prompts": 3}
QUICK = {"num_prompts": 2, "max_new_tokens": 12, "timed_prompts": 1}
COPY_TOKENS = (4, 8, 16)
# what shapes are chosen from while decoding; plain is one of them where it says so
SETS: dict[str, tuple[Shape, ...]] = {
    "plain, K = 1, 2": ((0, 0), (1, 0), (2, 0)),
    "plain, 8 copies, K = 1 and 8 copies": ((0, 0), (0, 8), (1, 8)),
    "4, 8, 16 copies": ((0, 4), (0, 8), (0, 16)),
}
DECAYS = (0.05, 0.1, 0.2, 0.4)
LAWS = ("greedy", "sampled")
HEAD = {"auto": None, "off": False}
NOTES = (
    "x plain: time of plain decoding over that of a way, prefill aside, sums over texts; on paper, but for what a step "
    "of so many rows takes here",
    "following: at each step the shape with the most tokens per millisecond of late, the host one step behind; the "
    "best of the decays "
    + ", ".join(map(str, DECAYS))
    + ", chosen on these same texts, and every shape judged at every "
    "place, which flatters it",
    "beside the best: time of the best shape for all texts over that of the way, with its 95 % interval over texts",
    "in hindsight: the best fixed shape of each text",
)


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("directory", help="of an adapter")
    add_prompt_options(parser)
    add("--num-prompts", type=int, help=f"default {FULL['num_prompts']}")
    add("--max-new-tokens", type=int, help=f"default {FULL['max_new_tokens']}")
    add("--timed-prompts", type=int, help=f"on which steps are timed, default {FULL['timed_prompts']}")
    add("--head", choices=HEAD, default="auto", help="whether the sampler head drafts, where there is one")
    add("--laws", default=",".join(LAWS), help="greedy, sampled or both")
    add("--temperature", type=float, default=0.8)
    add("--top-k", type=int, default=10)
    add("--output", help="path of the results without suffix; default eval/results/following_<device>")
    add("--quick", action="store_true", help="little of everything, for a first look: runs/following_quick")
    args = full_or_quick(parser, FULL, QUICK)
    with exit_on_unusable_input():
        logging.disable_progress_bar()
        report(args)


def report(args: argparse.Namespace) -> None:
    """Times steps, plays the texts of each law again, and writes what was found."""
    laws = args.laws.split(",")
    unknown = [name for name in laws if name not in LAWS]
    if unknown:
        raise ValueError(f"laws: expected some of {', '.join(LAWS)}, found {unknown[0]!r}")
    model = pardec.load(args.directory)
    options = {"split": args.split, "num_prompts": args.num_prompts, "max_prompt_tokens": None}
    prompts = read_prompts(args.prompts, model.tokenizer, **options)
    cost, timed = timed_costs(model, prompts[: args.timed_prompts], args)
    rows = []
    for law in laws:
        sampling = {"temperature": args.temperature, "top_k": args.top_k} if law == "sampled" else {}
        texts = played_texts(model, prompts, sampling, args)
        rows += [{"law": law, **row} for row in rows_of(texts, cost)]
    asked = ("prompts", "split", "max_new_tokens", "head", "temperature", "top_k")
    facts = {"adapter": args.directory, "num_prompts": len(prompts), **{name: vars(args)[name] for name in asked}}
    result = {**facts, "rows": rows, "ms_by_rows": timed, **provenance(model.target.device)}
    write_page(result, output_stem("following", args.output, args.quick, model.target.device), markdown_of(result))
    print_tables(tables_of(result), NOTES, {"way"})
    print(json.dumps(result))


def timed_costs(model: SelfSpeculativeModel, prompts: list[Prompt], args: argparse.Namespace) -> tuple[Cost, dict]:
    """What steps cost by their rows, and these figures: of drafting steps, and of copies alone."""
    assert model.adapter is not None
    use_head = args.head != "off"
    drafting = [full_chain(k, use_head) for k in range(1, min(model.adapter.metadata.num_speculative_tokens, 4) + 1)]
    copying = [with_copies(PLAIN_WAY, number) for number in COPY_TOKENS]
    with tqdm(unit="call", desc="timing steps") as bar:

        def decode(way: Way, batch: int, max_new_tokens: int) -> Call:
            out = model.generate(
                [looped(prompts[batch].token_ids) if way.copy_tokens else prompts[batch].token_ids],
                max_new_tokens=max_new_tokens,
                mode=way.mode,
                block_lengths=way.block_lengths if way.mode == "fused" else None,
                use_head=None if way.use_head else False,
                copy_tokens=way.copy_tokens,
            )
            bar.update()
            return Call(out.stats.seconds, list(map(len, out.token_ids)), [one.accepted for one in out.counts])

        batches, tokens = range(len(prompts)), min(args.max_new_tokens, 64)
        costs = [measure_costs(decode, ways, batches, tokens, 3, 1) for ways in (drafting, copying)]
    by_rows = costs[0].fused(use_head)
    # both are medians of ratios to plain steps beside them, here told at one speed of the machine
    real = {rows: ms * costs[0].plain / costs[1].plain for rows, ms in costs[1].by_rows.items()}
    timed = {"plain": costs[0].plain, "drafting": by_rows, "copies": real}
    return cost_of_rows(costs[0].plain, by_rows, real), timed


def looped(ids: list[int]) -> list[int]:
    """A prompt that repeats its end, so that steps behind it mostly have something to copy."""
    return ids[-16:] * 6


def played_texts(
    model: SelfSpeculativeModel, prompts: list[Prompt], sampling: dict[str, Any], args: argparse.Namespace
) -> list[PlayedText]:
    """What would have been accepted at every place of plainly decoded texts."""
    ids = [prompt.token_ids for prompt in prompts]
    emitted = []
    for seed, one in enumerate(tqdm(ids, unit="prompt", desc="decoding")):
        out = model.generate([one], max_new_tokens=args.max_new_tokens, mode="plain", seed=seed, **sampling)
        emitted += out.token_ids
    ranks = ranks_by_place(model, ids, emitted, use_head=HEAD[args.head])
    found = []
    for prompt, tokens, places in zip(prompts, emitted, ranks, strict=True):
        drafts = (places == 0).long().cumprod(dim=1).sum(dim=1).tolist()
        found.append(PlayedText(prompt.category, drafts[: len(tokens)], accepted_copies(prompt.token_ids, tokens)))
    return found


def accepted_copies(prompt: list[int], tokens: list[int]) -> list[int]:
    """Behind each token, how many copied ones would be accepted; -1 where nothing is copied."""
    text, most = [*prompt, *tokens], max(COPY_TOKENS)
    context = begin_context(torch.tensor([text]), len(text) + most)
    copier, found = Copier(most, context.device), []
    for s in range(1, len(tokens) + 1):
        place = torch.tensor([len(prompt) + s])
        copies = copier.candidates(Texts(context, place, torch.tensor([[0]])), place, torch.tensor([0]))
        pairs = zip(copies.ids[0, : int(copies.length)].tolist(), tokens[s:], strict=False)
        same = [mine == theirs for mine, theirs in [*pairs, (0, 1)]].index(False)
        found.append(same if int(copies.length) else -1)
    return found


def rows_of(texts: list[PlayedText], cost: Cost) -> list[dict[str, Any]]:
    """Ways to decode, fastest first, with how they fare on each category, and beside the best fixed shape."""
    most = max(max(text.drafts) for text in texts)
    shapes: list[Shape] = [(k, copies) for k in range(min(most, 4) + 1) for copies in (0, *COPY_TOKENS)]
    times = {label(shape): np.array([fixed(text, shape, cost) for text in texts]) for shape in shapes}
    best = min(times.values(), key=np.sum)
    plain, hindsight = times[label((0, 0))], np.min(list(times.values()), axis=0)
    for name, some in SETS.items():
        found = [np.array([following(text, some, cost, decay) for text in texts]) for decay in DECAYS]
        times[f"following: {name}"] = min(found, key=np.sum)
    times["in hindsight"] = hindsight
    categories = list(dict.fromkeys(text.category for text in texts))
    rows = []
    for name, ms in sorted(times.items(), key=lambda item: item[1].sum()):
        own = {one: [text.category == one for text in texts] for one in categories}
        by_category = {one: round(float(plain[mine].sum() / ms[mine].sum()), 4) for one, mine in own.items()}
        row = {"way": name, "ratio_to_plain": round(float(plain.sum() / ms.sum()), 4), "by_category": by_category}
        rows.append(row | {"beside_best": round(float(best.sum() / ms.sum()), 4), "interval": ratio_interval(best, ms)})
    return rows


def label(shape: Shape) -> str:
    """What tables call a shape."""
    parts = [f"K = {shape[0]}"] * (shape[0] > 0) + [f"{shape[1]} copies"] * (shape[1] > 0)
    return ", ".join(parts) or "plain"


def tables_of(result: dict[str, Any]) -> list[TextTable]:
    """One for each law."""
    tables = []
    for law in dict.fromkeys(row["law"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["law"] == law]
        categories = list(rows[0]["by_category"])
        categories = categories if len(categories) > 1 else []
        cells = []
        for row in rows:
            low, high = row["interval"]
            beside = f"{row['beside_best']:.3f} ({low:.3f}-{high:.3f})"
            each = [f"{row['by_category'][name]:.2f}" for name in categories]
            cells.append([row["way"], f"{row['ratio_to_plain']:.2f}", beside, *each])
        title = f"{law}: {result['num_prompts']} prompts of {result['prompts']}, {result['max_new_tokens']} new tokens"
        tables.append(TextTable(title, ("way", "x plain", "beside the best fixed shape", *categories), cells))
    return tables


def markdown_of(result: dict[str, Any]) -> str:
    """The page."""
    parts = [part for table in tables_of(result) for part in (f"## {table.title}\n", table.markdown())]
    facts = f"{result['adapter']}, on paper by the cost of rows on {result['device']}"
    return markdown_page(result, "Shapes that follow the text, beside one shape for all of it", facts, parts, NOTES)


if __name__ == "__main__":
    main()
