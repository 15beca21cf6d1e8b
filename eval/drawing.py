"""How well do a few drawn anchors stand for all of them? Gradients of drawn anchors beside those of every one.

    python eval/drawing.py runs/ADAPTER MARKED.jsonl [--times 4] [--num-anchors 64] [--draws 4] [--quick]

For texts with marked anchors (the file is one of eval/marking.py) the gradient of all that an adapter learns is found
by the training module's own loss, once over every anchor of a text and many times over drawn ones: even draws, draws
in which marked anchors come more often, and these with losses that are corrected for it (`train.marked`). Draws are
worth it if their corrected gradients are nearer to that of every anchor than even draws are. Writes a table and JSON
into eval/results; the last line printed is one JSON object. Exit code 0.
"""

import argparse
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from reporting.intervals import ratio_interval
from reporting.result_files import output_stem, provenance, write_page
from reporting.text_tables import TextTable, markdown_page, print_tables
from timing.options import full_or_quick
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from pardec.adapters.adapter import Adapter
from pardec.adapters.files import load_adapter
from pardec.data.anchors import check_marks, draw_anchors, draw_marked_anchors
from pardec.data.fitting import useful_anchors
from pardec.data.reading import read_rows
from pardec.data.tokenising import Document, tokenise
from pardec.run import exit_on_unusable_input
from pardec.target.base import load_base, load_tokenizer
from pardec.target.fingerprint import fingerprint
from pardec.training.module import Drafter, MaskTokenTrainer
from pardec.training.objective import Objective
from pardec.training.peft_lora import ALL_LINEAR, inject_lora
from pardec.training.warm_start import warm_start

FULL = {"num_texts": 24, "draws": 4, "num_anchors": 64}
QUICK = {"num_texts": 2, "draws": 2, "num_anchors": 4}
EVEN, MARKED, CORRECTED = "even", "marked more often", "the same, corrected"
HEADER = ("draws", "squared error", "of even draws", "squared bias", "cosine of the sum")
NOTES = (
    "squared error: of the gradient of a text's drawn anchors beside that of all its anchors, mean over draws, sums "
    "over texts; squared bias: of the mean over draws, without what is left of their variance; both as shares of the "
    "squared norm of the gradient of all anchors; 95 % intervals over texts",
    "cosine of the sum: of the gradients of all draws of all texts, added up, with those of all anchors",
)


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("directory", help="adapter")
    add("marked", help="JSON lines with input_ids, loss_mask and marked")
    add("--num-texts", type=int, help=f"default {FULL['num_texts']}")
    add("--num-anchors", type=int, help=f"of a draw, default {FULL['num_anchors']}")
    add("--draws", type=int, help=f"of each way, of each text, default {FULL['draws']}")
    add("--times", type=float, default=4.0, help="so many times as likely are marked anchors drawn")
    add("--objective", default="kl")
    add("--position-weights", default="expected_length")
    add("--seed", type=int, default=0)
    add("--output", help="path of the results without suffix; default eval/results/drawing_<device>")
    add("--quick", action="store_true", help="little of everything, for a first look: runs/drawing_quick")
    args = full_or_quick(parser, FULL, QUICK)
    with exit_on_unusable_input():
        logging.disable_progress_bar()
        report(args)


def report(args: argparse.Namespace) -> None:
    """Measures and writes what was found."""
    if args.draws < 2:
        raise ValueError(f"--draws: expected at least 2, which tell bias from variance, found {args.draws}")
    adapter = load_adapter(args.directory)
    tokenizer = load_tokenizer(adapter.metadata.base.name)
    if tokenizer is None:
        raise ValueError(f"{args.directory}: expected a tokenizer of its base, found none")
    module, texts = trainer(args, adapter, tokenizer), documents(args, tokenizer)
    draw, sums, found = torch.Generator().manual_seed(args.seed), {}, []
    for text in tqdm(texts, unit="text"):
        of_text = errors_of(module, text, args, draw)
        found.append(of_text.figures)
        for name, gradient in of_text.sums.items():
            sums[name] = sums.get(name, 0.0) + gradient
    rows = [row_of(way, found, sums) for way in (EVEN, MARKED, CORRECTED)]
    shown = ("directory", "num_texts", "num_anchors", "draws", "times", "objective", "position_weights", "seed")
    result = {**{key: vars(args)[key] for key in shown}, "rows": rows, **provenance(module.target.device)}
    title = (
        f"{args.directory}: {args.num_texts} texts, {args.draws} draws each of {args.num_anchors} anchors, marked ones "
        f"{args.times:g} times as likely, {args.objective} with weights {args.position_weights}"
    )
    table = TextTable(title, HEADER, [cells_of(row) for row in rows])
    page = markdown_page(result, "Drawn anchors", f"{title}, {result['device']}", [table.markdown()], NOTES)
    write_page(result, output_stem("drawing", args.output, args.quick, module.target.device), page)
    print_tables([table], NOTES, {"draws"})
    print(json.dumps(result))


