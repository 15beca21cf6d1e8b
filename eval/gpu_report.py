"""What are all figures of this project on the GPU at hand?

    python eval/gpu_report.py [--output runs/gpu-report] [--minutes 60] [--quick]

`make gpu-report` runs tests and step latencies of an 8B shape, pretrains a base of 100 M parameters on the Python
packages installed for this interpreter, lets it write what its adapters are trained on, tunes them, measures speed and
exactness, and compares ways of training in a study, one variant a step. Every step ends within nine minutes and is
skipped once it is done, so a run that was cut off, or whose --minutes are over, continues when it is started again.
Nothing is downloaded. Small results are gathered in one folder, with REPORT.md to begin with.
Exit codes: 0 all done, 1 a step failed, 3 steps are left or were cut off; run it again.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from reporting.result_files import write_json
from reporting.text_tables import listed
from studies.study import QUICK

from pardec.run import device_name, exit_on_unusable_input, git_commit, library_versions

ROOT = Path(__file__).resolve().parent.parent
STEP_LIMIT_SECONDS = 9 * 60
# a step is begun only if the time that is left would do for most of it
MIN_SECONDS_FOR_A_STEP = 60
TIME_IS_OVER = 3
STUDY, STUDY_VARIANTS = "eval/studies/gpu_100m.yaml", ("lora-head", "embeddings", "lora-head-flat", "lora-text")
CUT_OFF = -1  # in place of an exit code


@dataclass(frozen=True)
class Step:
    """A part of the report.

    Attributes:
        name: of its files.
        command: arguments of the Python interpreter, run in the project's folder.
        results: small files that it leaves, to be gathered.
        is_needed: later steps work on what it makes: they wait for it, and are done again after it.
    """

    name: str
    command: Sequence[str]
    results: Sequence[Path] = ()
    is_needed: bool = False


def steps(work: Path, quick: bool) -> list[Step]:
    """All steps in order; `quick` rehearses them on any machine, with sizes that show nothing."""
    base, embeddings, lora = work / "base", work / "embeddings", work / "lora"
    tests = ["-m", "pytest", "-m", "gpu", "tests/gpu", *(["--collect-only"] if quick else ["-ra"])]
    made = [Step("tests", tests), *latency_steps(work, quick)]
    made.append(Step("pretrain", pretraining(base, quick), [base / "README.md", base / "metrics.jsonl"], True))
    made.append(Step("responses", responses(work, base, quick), [work / "responses.jsonl.json"], True))
    for output, recipe in ((embeddings, "python_100m_embeddings.yaml"), (lora, "python_100m_lora.yaml")):
        command = ["train/train_adapter.py", f"recipes/{recipe}", f"base={base}", f"output_dir={output}"]
        command += [*own_data(work, quick), *(QUICK if quick else [])]
        results = [output / "pardec.json", output / "metrics.jsonl"]
        made.append(Step(f"train-{output.name}", command, results, True))
    for adapter in (embeddings, lora):
        command = ["-m", "pardec", "tune", str(adapter), *(["--quick"] if quick else ["--num-prompts", "16"])]
        made.append(Step(f"tune-{adapter.name}", command, [adapter / "tuned.json"]))
    return made + serving_steps(work, embeddings, lora, quick) + study_steps(work, base, quick)


def measuring(name: str, stem: Path, command: Sequence[str]) -> Step:
    """A program of eval/, whose results are put at `stem`."""
    results = [stem.with_name(stem.name + suffix) for suffix in (".json", ".md", ".png")]
    return Step(name, [*command, "--output", str(stem)], [*results, stem])


def latency_steps(work: Path, quick: bool) -> list[Step]:
    """ms per step against rows, captured, without and with compile, and by every attention route."""
    if quick:
        return [measuring("latency", work / "latency", ["eval/latency.py", "--quick"])]
    # a shape is compiled for every number of rows, which takes long
    wanted = {
        "latency": "--profile",
        "latency-compiled": "--profile --compile --rows 1,25,81 --contexts 1024",
        "latency-attention": "--attention grouped,stock,split,flex --rows 1,25,81 --contexts 1024,4096 --lora no",
    }
    command = ["eval/latency.py", "--shape", "llama-8b"]
    return [measuring(name, work / name, [*command, *options.split()]) for name, options in wanted.items()]


def pretraining(base: Path, quick: bool) -> list[str]:
    """The base: 92 million tokens, meant to fit one step of the report on an H100."""
    command = ["train/pretrain_base.py", "recipes/pretrain_100m_gpu.yaml", f"output_dir={base}"]
    if quick:
        sizes = ["model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2"]
        sizes += ["model.num_key_value_heads=1", "model.intermediate_size=32", "tokenizer.vocab_size=300"]
        short = ["data.path=python-stdlib", "data.max_characters=400000", "data.max_length=64", "eval.max_tokens=500"]
        schedule = ["train.steps=2", "train.batch_size=2", "train.gradient_accumulation_steps=1"]
        return [*command, *sizes, *short, *schedule]
    schedule = ["train.steps=1400", "train.batch_size=64", "train.gradient_accumulation_steps=1"]
    schedule += ["train.checkpoint_every=200", "eval.every=700"]
    return [*command, "data.path=python-packages", "data.max_characters=250000000", *schedule]


def serving_steps(work: Path, embeddings: Path, lora: Path, quick: bool) -> list[Step]:
    """Speed beside every peer, and exactness, for both adapters."""
    speed = ["eval/speed.py", str(embeddings), str(lora)]
    speed += ["--quick"] if quick else ["--prompts", "python-packages", "--batch-sizes", "1,4,16"]
    exact = ["eval/exactness.py", str(lora)]
    exact += ["--quick"] if quick else ["--prompts", "python-packages", "--num-prompts", "32"]
    return [measuring("speed", work / "speed", speed), measuring("exactness", work / "exactness", exact)]


def study_steps(work: Path, base: Path, quick: bool) -> list[Step]:
    """Each variant of the study; every step leaves the table of all variants so far."""
    command = ["eval/ablate.py", STUDY, "--work", str(work / "variants")]
    # the same settings in every step: with others, what is done would not be known again
    command += [*(["--quick"] if quick else []), "--set", f"base={base}", *own_data(work, quick)]
    return [measuring(f"study-{name}", work / "study", [*command, "--only", name]) for name in STUDY_VARIANTS]


def responses(work: Path, base: Path, quick: bool) -> list[str]:
    """The base's own continuations, to train on."""
    command = ["train/generate_responses.py", "recipes/responses_python_100m.yaml"]
    command += [f"base={base}", f"output={work / 'responses.jsonl'}"]
    if quick:
        command += ["data.path=python-stdlib", "num_responses=64", "batch_size=32"]
        command += ["prompt_tokens=40", "max_new_tokens=24"]
    return command


