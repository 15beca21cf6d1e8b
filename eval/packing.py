"""Times a CPU's matrix product of few rows, with weights packed once and not: what a step's rows can cost there.

    python eval/packing.py [--in-features 768] [--out-features 3072] [--rows 1,4,9,16,25] [--quick]

The layers together are larger than the caches, as those of a model are. GB/s near those of one row mean that reading
the weights is the bound, and further rows are free; where GFLOP/s no longer rise, arithmetic is. The last line printed
is one JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from reporting.result_files import written_aside
from torch import Tensor, nn
from tqdm.auto import tqdm

from pardec.decoding.prepack import PackedLinears
from pardec.run import command_line, device_name, exit_on_unusable_input, library_versions

LAYERS_BYTES = 256 * 2**20
QUICK_BYTES = 4 * 2**20


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-features", type=int, default=768)
    parser.add_argument("--out-features", type=int, default=3072)
    parser.add_argument("--rows", default="1,4,9,16,25", help="numbers with commas")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--output", help="path of the JSON and Markdown without suffix")
    parser.add_argument("--quick", action="store_true", help="small layers, for a first look")
    args = parser.parse_args()
    with exit_on_unusable_input():
        report(args)


@torch.no_grad()
def report(args: argparse.Namespace) -> None:
    """Measures, prints the table and the JSON line, writes both where asked to."""
    rows = [int(n) for n in args.rows.split(",")]
    if min(*rows, args.in_features, args.out_features, args.repetitions) < 1:
        raise ValueError("rows, features and repetitions: expected numbers of at least 1")
    size = QUICK_BYTES if args.quick else LAYERS_BYTES
    count = max(1, size // (4 * args.in_features * args.out_features))
    layers = nn.ModuleList(nn.Linear(args.in_features, args.out_features, bias=False) for _ in range(count))
    packed = PackedLinears([(layer,) for layer in layers])
    packed.refresh()
    found = []
    for n in tqdm(rows, unit="number of rows"):
        x = torch.randn(1, n, args.in_features)
        plain = median_ms(lambda x=x: run(layers, x), args.repetitions) / count
        with packed.installed(), packed.active():
            fast = median_ms(lambda x=x: run(layers, x), args.repetitions) / count
        weights, operations = 4 * args.in_features * args.out_features, 2 * n * args.in_features * args.out_features
        figures = {"ms": plain, "packed_ms": fast, "gb_per_s": weights / fast / 1e6, "gflops": operations / fast / 1e6}
        found.append({"rows": n, **{name: round(value, 4) for name, value in figures.items()}})
    result = {
        "layer": [args.in_features, args.out_features],
        "num_layers": count,
        "rows": found,
        "device": device_name(torch.device("cpu")),
        "versions": library_versions(),
        "command": command_line(),
    }
    page = markdown_of(result)
    print(page)
    if args.output:
        for suffix, text in ((".json", json.dumps(result, indent=1) + "\n"), (".md", page)):
            path = Path(args.output + suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_aside(path) as aside:
                aside.write_text(text)
    print(json.dumps(result))


def run(layers: nn.ModuleList, x: Tensor) -> None:
    """Every layer once."""
    for layer in layers:
        layer(x)


def median_ms(work: Callable[[], None], repetitions: int) -> float:
    """Milliseconds of a call, after one that warms up."""
    work()
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def markdown_of(result: dict) -> str:
    """The page of a result."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    size = " x ".join(map(str, result["layer"]))
    lines = [
        f"# One linear layer of {size}, float32, against rows\n",
        f"`python eval/{result['command']}`\n",
        f"{result['device']}; {versions}; {result['num_layers']} layers in turn\n",
        "| rows | ms, not packed | ms, packed | packed, x one row | GB/s of weights | GFLOP/s |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    one = result["rows"][0]["packed_ms"]
    for row in result["rows"]:
        lines.append(
            f"| {row['rows']} | {row['ms']:.3f} | {row['packed_ms']:.3f} | {row['packed_ms'] / one:.2f} | "
            f"{row['gb_per_s']:.0f} | {row['gflops']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
