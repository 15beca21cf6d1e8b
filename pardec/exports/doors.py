"""Which door has which form: the only place that knows all of them."""

from pardec.adapters.adapter import Adapter
from pardec.exports.door import Door
from pardec.exports.record import DOOR_NAMES, DoorName
from pardec.exports.to_peft import PEFT
from pardec.exports.to_sglang import SGLANG
from pardec.exports.to_transformers import TRANSFORMERS
from pardec.exports.to_vllm import VLLM
from pardec.exports.to_vllm_stock import VLLM_STOCK


def door_of(name: DoorName) -> Door:
    """The door of that name."""
    match name:
        case "vllm":
            return VLLM
        case "vllm-stock":
            return VLLM_STOCK
        case "sglang":
            return SGLANG
        case "transformers":
            return TRANSFORMERS
        case "peft":
            return PEFT


def refuse(adapter: Adapter, door: Door) -> None:
    """Raises ValueError if the form cannot hold the adapter: which part, and which doors decode with all of it."""
    refusal = door.refusal(adapter)
    if refusal is None:
        return
    others = [door_of(name) for name in DOOR_NAMES]
    able = [other.name for other in others if other.counted is not None and other.refusal(adapter) is None]
    raise ValueError(f"--to {door.name}: {refusal}; {', '.join(able)} can serve it")