def trainer(args: argparse.Namespace, adapter: Adapter, tokenizer: PreTrainedTokenizerBase) -> MaskTokenTrainer:
    """The training module with the adapter's numbers."""
    described, peft_model = adapter.metadata, None
    base = load_base(described.base.name, device="cpu")
    if adapter.lora is not None:
        config = adapter.lora.config
        names = config.get("target_modules") or ALL_LINEAR
        peft_model = inject_lora(base, r=config["r"], alpha=config["lora_alpha"], target_modules=names)
    drafter = Drafter(
        described.num_speculative_tokens,
        mask_sharing=described.mask_sharing,
        draft_input=described.draft_input,
        has_lora=adapter.lora is not None,
        head_width=0 if described.head is None else described.head.width,
    )
    module = MaskTokenTrainer(base, drafter, Objective(args.objective, args.position_weights))
    warm_start(module, peft_model, adapter, fingerprint(base, tokenizer))
    return module


def documents(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """The first texts that have more useful anchors than are drawn, marked ones and others."""
    kept = []
    for row in read_rows(args.marked, "jsonl"):
        (one,) = tokenise(row, tokenizer)
        check_marks(one, args.marked)
        assert one.loss_mask is not None
        assert one.marked is not None
        useful = np.flatnonzero(useful_anchors(one.loss_mask))
        if len(useful) > args.num_anchors and 0 < one.marked[useful].sum() < len(useful):
            kept.append(one)
        if len(kept) == args.num_texts:
            return kept
    raise ValueError(f"{args.marked}: expected {args.num_texts} texts to draw from, found {len(kept)}")


# ---------------------------------------------------------------------- gradients


@dataclass(frozen=True)
class Errors:
    """Of one text.

    Attributes:
        figures: by way squared error and squared bias, and under "norm" the squared norm of the gradient of all.
        sums: by way the mean gradient over draws, and under "all" that of all anchors.
    """

    figures: dict[str, Any]
    sums: dict[str, Tensor]


def errors_of(module: MaskTokenTrainer, text: Document, args: argparse.Namespace, draw: torch.Generator) -> Errors:
    """What drawn anchors of a text give, beside all of them."""
    assert text.loss_mask is not None
    assert text.marked is not None
    mask, marked = torch.from_numpy(text.loss_mask), torch.from_numpy(text.marked)
    candidates = useful_anchors(mask).nonzero()[:, 0]
    full = gradient(module, text, candidates, None)
    errors: dict[str, list[Tensor]] = {EVEN: [], MARKED: [], CORRECTED: []}
    for _ in range(args.draws):
        even = draw_anchors(candidates, args.num_anchors, draw)
        drawn = draw_marked_anchors(candidates, marked[candidates], args.num_anchors, args.times, draw)
        for way, (anchors, weights) in {EVEN: (even, None), MARKED: (drawn[0], None), CORRECTED: drawn}.items():
            errors[way].append(gradient(module, text, anchors, weights) - full)
    figures: dict[str, Any] = {"norm": float(full.square().sum())}
    sums, D = {"all": full}, args.draws
    for way, some in errors.items():
        total = torch.stack(some).sum(dim=0)
        squares = sum(float(one.square().sum()) for one in some)
        # products of different draws: their expectation has no variance in it
        figures[way] = (squares / D, (float(total.square().sum()) - squares) / (D * (D - 1)))
        sums[way] = full + total / D
    return Errors(figures, sums)


def gradient(module: MaskTokenTrainer, text: Document, anchors: Tensor, weights: Tensor | None) -> Tensor:
    """Of everything that is learned, as one vector, per mask row that has a target."""
    learned = [p for p in module.parameters() if p.requires_grad]
    assert text.loss_mask is not None
    ids, mask = torch.from_numpy(text.input_ids.astype(np.int64)), torch.from_numpy(text.loss_mask)
    loss, count, _ = module(ids[None], mask[None], anchors[None], None if weights is None else weights[None])
    found = torch.autograd.grad(loss, learned, allow_unused=True, materialize_grads=True)
    return torch.cat([one.flatten() for one in found]) / count


# ---------------------------------------------------------------------- figures


def row_of(way: str, found: list[dict[str, Any]], sums: dict[str, Tensor]) -> dict[str, Any]:
    """Figures of a way to draw."""
    norm, even = np.array([one["norm"] for one in found]), np.array([one[EVEN][0] for one in found])
    error, bias = (np.array([one[way][i] for one in found]) for i in (0, 1))
    return {
        "draws": way,
        "squared_error": with_interval(error, norm),
        "of_even": with_interval(error, even),
        "squared_bias": with_interval(bias, norm),
        "cosine": round(float(torch.cosine_similarity(sums[way], sums["all"], dim=0)), 4),
    }


def with_interval(numerators: np.ndarray, denominators: np.ndarray) -> dict[str, Any]:
    """A ratio of sums over texts."""
    value = round(float(numerators.sum() / denominators.sum()), 4)
    return {"value": value, "interval": ratio_interval(numerators, denominators)}


def cells_of(row: dict[str, Any]) -> list[str]:
    """Of the table."""
    ratios = [row[name] for name in ("squared_error", "of_even", "squared_bias")]
    told = [f"{one['value']:.3f} [{one['interval'][0]:.3f}, {one['interval'][1]:.3f}]" for one in ratios]
    return [row["draws"], *told, f"{row['cosine']:.3f}"]


if __name__ == "__main__":
    main()
