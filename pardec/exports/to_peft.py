"""PEFT: the LoRA alone, as `PeftModel.from_pretrained` loads it, for those who want to look at it or train on."""

from pathlib import Path

from pardec.adapters.adapter import Adapter
from pardec.errors import first_line
from pardec.exports.base_folder import LoadedBase
from pardec.exports.door import Door, base_in_python, python_text
from pardec.exports.lora_folder import read_lora, write_lora
from pardec.exports.record import ExportRecord


def _refusal(adapter: Adapter) -> str | None:
    return "expected a LoRA, found none" if adapter.lora is None else None


def _write(adapter: Adapter, base: LoadedBase | None, folder: Path) -> None:
    assert adapter.lora is not None
    name = {"base_model_name_or_path": adapter.metadata.base.name}
    write_lora(folder, adapter.lora.config | name | {"inference_mode": True}, adapter.lora.tensors)


def _problems(folder: Path, record: ExportRecord) -> list[str]:
    from peft import PeftConfig

    try:
        read_lora(folder)
        PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT's own reading, of whatever somebody has written
        return [f"{folder}: expected a LoRA that PEFT reads, found {first_line(error)}"]
    return []


def _commands(record: ExportRecord, folder: str) -> str:
    base, needed = base_in_python(record.base.name)
    return (
        f"from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n{needed}\n"
        f"base = AutoModelForCausalLM.from_pretrained({base})\n"
        f"model = PeftModel.from_pretrained(base, {python_text(folder)})"
    )


def _notes(record: ExportRecord, folder: Path) -> str:
    return (
        "This LoRA belongs at the rows of pardec's mask tokens only. Loaded like this it acts on every row and changes "
        "the model's own output, so nothing is drafted by it and nothing it emits is the base's: use pardec to decode."
    )


PEFT = Door(
    name="peft",
    engine="peft",
    tested="0.21.2",
    refusal=_refusal,
    write=_write,
    problems=_problems,
    commands=_commands,
    language="python",
    notes=_notes,
    counted=None,
)
