"""Would a sampler head that looks back over the text draft better, and what would verifying blocks as a whole add?

    python eval/look_back.py runs/ADAPTER RESPONSES.jsonl [--split validation] [--steps 2000] [--quick]
    python eval/look_back.py runs/ADAPTER --steps 0        # trains nothing: what the adapter itself drafts

Mask rows of a frozen adapter are recorded behind many places of texts that the model has sampled (the file is one of
train/generate_responses.py). On them are trained, for the same steps and the same loss: the sampler head that adapters
have, one that is as large as the last, and one that attends over the states of the text (arXiv:2608.27339). Texts
that the model samples behind held-out prompts judge them by exact sums, as drafts would be accepted one by one and as
blocks (arXiv:2403.10444), at the decoder's shortlist. Mask embeddings and LoRA are the adapter's; a head of its own has
a row too. Writes a table and JSON into eval/results; the last line printed is one JSON object. Exit code 0.
"""

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from reporting.result_files import output_stem, provenance, write_page
from reporting.text_tables import TextTable, markdown_page, print_tables
from studies.head_trials import Scorer, trained
from studies.look_back_head import LookBackHead
from studies.recorded_drafts import RecordedDrafts, record
from studies.response_texts import responses
from timing.options import full_or_quick
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.utils import logging

import pardec
from pardec.adapters.head import SamplerHead
from pardec.data.corpus import held_out_prompts
from pardec.data.python_sources import TEST, VALIDATION
from pardec.decoding.drafting import HeadDrafter
from pardec.decoding.sampling import TokenLaw, make_warpers
from pardec.measures.acceptance import BOOTSTRAP_SAMPLES
from pardec.model import SelfSpeculativeModel
from pardec.run import exit_on_unusable_input
from pardec.target.hidden import HiddenTap
from pardec.target.own_head import OwnHead

FULL = {"num_texts": 1536, "num_prompts": 96, "num_anchors": 32, "steps": 2000, "max_new_tokens": 160}
QUICK = {"num_texts": 6, "num_prompts": 3, "num_anchors": 4, "steps": 2, "max_new_tokens": 24}
OWN = "the adapter's own head"
NONE, SAMPLER, WIDER, LOOKS_BACK = "no head", "sampler head", "sampler head, wider", "head that looks back"
NOTES = (
    "mean acceptance length: tokens of all texts over the steps that they would take, where a text's steps emit 1 + "
    "the mean of the expected accepted drafts behind its places, by exact sums over the vocabulary; 95 % intervals "
    "over prompts; places are drawn evenly, and decoding stands more often at hard ones, so that it accepts less",
    "to the sampler head: ratio of mean acceptance lengths under the same verification, less 1; to token "
    "verification: the same with the same head; both paired by prompt, and bold where the interval leaves out 0",
    "the wider head has as many numbers as the one that looks back",
)


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("directory", help="adapter")
    add("responses", nargs="?", help="what its base has sampled, at temperature and top-k given here: JSON lines")
    add("--split", default=VALIDATION, choices=(VALIDATION, TEST), help="of python-stdlib, whose prompts judge")
    add("--num-prompts", type=int, help=f"default {FULL['num_prompts']}")
    add("--num-texts", type=int, help=f"of the responses, to train on; default {FULL['num_texts']}")
    add("--num-anchors", type=int, help=f"places of each text behind which is drafted; default {FULL['num_anchors']}")
    add("--max-new-tokens", type=int, help=f"behind each prompt; default {FULL['max_new_tokens']}")
    add("--steps", type=int, help=f"of 4 texts, with every anchor; 0: trains no head; default {FULL['steps']}")
    add("--width", type=int, default=256, help="of the sampler head")
    add("--shortlist", type=int, default=64, help="tokens that heads score when decoding")
    add("--learning-rate", type=float, default=3e-3)
    add("--temperature", type=float, default=0.8)
    add("--top-k", type=int, default=10, help="0 for the whole vocabulary")
    add("--seed", type=int, default=0)
    add("--output", help="path of the results without suffix; default eval/results/look_back_<device>")
    add("--quick", action="store_true", help="little of everything, for a first look: runs/look_back_quick")
    args = full_or_quick(parser, FULL, QUICK)
    with exit_on_unusable_input():
        logging.disable_progress_bar()
        report(args)