def own_data(work: Path, quick: bool) -> list[str]:
    """Settings of a recipe that make it train on them."""
    held_out = ["data.validation_path=python-stdlib"] if quick else []
    return [f"data.path={work / 'responses.jsonl'}", *held_out]


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
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
    output = Path(args.output).resolve()  # steps run in the project's folder
    output.mkdir(parents=True, exist_ok=True)
    planned = steps(output / "work", args.quick)
    chosen = args.only.split(",") if args.only else None
    unknown = set(chosen or ()) - {step.name for step in planned}
    if unknown:
        raise ValueError(f"--only: expected some of {', '.join(s.name for s in planned)}, found {sorted(unknown)[0]}")
    end = time.monotonic() + 60 * args.minutes
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
    write_report(output, planned)
    return 1 if failed else TIME_IS_OVER if is_left else 0


def is_done(output: Path, step: Step) -> bool:
    """Whether the step ended well before, with the same command."""
    found = read_record(output, step)
    return found is not None and found["code"] == 0 and found["command"] == list(step.command)


def read_record(output: Path, step: Step) -> dict | None:
    """What `run_step` wrote of the step."""
    path = record_file(output, step)
    return json.loads(path.read_text()) if path.exists() else None


def record_file(output: Path, step: Step) -> Path:
    """Where it is noted how the step ended."""
    return output / f"{step.name}.step.json"


def run_step(output: Path, step: Step, limit_seconds: float) -> int:
    """Runs a step with its output in a log; returns its exit code, `CUT_OFF` if it took too long."""
    print(f"{step.name}: python {' '.join(step.command)}", flush=True)
    log, start = output / f"{step.name}.log", time.monotonic()
    # one process on one device, so that figures are those of one
    environment = {"CUDA_VISIBLE_DEVICES": "0", **os.environ, "PYTHONUNBUFFERED": "1"}
    (output / "work").mkdir(exist_ok=True)
    with log.open("w") as file:
        command = [sys.executable, *step.command]
        options = {"stdout": file, "stderr": subprocess.STDOUT, "env": environment, "start_new_session": True}
        process = subprocess.Popen(command, cwd=ROOT, **options)
        try:
            code = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            code = CUT_OFF
        finally:
            end_group(process)
    seconds = round(time.monotonic() - start, 1)
    gathered = [gather(path, output) for path in step.results if path.exists()] if code == 0 else []
    record = {"command": list(step.command), "code": code, "seconds": seconds, "results": gathered}
    write_json(record, record_file(output, step))
    said = "done" if code == 0 else "cut off; run again to continue" if code == CUT_OFF else f"failed, see {log}"
    print(f"{step.name}: {said} after {seconds:.0f} s", flush=True)
    return code


def end_group(process: subprocess.Popen) -> None:
    """Ends what is left of a step, the processes that it has started too: nothing may go on beside the next step."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def gather(path: Path, output: Path) -> str:
    """Copies a result file, or the files of a folder, beside the report; returns the name there."""
    name = f"{path.parent.name}-{path.name}" if path.name in COMMON_NAMES else path.name
    if path.is_dir():
        shutil.copytree(path, output / name, dirs_exist_ok=True)
    else:
        shutil.copy(path, output / name)
    return name


# files that several steps leave under one name
COMMON_NAMES = ("README.md", "metrics.jsonl", "pardec.json", "tuned.json")


def write_report(output: Path, planned: Sequence[Step]) -> None:
    """REPORT.md: the machine, the steps, and every table in one place."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [f"# {device_name(device)}", "", f"{listed(library_versions())}; commit {git_commit() or 'unknown'}.", ""]
    lines += ["| step | seconds | ended | command |", "|---|---:|---|---|"]
    tables: dict[Path, str] = {}
    for step in planned:
        record = read_record(output, step)
        if record is None:
            lines.append(f"| {step.name} | | not run | |")
            continue
        ended = "well" if record["code"] == 0 else "cut off" if record["code"] == CUT_OFF else f"code {record['code']}"
        command = " ".join(record["command"]).replace(f"{output}/", "")
        lines.append(f"| {step.name} | {record['seconds']:.0f} | {ended} | `python {command}` |")
        for name in record["results"]:
            found = output / name
            pages = sorted(found.glob("*.md")) if found.is_dir() else [found] if found.suffix == ".md" else []
            # a table that several steps add to stands behind the last of them
            kept = {page: text for page, text in tables.items() if page not in pages}
            tables = kept | {page: f"\n## {step.name}\n\n{page.read_text()}" for page in pages}
    (output / "REPORT.md").write_text("\n".join([*lines, *tables.values()]) + "\n")
    print(f"report: {output / 'REPORT.md'}")


if __name__ == "__main__":
    main()
