"""vLLM finds the plugin by its entry point; nothing of vLLM is loaded by the rest of the package."""

import ast
import importlib
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

from pardec.vllm_plugin.architectures import ARCHITECTURES, DRAFT_ARCHITECTURE
from pardec.vllm_plugin.register import register

ROOT = Path(__file__).parents[2]


def test_the_entry_point_registers_the_architecture_by_name(monkeypatch):
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    module, _, name = entry["pardec"].partition(":")
    assert getattr(importlib.import_module(module), name) is register
    registered = {}
    vllm = ModuleType("vllm")
    vllm.ModelRegistry = SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    register()
    (where,) = registered.values()
    assert list(registered) == [DRAFT_ARCHITECTURE]
    path, _, name = where.partition(":")
    tree = ast.parse((ROOT / (path.replace(".", "/") + ".py")).read_text())
    assert name in [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    assert "pardec.vllm_plugin.draft_model" not in sys.modules  # vLLM imports it when a draft is asked for


def test_vllm_is_imported_by_the_plugin_alone():
    importing = set()
    for path in (ROOT / "pardec").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            importing |= {
                path.relative_to(ROOT / "pardec").as_posix() for name in names if name.split(".")[0] == "vllm"
            }
    assert importing == {"vllm_plugin/register.py", "vllm_plugin/draft_model.py"}


def test_every_architecture_is_one_that_transformers_knows():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert all(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind] == name for kind, name in ARCHITECTURES.items())