def report(args: argparse.Namespace) -> None:
    """Records, trains the heads, judges them and writes what was found."""
    model = pardec.load(args.directory, device="cpu")
    if model.adapter is None or model.tokenizer is None:
        raise ValueError(
            f"{args.directory}: expected an adapter and a tokenizer of its base, found one of them or none"
        )
    law = TokenLaw(False, tuple(make_warpers(args.temperature, args.top_k or None, None, None)))
    scorer = Scorer(OwnHead.of(model.target), HiddenTap(model.target.base), law, args.shortlist)
    heads: dict[str, nn.Module | None] = {NONE: None}
    own = HeadDrafter.of(model.adapter, model.target)
    if own is not None:
        heads[OWN] = own.head
    if args.steps:
        texts, first = responses(args.responses, args.num_texts)
        heads |= trained_heads(scorer, recorded(model, texts, first - 1, args), args)
    judging, first_judged = own_texts(model, args)
    judged_by = recorded(model, judging, first_judged - 1, args)
    K, rows = model.adapter.metadata.num_speculative_tokens, []
    for name, head in heads.items():
        parts = [judged_by.part(some) for some in torch.arange(len(judging)).split(4)]
        found = [scorer.lengths(head, part) for part in parts]
        lengths = {way: torch.cat([one[way] for one in found]).numpy() for way in found[0]}
        size = 0 if head is None else sum(one.numel() for one in head.parameters())
        rows += [{"head": name, "numbers": size, "verification": way, "lengths": one} for way, one in lengths.items()]
    shown = ("directory", "responses", "split", "num_anchors", "steps", "shortlist", "temperature", "top_k", "seed")
    settings = {key: vars(args)[key] for key in shown}
    facts = {**settings, "num_prompts": len(judging), "num_texts": args.num_texts, "num_speculative_tokens": K}
    result = {**facts, "rows": compared(rows), **provenance(model.target.device)}
    table = table_of(result, "**").markdown()
    heading = "Heads that look back" if args.steps else "What verifying blocks adds"
    notes = NOTES if args.steps else NOTES[:-1]  # of which the last is about a trained head
    page = markdown_page(result, heading, f"{title_of(result)}, {result['device']}", [table], notes)
    write_page(result, output_stem("look_back", args.output, args.quick, model.target.device), page)
    print_tables([table_of(result)], notes, {"head", "verification"})
    print(json.dumps(result))


# ---------------------------------------------------------------------- texts and what is seen of them


def own_texts(model: SelfSpeculativeModel, args: argparse.Namespace) -> tuple[Tensor, int]:
    """Held-out prompts and what the model samples behind them, those of full length; where the latter begins."""
    assert model.tokenizer is not None
    prompts = held_out_prompts(model.tokenizer, args.split, num_prompts=args.num_prompts)
    law = {"temperature": args.temperature, "top_k": args.top_k or None}
    out = model.generate(prompts, mode="plain", max_new_tokens=args.max_new_tokens, seed=args.seed + 1, **law)
    texts = [[*prompt, *new] for prompt, new in zip(prompts, out.token_ids, strict=True)]
    longest = max(map(len, texts))
    return torch.tensor([text for text in texts if len(text) == longest]), longest - args.max_new_tokens


def recorded(model: SelfSpeculativeModel, texts: Tensor, first: int, args: argparse.Namespace) -> RecordedDrafts:
    """With a progress bar."""
    with tqdm(total=len(texts), unit="text", desc="recording") as bar:
        return record(model, texts, first, args.num_anchors, seed=args.seed, on_batch=bar.update)


# ---------------------------------------------------------------------- heads


