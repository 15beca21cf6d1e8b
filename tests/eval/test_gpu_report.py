"""The GPU report's bookkeeping: steps that are done stay done, a failed or cut-off one is run again."""

import json
import subprocess
import sys
import time
from pathlib import Path

import exactness
import generate_responses
import gpu_report
import psutil
import pytest
import train_adapter
import yaml
from gpu_report import TIME_IS_OVER, Step
from programs import start_here
from studies.study import load_study


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a report of given steps; returns (exit code, folder)."""

    def run(steps, *options):
        monkeypatch.setattr(gpu_report, "steps", lambda work, quick: steps)
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

    monkeypatch.setattr(gpu_report.subprocess, "Popen", Hurried)


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
    monkeypatch.setattr(gpu_report, "steps", lambda work, quick: asked.append(work) or [])
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


def test_every_step_names_files_and_recipes_that_exist(tmp_path):
    root = Path(gpu_report.__file__).parent.parent
    for quick in (False, True):
        planned = gpu_report.steps(tmp_path, quick)
        assert len({step.name for step in planned}) == len(planned)
        for step in planned:
            named = [word for word in step.command if word.startswith(("eval/", "train/", "recipes/", "tests/"))]
            assert named or step.command[:2] == ["-m", "pardec"]
            assert all((root / word).exists() for word in named), named


def test_every_variant_of_the_study_is_a_step():
    study = yaml.safe_load((Path(gpu_report.ROOT) / gpu_report.STUDY).read_text())
    assert [variant["name"] for variant in study["variants"]] == list(gpu_report.STUDY_VARIANTS)


@pytest.mark.parametrize("quick", [False, True])
def test_every_step_of_the_study_trains_the_same_variants(tmp_path, monkeypatch, quick):
    """One table shows them all, so no step may take what another has done for something else."""
    monkeypatch.chdir(gpu_report.ROOT)
    seen = set()
    for step in gpu_report.steps(tmp_path, quick):
        if step.name.startswith("study-"):
            words = step.command[step.command.index("--set") + 1 : step.command.index("--only")]
            seen.add(tuple(variant.key for variant in load_study(gpu_report.STUDY, words).variants))
    (keys,) = seen
    assert len(keys) == len(gpu_report.STUDY_VARIANTS)
    by_name = {variant.name: variant.recipe for variant in load_study(gpu_report.STUDY, words).variants}
    assert by_name["lora-text"].data.path == "python-packages"
    assert by_name["lora-head"].data.path == str(tmp_path / "responses.jsonl")


def test_the_rehearsal_trains_a_base_and_an_adapter_and_checks_them(tmp_path, monkeypatch):
    folder = tmp_path / "report"
    only = "tests,pretrain,responses,train-lora,exactness,study-lora-head"
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--quick", "--output", str(folder), "--only", only])
    # the others are started as scripts by no other test
    start_here(monkeypatch, generate_responses.main, train_adapter.main, exactness.main)
    monkeypatch.chdir(gpu_report.ROOT)
    with pytest.raises(SystemExit) as ended:
        gpu_report.main()
    logs = {path.name: path.read_text()[-2000:] for path in folder.glob("*.log")}
    assert ended.value.code == 0, logs
    assert "exactness" in (folder / "REPORT.md").read_text().lower()
    assert (folder / "lora-pardec.json").exists()
    study = json.loads((folder / "study.json").read_text())
    done = [row["view"] for row in study["rows"] if row["status"] == "done"]
    assert done == ["head", "no head"]
