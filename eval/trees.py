"""Where do trees of drafts start to pay? Chains and trees by rows of a step: accepted lengths, expected and measured.

    python eval/trees.py DIR [--nodes 1,4,16,64] [--rows 4,8,16,32,64,128] [--head off] [--shape llama-8b]

Shapes are chosen by the ranks of the validation split and reported on the test split, greedy and sampled. Beside their
lengths stand what steps of so many rows cost on this device, and what tokens/s that makes over plain decoding; and, on
paper, the same of an H100 at batch 1, 4 and 16, with the adapter's base or a named shape. Prints tables, writes JSON,
Markdown and a picture; the last line is one JSON object.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch
from reporting.result_files import output_stem, provenance
from reporting.tree_tables import print_results, write_results
from timing.options import full_or_quick, integers
from timing.prediction import ShapeOnly, constants, predicted_seconds
from timing.published_peaks import PEAKS
from timing.shapes import SHAPES, config_of
from timing.tree_shapes import RankedTexts, Setting, Shape, gain_over, measured_row, shapes_of
from tqdm.auto import tqdm
from transformers.utils import logging

import pardec
from pardec.data.corpus import held_out_prompts
from pardec.data.python_sources import TEST, VALIDATION
from pardec.layout import full_blocks
from pardec.model import SelfSpeculativeModel
from pardec.run import dtype_name, exit_on_unusable_input
from pardec.tuning.choice import TREES, Kind, Way, full_chain, monotone_cost, tree_way
from pardec.tuning.timing import Call, StepCosts, measure_costs
from pardec.tuning.tree_growth import NUM_NODES

FULL = {"nodes": "1,2,4,8,16,32,64", "rows": "4,8,16,32,64,128,256", "num_prompts": 24, "max_new_tokens": 128}
QUICK = {"nodes": "2", "rows": "4,8", "num_prompts": 2, "max_new_tokens": 16}
HEAD = {"auto": None, "off": False}
LAWS = ("greedy", "sampled")
PAPER, PAPER_BATCHES, PAPER_CONTEXT = "h100", (1, 4, 16), 1024


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("directory", help="adapter directory")
    add("--nodes", help=f"of trees with the whole run behind each node, default {FULL['nodes']}")
    add("--rows", help=f"of steps, default {FULL['rows']}")
    add("--laws", default=",".join(LAWS), help="greedy, sampled or both")
    add("--head", default="auto", choices=HEAD, help="sampler head; auto: if the adapter has one")
    add("--shape", help=f"whose steps the H100 would run: {', '.join(SHAPES)}; default the adapter's base")
    add("--num-prompts", type=int, help=f"of each split, default {FULL['num_prompts']}")
    add("--max-new-tokens", type=int, help=f"default {FULL['max_new_tokens']}")
    add("--temperature", type=float, default=0.8, help="of the sampled figures")
    add("--top-k", type=int, default=10)
    add("--batch-size", type=int, default=8, help="prompts decoded together; lengths do not depend on it")
    add("--decoded-rows", type=int, default=256, help="shapes of more rows are neither decoded with nor timed")
    add("--timed-prompts", type=int, default=3, help="on which steps are timed, one at a time; 0 times none")
    add("--seed", type=int, default=0)
    add("--output", help="path of the results without suffix; default eval/results/trees_<device>")
    add("--quick", action="store_true", help="few shapes and prompts: runs/trees_quick")
    args = full_or_quick(parser, FULL, QUICK)
    with exit_on_unusable_input():
        report(args)


def report(args: argparse.Namespace) -> None:
    """The whole measurement."""
    logging.disable_progress_bar()
    nodes, rows = integers("nodes", args.nodes), integers("rows", args.rows)
    laws = settings_of(args)
    if args.shape is not None:
        config_of(args.shape)  # an unknown one is told before anything is measured
    model = pardec.load(args.directory)
    if model.tokenizer is None or model.adapter is None:
        raise ValueError("base: expected a tokenizer beside the model, found none")
    chosen_on, reported_on = (
        held_out_prompts(model.tokenizer, split, num_prompts=args.num_prompts) for split in (VALIDATION, TEST)
    )
    result: dict[str, Any] = facts(args, model) | {"rows": [], "costs": [], "paper": []}
    timed: list[Shape] = []
    with tqdm(unit="prompt") as bar:
        for setting in laws:
            bar.set_description(setting.name)
            most = max(*nodes, model.adapter.metadata.num_speculative_tokens, NUM_NODES[-1])
            shapes = shapes_of(RankedTexts(model, chosen_on, setting, args.seed, most), nodes, rows)
            texts = RankedTexts(model, reported_on, setting, args.seed, most)
            result["rows"] += rows_of(model, reported_on, shapes, setting, texts, args, bar)
            timed = timed or [shape for shape in shapes if shape.kind in TREES]
    if args.timed_prompts:
        few = [shape for shape in timed if shape.rows <= args.decoded_rows]
        costs = timed_costs(model, reported_on[: args.timed_prompts], few, args)
        add_costs(result, costs)
    result["paper"] = on_paper(args, model, result["rows"], timed)
    write_results(result, output_stem("trees", args.output, args.quick, model.target.device))
    print_results(result)
    print(json.dumps(result))


def add_costs(result: dict[str, Any], costs: StepCosts) -> None:
    """What steps cost on this device, to the result and to its rows."""
    result["costs"] = [{"kind": "plain", "rows": 1, "ms": round(costs.plain, 4)}]
    for kind in TREES:
        by_rows = sorted(measured_costs(costs, kind).items())
        result["costs"] += [{"kind": kind, "rows": n, "ms": round(ms, 4)} for n, ms in by_rows]
    for row in result["rows"]:
        ms = cost_of(costs, row)
        row["ms_per_step"] = None if ms is None else round(ms, 4)
        row["times_plain"] = None if ms is None else round(length_of(row) * costs.plain / ms, 4)


def length_of(row: dict[str, Any]) -> float:
    """As measured, or as expected where the shape was not decoded with."""
    return row["expected"] if row["measured"] is None else row["measured"]


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """The ways to choose tokens that are asked for."""
    sampling = {"greedy": {}, "sampled": {"temperature": args.temperature, "top_k": args.top_k}}
    names = args.laws.split(",")
    unknown = [name for name in names if name not in sampling]
    if unknown:
        raise ValueError(f"laws: expected some of {', '.join(LAWS)}, found {unknown[0]!r}")
    return [
        Setting(name, args.max_new_tokens, sampling[name], HEAD[args.head], args.batch_size)
        for name in dict.fromkeys(names)
    ]


def rows_of(
    model: SelfSpeculativeModel,
    prompts: list[list[int]],
    shapes: Sequence[Shape],
    setting: Setting,
    texts: RankedTexts,
    args: argparse.Namespace,
    bar: tqdm,
) -> list[dict[str, Any]]:
    """A row for each shape, with its gain over the full chain, which is measured first."""
    assert model.adapter is not None
    blocks = full_blocks(model.adapter.metadata.num_speculative_tokens)
    full = Shape("full chain", len(blocks) + sum(blocks), _chain(blocks), blocks)
    rows, chain, last = [], None, {}
    for shape in (full, *shapes):
        row, found = measured_row(model, prompts, shape, setting, texts, args.seed, bar.update, args.decoded_rows)
        chain, last[shape.kind] = chain or found, found
        # of a dynamic tree also over the tree of as many nodes, or of up to as many rows, which comes before it
        tree = last.get(shape.kind.removeprefix("dynamic ")) if "dynamic" in shape.kind else None
        over_tree = None if tree is None else gain_over(tree, found)
        rows.append(row | gain_over(chain, found) | {"over_tree": over_tree, "ms_per_step": None, "times_plain": None})
    return rows


def _chain(blocks: tuple[int, ...]):
    return pardec.DraftTree.chain(blocks)


def timed_costs(
    model: SelfSpeculativeModel, prompts: list[list[int]], shapes: Sequence[Shape], args: argparse.Namespace
) -> StepCosts:
    """Milliseconds of steps of these shapes, one prompt at a time, in turn with plain decoding."""
    head = HEAD[args.head] is not False
    assert model.adapter is not None
    ways = [full_chain(model.adapter.metadata.num_speculative_tokens, head)]
    ways += [tree_way("fused", shape.tree, head) for shape in shapes]

    def decode(way: Way, batch: int, max_new_tokens: int) -> Call:
        out = model.generate(
            [prompts[batch]],
            max_new_tokens=max_new_tokens,
            mode=way.mode,
            block_lengths=way.block_lengths if way.mode == "fused" and way.tree is None else None,
            tree=way.tree,
            use_head=None if way.use_head else False,
        )
        new_tokens = [len(ids) for ids in out.token_ids]
        return Call(out.stats.seconds, new_tokens, [one.accepted for one in out.counts])

    return measure_costs(decode, ways, range(len(prompts)), args.max_new_tokens, 2, 1)


def measured_costs(costs: StepCosts, kind: Kind) -> dict[int, float]:
    """Of trees of a kind, by rows."""
    return costs.fused(True, kind) or costs.fused(False, kind)


def cost_of(costs: StepCosts, row: dict[str, Any]) -> float | None:
    """Milliseconds of a step, of chains as trees take; None beyond the rows that were timed."""
    by_rows = {1: costs.plain} | measured_costs(costs, "dynamic tree" if "dynamic" in row["kind"] else "tree")
    return None if row["rows"] > max(by_rows) else monotone_cost(by_rows, row["rows"])


def on_paper(
    args: argparse.Namespace, model: SelfSpeculativeModel, rows: Sequence[dict[str, Any]], shapes: Sequence[Shape]
) -> list[dict[str, Any]]:
    """The trees' steps on an H100 by batch, and what they would bring over plain decoding, by the lengths measured."""
    assert model.adapter is not None
    config = model.base_model.config if args.shape is None else config_of(args.shape)
    lora = model.adapter.lora
    only = ShapeOnly(config, torch.bfloat16, 1 if lora is None else lora.rank)
    first = [row for row in rows if row["law"] == rows[0]["law"]]
    lengths = {(row["kind"], row["rows"]): length_of(row) for row in first}
    context = min(PAPER_CONTEXT, config.get_text_config(decoder=True).max_position_embeddings // 2)
    found = []
    for batch in PAPER_BATCHES:
        plain = predicted_seconds(only.count(0, False, context, batch_size=batch), PEAKS[PAPER])
        for shape in shapes:
            K = shape.tree.num_speculative_tokens
            counted = only.count(K, lora is not None, context, tree=shape.tree, batch_size=batch)
            seconds = predicted_seconds(counted, PEAKS[PAPER])
            found.append(
                {
                    "batch_size": batch,
                    "kind": shape.kind,
                    "rows": shape.rows,
                    "nodes": shape.tree.num_nodes,
                    "context": context,
                    "launches": counted.launches,
                    "predicted_ms": round(1000 * seconds, 4),
                    "ratio_to_plain_step": round(seconds / plain, 4),
                    "times_plain": round(lengths[shape.kind, shape.rows] * plain / seconds, 4),
                }
            )
    return found


def facts(args: argparse.Namespace, model: SelfSpeculativeModel) -> dict[str, Any]:
    """What the figures depend on."""
    assert model.adapter is not None
    return {
        "adapter": args.directory,
        "num_speculative_tokens": model.adapter.metadata.num_speculative_tokens,
        "head": args.head,
        "has_head": model.adapter.metadata.head is not None and args.head != "off",
        "lora_rank": None if model.adapter.lora is None else model.adapter.lora.rank,
        "paper_shape": args.shape or model.adapter.metadata.base.name,
        "paper_device": PEAKS[PAPER].name,
        "num_prompts": args.num_prompts,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "seed": args.seed,
        "dtype": dtype_name(model.target.dtype),
        **constants(),
        **provenance(model.target.device),
    }


if __name__ == "__main__":
    main()