def trained_heads(scorer: Scorer, seen: RecordedDrafts, args: argparse.Namespace) -> dict[str, nn.Module]:
    """By name, all for the same steps on the same examples."""
    H, D = scorer.tap.output_embeddings.shape[1], scorer.own_head.target.embedding_dim
    size = sum(one.numel() for one in LookBackHead(H, D, args.width).parameters())
    wider = math.ceil(size / (2 * H + D + 1))
    makers: dict[str, Callable[[], nn.Module]] = {
        SAMPLER: lambda: SamplerHead(H, D, args.width),
        WIDER: lambda: SamplerHead(H, D, wider),
        LOOKS_BACK: lambda: LookBackHead(H, D, args.width),
    }
    budget = {key: vars(args)[key] for key in ("steps", "learning_rate", "seed")}
    return {name: trained(make, name, scorer, seen, **budget) for name, make in makers.items()}


# ---------------------------------------------------------------------- figures


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means with intervals, and ratios to the sampler head and to token verification, less 1."""
    lengths = {(row["head"], row["verification"]): row.pop("lengths") for row in rows}
    for row in rows:
        own, way = lengths[row["head"], row["verification"]], row["verification"]
        low, high = np.percentile(pooled(own[draws(len(own))]), [2.5, 97.5])
        row["mean_acceptance_length"] = round(float(pooled(own)), 4)
        row["interval"] = [round(float(low), 4), round(float(high), 4)]
        baseline = lengths.get((SAMPLER, way)) if row["head"] != SAMPLER else None
        row["to_sampler_head"] = None if baseline is None else ratio(own, baseline)
        row["to_token"] = ratio(own, lengths[row["head"], "token"]) if way != "token" else None
    return rows


def pooled(lengths: np.ndarray) -> np.ndarray:
    """Tokens per step of texts of equal length whose steps accept so many drafts each, shape [..., texts]: [...]."""
    return 1 / (1 / (1 + lengths)).mean(axis=-1)


def ratio(lengths: np.ndarray, baseline: np.ndarray) -> dict[str, Any]:
    """Of mean acceptance lengths, less 1, with its interval over prompts that are drawn anew for both together."""
    which = draws(len(lengths))
    low, high = np.percentile(pooled(lengths[which]) / pooled(baseline[which]) - 1, [2.5, 97.5])
    value = pooled(lengths) / pooled(baseline) - 1
    return {"value": round(float(value), 5), "interval": [round(float(low), 5), round(float(high), 5)]}


def draws(num_prompts: int) -> np.ndarray:
    """Prompts drawn anew, shape [samples, prompts]."""
    return np.random.default_rng(0).integers(num_prompts, size=(BOOTSTRAP_SAMPLES, num_prompts))


def title_of(result: dict[str, Any]) -> str:
    """What the rows have in common."""
    law = f"temperature {result['temperature']}" + (f", top-k {result['top_k']}" if result["top_k"] else "")
    where = f"{result['num_prompts']} prompts of python-stdlib ({result['split']}), {result['num_anchors']} places each"
    title = f"{result['directory']}, K = {result['num_speculative_tokens']}: {where}, {law}"
    if not result["steps"]:
        return title
    heads = f"heads trained for {result['steps']} steps on {result['num_texts']} responses"
    return f"{title}, shortlist {result['shortlist']}; {heads}"


def table_of(result: dict[str, Any], bold: str = "") -> TextTable:
    """All rows; `bold` stands around ratios whose interval leaves out 0."""
    header = (
        "head",
        "numbers",
        "verification",
        "mean acceptance length",
        "to the sampler head",
        "to token verification",
    )
    rows = []
    for row in result["rows"]:
        low, high = row["interval"]
        cells = [row["head"], f"{row['numbers']:,}", row["verification"]]
        cells += [f"{row['mean_acceptance_length']:.3f} [{low:.3f}, {high:.3f}]"]
        rows.append([*cells, *(_percent(row[name], bold) for name in ("to_sampler_head", "to_token"))])
    return TextTable(title_of(result), header, rows, has_sections=True)


def _percent(found: dict[str, Any] | None, bold: str) -> str:
    if found is None:
        return "-"
    low, high = found["interval"]
    text = f"{found['value']:+.1%} [{low:+.1%}, {high:+.1%}]"
    return f"{bold}{text}{bold}" if low > 0 or high < 0 else text


if __name__ == "__main__":
    main()
