"""Where do an adapter's drafts fail? Marks these places of responses, and leaves prompts that end there.

    python eval/marking.py runs/ADAPTER RESPONSES.jsonl --output MARKED.jsonl [--mark failed] [--again PROMPTS.jsonl]

A draft is drawn behind every token of what the base has sampled (the file is one of train/generate_responses.py) and
verified against the text's own tokens: behind that text decoding would accept as many drafts with the same
probabilities. Marked are tokens behind which none was accepted (failed), or those behind which decoding would draft
(visited). Training draws marked anchors more often with train.marked.times. Prompts are the last tokens of the text up
to one place a text where a draft failed, as many as the text's own prompt has: for the base to respond again from
there. Prints one JSON object as the last line. Exit code 0.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from reporting.result_files import provenance
from studies.head_trials import Scorer
from studies.recorded_drafts import record
from studies.response_texts import responses
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

import pardec
from pardec.decoding.drafting import HeadDrafter
from pardec.decoding.sampling import TokenLaw, make_warpers
from pardec.model import SelfSpeculativeModel
from pardec.run import exit_on_unusable_input, written_aside
from pardec.target.hidden import HiddenTap
from pardec.target.own_head import OwnHead

FAILED, VISITED = "failed", "visited"
_TEXTS_AT_ONCE = 32
_TEXTS_OF_A_LAW = 4


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("directory", help="adapter")
    add("responses", help="what its base has sampled, at temperature and top-k given here: JSON lines")
    add("--output", required=True, help="JSON lines: the rows that were looked at, with `marked`")
    add("--mark", default=FAILED, choices=(FAILED, VISITED))
    add("--again", help="JSON lines: prompts that end where a draft failed")
    add("--num-texts", type=int, default=1024, help="of the responses")
    add("--temperature", type=float, default=0.8)
    add("--top-k", type=int, default=10, help="0 for the whole vocabulary")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    with exit_on_unusable_input():
        logging.disable_progress_bar()
        print(json.dumps(mark(args)))


def mark(args: argparse.Namespace) -> dict[str, Any]:
    """Looks at the texts and writes what was found; returns figures of it."""
    model = pardec.load(args.directory, device="cpu")
    if model.adapter is None:
        raise ValueError(f"{args.directory}: expected an adapter, found a base")
    texts, first = responses(args.responses, args.num_texts)
    accepted = drawn_lengths(model, texts, first - 1, args)
    places = {FAILED: accepted == 0, VISITED: visited(accepted)}
    marks, failed = places[args.mark], places[FAILED]
    write_rows(args.output, [marked_row(ids, first, of_text) for ids, of_text in zip(texts, marks, strict=True)])
    if args.again:
        draw = random.Random(args.seed)
        write_rows(
            args.again, [row for ids, one in zip(texts, failed, strict=True) for row in again(ids, first, one, draw)]
        )
    return {
        **vars(args),
        "places": accepted.shape[1],
        "mean_accepted_drafts": round(float(accepted.double().mean()), 4),
        "share_failed": round(float(failed.double().mean()), 4),
        "share_visited": round(float(places[VISITED].double().mean()), 4),
        **provenance(model.target.device),
    }


def drawn_lengths(model: SelfSpeculativeModel, texts: Tensor, first_anchor: int, args: argparse.Namespace) -> Tensor:
    """Accepted drafts behind every place of each text from `first_anchor` on, shape [S, N], drawn given the text."""
    assert model.adapter is not None
    K, draw = model.adapter.metadata.num_speculative_tokens, torch.Generator().manual_seed(args.seed)
    law = TokenLaw(False, tuple(make_warpers(args.temperature, args.top_k or None, None, None)))
    own, described = HeadDrafter.of(model.adapter, model.target), model.adapter.metadata.head
    shortlist = 1 if described is None else described.shortlist
    scorer = Scorer(OwnHead.of(model.target), HiddenTap(model.target.base), law, shortlist)
    num_places, found = texts.shape[1] - K - 1 - first_anchor, []
    with tqdm(total=len(texts), unit="text", desc="drafting") as bar:
        for some in texts.split(_TEXTS_AT_ONCE):
            seen = record(model, some, first_anchor, num_places, on_batch=bar.update)
            for few in torch.arange(len(some)).split(_TEXTS_OF_A_LAW):
                p, q, tokens = scorer.laws(None if own is None else own.head, seen.part(few))
                found.append(accepted_prefix(p, q, tokens, draw))
    return torch.cat(found)


def accepted_prefix(p: Tensor, q: Tensor, tokens: Tensor, draw: torch.Generator) -> Tensor:
    """How many drafts were accepted where the text went on with `tokens`, drawn, shape [...].

    A token x is emitted because a draft of it was accepted with min(p, q) of the p that it is emitted with at all.

    Args:
        p: the target's law at each depth, given the text before, shape [..., K, V].
        q: the draft's.
        tokens: shape [..., K].
        draw: source of randomness.
    """
    of_p, of_q = (law.gather(-1, tokens[..., None]).squeeze(-1) for law in (p, q))
    # a token that rounding has put behind top-k continues none of the target's texts
    is_accepted = torch.rand(of_p.shape, generator=draw) < torch.where(of_p > 0, of_q / of_p, 0.0)
    return is_accepted.long().cumprod(dim=-1).sum(dim=-1)


def visited(accepted: Tensor) -> Tensor:
    """Places behind which decoding drafts, where so many drafts are accepted behind each, shape [S, N], bool."""
    found = torch.zeros_like(accepted, dtype=torch.bool)
    for marks, lengths in zip(found, accepted.tolist(), strict=True):
        place = 0
        while place < len(lengths):
            marks[place] = True
            place += lengths[place] + 1
    return found


# ---------------------------------------------------------------------- rows


def marked_row(ids: Tensor, first: int, marks: Tensor) -> dict[str, Any]:
    """A row as training reads it, with marks of its places from the prompt's last token on."""
    T, marked = len(ids), [0] * (first - 1) + marks.int().tolist()
    mask = [0] * first + [1] * (T - first)
    return {"input_ids": ids.tolist(), "loss_mask": mask, "marked": marked + [0] * (T - len(marked))}


def again(ids: Tensor, first: int, failed: Tensor, draw: random.Random) -> list[dict[str, Any]]:
    """A row whose prompt ends at one of the places where a draft failed; none if there is no such place.

    The token behind the prompt is what was to be learned; what responds draws one anew.
    """
    places = failed.nonzero()[:, 0].tolist()
    if not places:
        return []
    end = first + draw.choice(places)  # behind the place
    return [{"input_ids": ids[end - first : end + 1].tolist(), "loss_mask": [0] * first + [1]}]


def write_rows(path: str, rows: list[dict[str, Any]]) -> None:
    """A file of JSON lines, whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with written_aside(Path(path)) as aside:
        aside.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))


if __name__ == "__main__":
    main()
