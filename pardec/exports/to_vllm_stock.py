"""vLLM without any plugin: a copy of the base as a draft model, with the one mask embedding in a row of its own.

The rules are those of vLLM's parallel drafting (PARD, arXiv:2504.18583): a draft model that reads one mask token at
every drafted position. Legend: V vocabulary, D width of an input embedding.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedTokenizerBase

from pardec.adapters.adapter import MASK_EMBEDDINGS, Adapter
from pardec.adapters.json_files import read_object
from pardec.errors import first_line
from pardec.exports.base_folder import CONFIG_FILE, LoadedBase, copy_what_is_beside, write_config
from pardec.exports.door import Door
from pardec.exports.record import ExportRecord
from pardec.exports.vllm_draft import COUNTED, ON_A_CPU, OTHER_METHODS, TOKENS, config_problems, serve_command
from pardec.target.forward import embedding_weight

_RESERVED = ("reserved", "unused", "extra_id", "dummy", "placeholder")  # names of tokens that no text holds


def _refusal(adapter: Adapter) -> str | None:
    metadata = adapter.metadata
    if metadata.draft_input != MASK_EMBEDDINGS:
        return f"expected mask embeddings, found draft_input {metadata.draft_input}"
    if adapter.lora is not None:
        return (
            "expected mask embeddings alone, found a LoRA, which acts at mask rows only: merged into the weights it "
            "would spoil every other row"
        )
    if adapter.head is not None:
        return "expected mask embeddings alone, found a sampler head"
    if metadata.mask_sharing != "shared" and metadata.num_speculative_tokens > 1:
        return (
            "expected one mask embedding for all positions (adapter.mask_sharing=shared trains it), found "
            f"{metadata.num_speculative_tokens} distinct ones"
        )
    return None


@torch.no_grad()
def _write(adapter: Adapter, base: LoadedBase | None, folder: Path) -> None:
    assert base is not None
    assert adapter.mask_embeddings is not None
    model, head = base.model, base.model.get_output_embeddings()
    if model.config.get_text_config() is not model.config or not isinstance(head, nn.Module):
        raise ValueError(f"base: expected a language model with an output head, found {model.config.model_type}")
    weight = embedding_weight(model)
    if not weight.is_floating_point() or any(not p.is_floating_point() for p in model.parameters()):
        raise ValueError("base: expected weights that are not quantised, found quantised ones")
    row = adapter.mask_embeddings[0] / _scale_of(model)
    if head.weight is weight:  # the mask token's row is no row of the head
        head.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
    mask_id = mask_token_row(weight.shape[0], base.tokenizer)
    weight[mask_id] = row.to(weight.dtype)
    model.save_pretrained(folder)
    write_config(base, folder, tie_word_embeddings=False, pard_token=mask_id, mask_token_id=mask_id)
    copy_what_is_beside(base, folder)


def _scale_of(model) -> float:
    """By what the embedding module multiplies its weights: mask embeddings are in the space of its output.

    Raises:
        ValueError: if it does anything else to them.
    """
    module, weight = model.get_input_embeddings(), embedding_weight(model)
    ids = torch.arange(min(64, weight.shape[0]))
    rows, out = weight[ids].double(), module(ids).double()
    scale = float((rows * out).sum() / (rows * rows).sum())
    if not torch.allclose(out, scale * rows, rtol=2e-2, atol=1e-6):
        raise ValueError("base: expected input embeddings times one number, found a module that does something else")
    return scale


def mask_token_row(num_rows: int, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The row that is least missed: a spare one, else a reserved token's, else the rarest token's.

    Any row is exact, as what is drafted is verified; the draft misreads prompts that hold its token.

    Args:
        num_rows: V.
        tokenizer: of the base; without one the last row counts as the rarest.
    """
    if tokenizer is None:
        return num_rows - 1
    ids = tokenizer.get_vocab()
    used = set(ids.values())
    spare = [row for row in range(num_rows) if row not in used]
    if spare:
        return spare[-1]
    reserved = [row for token, row in ids.items() if row < num_rows and any(word in token for word in _RESERVED)]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if reserved_special := special.intersection(reserved):
        return max(reserved_special)
    return max(row for row in range(num_rows) if row not in special)  # the last one that was merged


def _problems(folder: Path, record: ExportRecord) -> list[str]:
    found = []
    try:
        config = read_object(folder / CONFIG_FILE)
        shapes = [shape for path in sorted(folder.glob("*.safetensors")) for shape in _matrices(path)]
    except (ValueError, OSError, SafetensorError) as error:
        return [f"{folder}: expected a draft model's files, found {first_line(error)}"]
    vocab_size, mask_id = record.architecture.get("vocab_size"), config.get("pard_token")
    found += config_problems(config, record)
    if not isinstance(mask_id, int) or not isinstance(vocab_size, int) or not 0 <= mask_id < vocab_size:
        found.append(f"pard_token: expected a row of {vocab_size}, found {mask_id}")
    if config.get("tie_word_embeddings") is not False:
        found.append(f"tie_word_embeddings: expected false, found {config.get('tie_word_embeddings')}")
    if sum(shape[0] == vocab_size for shape in shapes) < 2:
        found.append(f"weights: expected input embeddings and an output head of {vocab_size} rows each, found fewer")
    return found


def _matrices(path: Path) -> list[list[int]]:
    with safe_open(path, "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    return [shape for shape in shapes if len(shape) == 2]


def _commands(record: ExportRecord, folder: str) -> str:
    return serve_command(record, folder)


def _notes(record: ExportRecord, folder: Path) -> str:
    mask_id = read_object(folder / CONFIG_FILE).get("pard_token")
    return (
        f"The mask embedding stands in row {mask_id} of the draft's input embeddings; those of the target stay as they "
        "are, and what is emitted is the target's own, whatever row it is. vLLM's number of drafted tokens is one more "
        "than the adapter's, as its first is the model's own next token. The draft is a second copy of the weights. "
        f"{TOKENS} {ON_A_CPU}"
    )


VLLM_STOCK = Door(
    name="vllm-stock",
    engine="vllm",
    tested="0.32.0",
    refusal=_refusal,
    write=_write,
    problems=_problems,
    commands=_commands,
    language="bash",
    notes=_notes,
    counted=COUNTED,
    exact_tokens=1,
    needs_base=True,
    holds_base=True,
    words_not_in_path=OTHER_METHODS,
)
