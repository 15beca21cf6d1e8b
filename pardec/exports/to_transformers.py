"""transformers: a folder whose `custom_generate/generate.py` decodes with the adapter, with or without the base."""

import shutil
from importlib.metadata import version
from pathlib import Path

from pardec.adapters.adapter import Adapter
from pardec.adapters.files import load_adapter, save_adapter
from pardec.errors import first_line
from pardec.exports import custom_generate
from pardec.exports.base_folder import LoadedBase, copy_weights, copy_what_is_beside
from pardec.exports.door import Door, base_in_python, python_text
from pardec.exports.record import ExportRecord

GENERATE_FILE = "custom_generate/generate.py"
REQUIREMENTS_FILE = "custom_generate/requirements.txt"


def _refusal(adapter: Adapter) -> str | None:
    return None


def _write(adapter: Adapter, base: LoadedBase | None, folder: Path) -> None:
    save_adapter(adapter, folder)
    (folder / GENERATE_FILE).parent.mkdir()
    shutil.copyfile(custom_generate.__file__, folder / GENERATE_FILE)
    (folder / REQUIREMENTS_FILE).write_text(f"pardec>={version('pardec')}\n")
    if base is not None:
        copy_weights(base, folder)
        copy_what_is_beside(base, folder)


def _problems(folder: Path, record: ExportRecord) -> list[str]:
    from transformers import AutoConfig

    try:
        load_adapter(folder)
        compile((folder / GENERATE_FILE).read_text(encoding="utf-8"), GENERATE_FILE, "exec")
        if record.with_base:
            AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers' own reading, of whatever somebody has written
        return [f"{folder}: expected a folder that transformers and pardec read, found {first_line(error)}"]
    return []


def _commands(record: ExportRecord, folder: str) -> str:
    source, needed = (python_text(folder), "") if record.with_base else base_in_python(record.base.name)
    trusted = ", trust_remote_code=True"
    load = source + trusted * record.with_base
    more = "" if record.with_base else f", custom_generate={python_text(folder)}{trusted}"
    return (
        f"from transformers import AutoModelForCausalLM, AutoTokenizer\n{needed}\n"
        f"tokenizer = AutoTokenizer.from_pretrained({source})\n"
        f"model = AutoModelForCausalLM.from_pretrained({load})\n"
        f'inputs = tokenizer("def quicksort(xs):", return_tensors="pt")  # of a chat model apply_chat_template\n'
        f"out = model.generate(**inputs, max_new_tokens=64{more})\n"
        "print(tokenizer.decode(out[0], skip_special_tokens=True))"
    )


def _notes(record: ExportRecord, folder: Path) -> str:
    return (
        "It needs the package pardec. Greedy search and sampling, batches padded on the left, `streamer=`, "
        "`stop_strings=` and pipelines work as ever; `num_speculative_tokens=`, `mode=` (fused, two_pass, plain) and "
        "`use_head=` may be given as well. "
        f"How much is drafted was chosen for no device yet, so it may be slower than plain: "
        f"`pardec tune {folder.name} --dtype DTYPE`, the one that the model is loaded in, here the base's own, chooses "
        "for yours, and leaves tuned.json here, which `generate` goes by."
    )


TRANSFORMERS = Door(
    name="transformers",
    engine="transformers",
    tested="5.23.0",
    refusal=_refusal,
    write=_write,
    problems=_problems,
    commands=_commands,
    language="python",
    notes=_notes,
    counted="pardec's own mean acceptance length: the accepted drafts and the bonus token of one forward",
)
