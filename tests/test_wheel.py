"""What is installed is whole: a wheel, built here, generates outside of the checkout."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path, **environment: str) -> str:
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the files that git knows, so that nothing left over from a build is in it."""
    source = tmp_path_factory.mktemp("source")
    for name in run("git", "ls-files", "pardec", "pyproject.toml", "README.md", "LICENSE", cwd=ROOT).splitlines():
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "out", cwd=source)
    (built,) = (source / "out").glob("pardec-*.whl")
    return built


def test_the_wheel_has_every_room_and_the_packaged_model(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pardec").rglob("*.py")}
    assert len({Path(name).parent for name in expected}) > 8
    assert expected <= names
    assert {f"pardec/assets/tiny-python/{name}" for name in ("model.safetensors", "tokenizer.json")} <= names
    assert not [name for name in names if name.split("/")[0] in ("tests", "eval", "train")]


def test_an_installed_wheel_generates_outside_of_the_checkout(wheel, adapters, tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    (site,) = environment.glob("lib/python*/site-packages")
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", "--quiet", "--python", str(python), "install", "--no-deps", "--no-index",
        str(wheel), cwd=tmp_path)  # fmt: skip
    # what pardec stands on is taken from here; the .pth of an editable installation is not read in such a folder
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    where = run(str(python), "-c", "import pardec; print(pardec.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(site)
    command = [str(environment / "bin" / "pardec"), "generate", str(adapters / "lora"), "--prompt", "def main():\n"]
    out = run(*command, "--max-new-tokens", "8", "--compare", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert "same tokens as plain: yes" in out
