"""SGLang's own reading of a LoRA's folder, in a process of its own: three of its files, behind stubs for the rest.

Needs its wheel, unpacked but not installed: `pip download sglang==0.5.23 --no-deps -d runs/engines`, or another place
named by PARDEC_SGLANG_WHEELS. Start: `python sglang_reader.py WHEEL FOLDER CONFIG OUT`; OUT gets what SGLang has read.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import types
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = ("srt/layers/utils/common.py", "srt/lora/lora_config.py", "srt/lora/utils.py", "srt/lora/lora.py")
STUBS = {
    "sglang.srt.configs.load_config": ["LoadConfig"],
    "sglang.srt.lora.backend.base_backend": ["BaseLoRABackend"],
    "sglang.srt.model_loader.loader": ["DefaultModelLoader"],
    "sglang.srt.utils.hf_transformers_utils": ["AutoConfig"],
    "sglang.srt.model_executor.forward_batch_info": ["ForwardBatch"],
    "sglang.srt.layers.moe.fused_moe_triton.layer": ["FusedMoE"],
}


def wheel() -> Path | None:
    """SGLang's wheel, if it is at hand."""
    folder = Path(os.environ.get("PARDEC_SGLANG_WHEELS", ROOT / "runs/engines"))
    return next(iter(sorted(folder.glob("sglang-*.whl"))), None)


def read_by_sglang(folder: Path, config: Path, out: Path) -> dict | str:
    """What SGLang makes of the folder: targets, scaling and normalised tensors, these in `out`; or its error's line."""
    command = [sys.executable, __file__, str(wheel()), str(folder), str(config), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def stub(name: str, **content) -> types.ModuleType:
    """A module in place of one of SGLang's, inside packages that hold nothing."""
    parent = name.rpartition(".")[0]
    if parent and parent not in sys.modules:
        stub(parent)
    module = types.ModuleType(name)
    module.__dict__.update(content, __path__=[])
    sys.modules[name] = module
    return module


def load(name: str, path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main(wheel: str, folder: str, config: str, out: str) -> None:
    from safetensors.torch import load_file, save_file

    for name, classes in STUBS.items():
        stub(name, **{one: type(one, (), {}) for one in classes})
    sys.modules["sglang.srt.utils"].__dict__["is_npu"] = lambda: False
    with tempfile.TemporaryDirectory() as unpacked:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked, [f"sglang/{file}" for file in FILES])
        root = Path(unpacked) / "sglang"
        common = load("sglang.srt.layers.utils.common", root / FILES[0])
        stub("sglang.srt.layers.utils", get_layer_id=common.get_layer_id)
        lora_config, utils, lora = (
            load("sglang." + file.removesuffix(".py").replace("/", "."), root / file) for file in FILES[1:]
        )
    base = types.SimpleNamespace(**json.loads(Path(config).read_text()))
    read = lora_config.LoRAConfig(folder, base_vocab_size=base.vocab_size)
    if read.lora_added_tokens_size or read.use_dora:  # as LoRAManager.validate_new_adapter
        raise ValueError("SGLang refuses added tokens and DoRA")
    if not isinstance(read.target_modules, list):  # as LoRAManager.init_lora_shapes
        raise ValueError("SGLang wants a list of suffixes in target_modules")
    targets = utils.get_normalized_target_modules(read.target_modules)
    adapter = lora.LoRAAdapter("", read, base, None, None)
    adapter.initialize_weights_from_tensors(load_file(Path(folder) / "adapter_model.safetensors"))
    tensors = {}
    for number, layer in enumerate(adapter.layers):
        for name, weight in layer.weights.items():
            half = "lora_A" if "lora_A" in name else "lora_B"
            # strict loading, which UNO sets: a weight of no target is an error
            tensors[f"{number}.{utils.get_target_module_name(name, targets)}.{half}"] = weight.contiguous()
    save_file(tensors, out)
    print(json.dumps({"targets": sorted(targets), "scaling": adapter.scaling, "rank": read.r, "files": len(tensors)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
