"""A LoRA at the top of a folder, in the two files that PEFT and its readers look for.

Knows the two files, not who reads them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pardec.adapters.gated_lora import LoraWeights
from pardec.adapters.json_files import read_object
from pardec.errors import first_line
from pardec.run import save_tensors

LORA_CONFIG, LORA_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_lora(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes both files."""
    (folder / LORA_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_tensors(tensors, folder / LORA_WEIGHTS, metadata={"format": "pt"})


def read_lora(folder: Path) -> LoraWeights:
    """Reads both files.

    Raises:
        ValueError: if they are no LoRA.
    """
    try:
        lora = LoraWeights(read_object(folder / LORA_CONFIG), load_file(folder / LORA_WEIGHTS))
        lora.pairs()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder}: expected {LORA_CONFIG} and {LORA_WEIGHTS}, found {first_line(error)}") from None
    return lora
