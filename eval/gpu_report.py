"""What are all figures of this project on the GPU at hand?

    python eval/gpu_report.py [--adapters DIR,DIR] [--output runs/gpu-report] [--minutes 60] [--quick]

What is worth most comes first: GPU tests, step latencies of an 8B shape, SmolLM2 with the packaged adapters, adapters
that are named, a training step; within an hour. Then, while time remains, a base of 100 M parameters is pretrained on
the Python packages installed for this interpreter, and adapters for it, a study of one variant a step among them.
Every step ends within nine minutes and is skipped once it is done, so a run that was cut off, or whose --minutes are
over, continues when it is started again. Nothing is downloaded; adapters are copied, so that what is tuned here stays
here. Small results are gathered in one folder, with REPORT.md to begin with: what was asked and what was measured, and
what each step answers. card/steps.py says what they run.
Exit codes: 0 all done, 1 a step failed, 3 steps are left or were cut off; run it again.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from card.goals import goals_table
from card.running import CUT_OFF, is_done, read_record, record_file, run_step
from card.steps import SMOLLM2_ADAPTERS, Step, left_out, missing_packages, steps
from reporting.text_tables import TextTable, listed

from pardec.adapters.files import load_adapter, save_adapter
from pardec.adapters.packaged import adapter_folder
from pardec.run import device_name, exit_on_unusable_input, git_commit, library_versions

STEP_LIMIT_SECONDS = 9 * 60
# a step is begun only if the time that is left would do for most of it
MIN_SECONDS_FOR_A_STEP = 60
TIME_IS_OVER = 3


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--adapters", help="folders of adapters of one small base, trained before, with commas")
    add("--output", default="runs/gpu-report", help="folder of the report")
    add("--minutes", type=float, default=60, help="what is not done within them is left for the next run")
    add("--only", help="names of steps, with commas; done ones are done again")
    add("--quick", action="store_true", help="rehearse on any machine; the figures mean nothing")
    args = parser.parse_args()
    with exit_on_unusable_input():
        if not args.quick and not torch.cuda.is_available():
            raise ValueError("device: expected a CUDA device, found none; --quick rehearses the report without one")
        sys.exit(report(args))


def report(args: argparse.Namespace) -> int:
    """Runs what is left of the report and gathers the results; returns the exit code."""
    adapters = adapters_named(args.adapters)
    output = Path(args.output).resolve()  # steps run in the project's folder
    output.mkdir(parents=True, exist_ok=True)
    planned = steps(output / "work", args.quick, adapters)
    chosen = args.only.split(",") if args.only else None
    unknown = set(chosen or ()) - {step.name for step in planned}
    if unknown:
        raise ValueError(f"--only: expected some of {', '.join(s.name for s in planned)}, found {sorted(unknown)[0]}")
    copy_adapters(adapters, output / "work" / "adapters")
    without = left_out(adapters)
    for line in without:
        print(f"left out: {line}", flush=True)
    code = run_all(planned, chosen, output, time.monotonic() + 60 * args.minutes)
    write_report(output, planned, without, is_rehearsal=args.quick)
    return code


def adapters_named(asked: str | None) -> list[Path]:
    """The folders of --adapters."""
    folders = [Path(name).resolve() for name in asked.split(",")] if asked else []
    names = [folder.name for folder in folders]
    twice = [name for name in names if names.count(name) > 1 or name in SMOLLM2_ADAPTERS]
    if twice:
        raise ValueError(
            f"--adapters: expected folders whose names differ, and are not {' or '.join(SMOLLM2_ADAPTERS)}, found "
            f"{twice[0]}"
        )
    return folders


def copy_adapters(adapters: Sequence[Path], to: Path) -> None:
    """Copies those that are measured, so that none is tuned where others use it."""
    packaged = [] if missing_packages() else [adapter_folder(name) for name in SMOLLM2_ADAPTERS]
    for folder in (*packaged, *adapters):
        save_adapter(load_adapter(folder), to / folder.name)


def run_all(planned: Sequence[Step], chosen: Sequence[str] | None, output: Path, end: float) -> int:
    """Runs the chosen steps, or those that are not done yet, until `end` of the monotonic clock."""
    failed = is_left = False
    for number, step in enumerate(planned):
        if step.name not in chosen if chosen else is_done(output, step):
            continue
        left = end - time.monotonic()
        if left < MIN_SECONDS_FOR_A_STEP:
            print(f"time is over before {step.name}; run again to continue", flush=True)
            is_left = True
            break
        if step.is_needed:
            for later in planned[number + 1 :]:
                record_file(output, later).unlink(missing_ok=True)
        code = run_step(output, step, min(STEP_LIMIT_SECONDS, left))
        failed, is_left = failed or code not in (0, CUT_OFF), is_left or code == CUT_OFF
        if code and step.is_needed:
            print(f"what follows works on what {step.name} makes; run again to continue", flush=True)
            break
    return 1 if failed else TIME_IS_OVER if is_left else 0


def write_report(output: Path, planned: Sequence[Step], without: Sequence[str], *, is_rehearsal: bool) -> None:
    """REPORT.md: the machine, what was asked and measured, the steps, and every table in one place."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [f"# {device_name(device)}", "", f"{listed(library_versions())}; commit {git_commit() or 'unknown'}.", ""]
    lines += ["A rehearsal: its figures mean nothing.\n"] * is_rehearsal
    lines += [goals_table(output).markdown(), *(f"Left out: {line}\n" for line in without)]
    rows, tables = [], dict[Path, str]()
    for step in planned:
        record = read_record(output, step)
        if record is None:
            rows.append([step.name, step.answers, f"{step.minutes:g}", "", "not run", ""])
            continue
        ended = "well" if record["code"] == 0 else "cut off" if record["code"] == CUT_OFF else f"code {record['code']}"
        command = " ".join(record["command"]).replace(f"{output}/", "")
        minutes = f"{record['seconds'] / 60:.1f}"
        rows.append([step.name, step.answers, f"{step.minutes:g}", minutes, ended, f"`python {command}`"])
        for name in record["results"]:
            found = output / name
            pages = sorted(found.glob("*.md")) if found.is_dir() else [found] if found.suffix == ".md" else []
            pages = [page for page in pages if page.exists()]  # a result that somebody took away costs no report
            # a table that several steps add to stands behind the last of them
            kept = {page: text for page, text in tables.items() if page not in pages}
            texts = {page: page.read_text().replace(f"{output}/", "") for page in pages}
            tables = kept | {page: f"\n## {step.name}\n\n{text}" for page, text in texts.items()}
    header = ("step", "what it answers", "minutes, about", "minutes", "ended", "command")
    lines.append(TextTable("", header, rows).markdown())
    (output / "REPORT.md").write_text("\n".join([*lines, *tables.values()]) + "\n")
    print(f"report: {output / 'REPORT.md'}")


if __name__ == "__main__":
    main()
