"""vLLM with pardec's plugin: the adapter as it is, beside the configuration of a draft that has no weights of a model.

The plugin is `pardec.vllm_plugin`, which vLLM loads where pardec is installed.
"""

from pathlib import Path

from pardec.adapters.adapter import MASK_EMBEDDINGS, Adapter
from pardec.adapters.files import HEAD_FILE, METADATA_FILE, load_adapter, save_adapter
from pardec.adapters.json_files import read_object
from pardec.errors import first_line
from pardec.exports.base_folder import CONFIG_FILE, LoadedBase, write_config
from pardec.exports.door import Door
from pardec.exports.record import ExportRecord
from pardec.exports.vllm_draft import COUNTED, ON_A_CPU, OTHER_METHODS, TOKENS, config_problems, serve_command
from pardec.run import file_sha256
from pardec.vllm_plugin.architectures import ARCHITECTURES, DRAFT_ARCHITECTURE, TESTED_VERSIONS


def _refusal(adapter: Adapter) -> str | None:
    metadata = adapter.metadata
    if metadata.draft_input != MASK_EMBEDDINGS:
        return f"expected mask embeddings, found draft_input {metadata.draft_input}"
    model_type = metadata.fingerprint.architecture.get("model_type")
    if model_type not in ARCHITECTURES:
        return f"expected a base of model_type {', '.join(ARCHITECTURES)}, found {model_type}"
    return None


def _write(adapter: Adapter, base: LoadedBase | None, folder: Path) -> None:
    assert base is not None
    save_adapter(adapter, folder)
    mask_id = base.model.config.vocab_size  # an id that no text can hold; the plugin reads it, no matrix does
    write_config(
        base,
        folder,
        architectures=[DRAFT_ARCHITECTURE],
        vocab_size=base.model.config.vocab_size,
        max_position_embeddings=base.model.config.max_position_embeddings,
        pard_token=mask_id,
        mask_token_id=mask_id,
        # vLLM keeps what it has compiled by path and configuration; another adapter may lie at this path some day
        adapter_sha256=file_sha256(folder / METADATA_FILE),
    )


def _problems(folder: Path, record: ExportRecord) -> list[str]:
    try:
        config = read_object(folder / CONFIG_FILE)
        load_adapter(folder)
    except (ValueError, OSError) as error:
        return [f"{folder}: expected an adapter and the configuration of a draft, found {first_line(error)}"]
    found, mask_id = config_problems(config, record), config.get("pard_token")
    if config.get("architectures") != [DRAFT_ARCHITECTURE]:
        found.append(f"architectures: expected [{DRAFT_ARCHITECTURE!r}], found {config.get('architectures')}")
    if config.get("model_type") not in ARCHITECTURES:
        found.append(f"model_type: expected one of {', '.join(ARCHITECTURES)}, found {config.get('model_type')}")
    vocab_size = record.architecture.get("vocab_size")
    if not isinstance(mask_id, int) or not isinstance(vocab_size, int) or mask_id < vocab_size:
        found.append(f"pard_token: expected an id beyond the {vocab_size} of the vocabulary, found {mask_id}")
    return found


def _commands(record: ExportRecord, folder: str) -> str:
    return serve_command(record, folder, drafts_in_turn=HEAD_FILE in record.sources)


def _notes(record: ExportRecord, folder: Path) -> str:
    K = record.num_speculative_tokens
    return (
        "It needs pardec in vLLM's environment, whose plugin vLLM loads by itself; where `VLLM_PLUGINS` is set it must "
        "name `pardec`. The draft runs the target's own layers: there is no second copy of the weights, but keys and "
        "values of its own, and a round is two forwards. vLLM's number of drafted "
        f"tokens, 2 to {K + 1} here, is one more than the adapter's, as its first is the model's own next token. "
        f"One device: tensor and pipeline parallelism are refused, and so is `--enable-lora`. {TOKENS} {ON_A_CPU}"
    )


VLLM = Door(
    name="vllm",
    engine="vllm",
    tested=TESTED_VERSIONS[-1],
    refusal=_refusal,
    write=_write,
    problems=_problems,
    commands=_commands,
    language="bash",
    notes=_notes,
    counted=COUNTED,
    exact_tokens=1,
    needs_base=True,
    words_not_in_path=OTHER_METHODS,
)
