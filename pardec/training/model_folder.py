"""The folder that pretraining leaves: weights in bfloat16, tokenizer, and a card that tells how they were made."""

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from pardec.data.pretrain_data import SEPARATOR, SEPARATOR_ID
from pardec.run import device_name, git_commit, library_versions

MODEL_FILE, CARD_FILE = "model.safetensors", "README.md"


@torch.no_grad()
def round_to_bfloat16(model: PreTrainedModel) -> None:
    """Gives every weight the value that it will have in the file; computing stays in float32."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


def export(output: Path, model: PreTrainedModel, tokenizer: Tokenizer, card: str) -> None:
    """Writes the model folder aside and renames file by file, the card last: where it is, all is."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SEPARATOR,
        "eos_token": SEPARATOR,
        "model_max_length": model.config.max_position_embeddings,
    }
    with TemporaryDirectory(prefix=".writing-", dir=output) as folder:
        aside = Path(folder)
        model.to(torch.bfloat16).save_pretrained(aside)  # type: ignore[arg-type]
        tokenizer.save(str(aside / "tokenizer.json"))
        (aside / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        (aside / CARD_FILE).write_text(card)
        for file in sorted(aside.iterdir(), key=lambda file: file.name == CARD_FILE):
            os.replace(file, output / file.name)


def model_card(
    recipe: Mapping[str, Any],
    accelerator: Accelerator,
    model: PreTrainedModel,
    num_sequences: int,
    num_files: int,
    num_characters: int,
    num_tokens: int,
    rows: Sequence[tuple[str, int, int, float]],
) -> str:
    """README.md: what the model is and how to make it again, without folders of this machine.

    `num_sequences` of `num_files` were trained on, for `num_tokens` over all steps and processes. `rows` are of the
    table of held-out losses: split, files, predicted tokens, nats per token.
    """
    name, T, steps = without_folder(recipe["output_dir"]), recipe["data"]["max_length"], recipe["train"]["steps"]
    data = {**recipe["data"], "path": without_folder(recipe["data"]["path"])}
    shareable = {**recipe, "output_dir": name, "data": data}
    command = shlex.join(without_folder(argument) for argument in [Path(sys.argv[0]).name, *sys.argv[1:]])
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    table = "\n".join(f"| {s} | {files:,} | {n:,} | {loss:.4f} |" for s, files, n, loss in rows)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {Path(recipe["output_dir"]).name}

A LLaMA-architecture causal language model of {model.num_parameters():,} parameters, trained from scratch on
Python sources by `train/pretrain_base.py` of pardec, stored in bfloat16. Byte-level BPE of
{model.config.vocab_size:,} tokens; token {SEPARATOR_ID} `{SEPARATOR}` stands before every file.

- Text: `{data["path"]}`, {num_files:,} training files,
  {num_characters:,} characters, {num_sequences * T:,} tokens in sequences of {T}.
- Training: {steps:,} steps of {num_tokens // steps:,} tokens,
  {num_tokens / (num_sequences * T):.2f} passes, mixed precision {accelerator.mixed_precision},
  {accelerator.num_processes} process(es) on {device_name(accelerator.device)}.
- Command: `{command}`
- Versions: {versions}; commit {git_commit() or "unknown"}.

Held-out loss of the stored weights: files are held out by the hash of their path (`split_of` in
`pardec/data/python_sources.py`), each read alone in windows of at most {T} tokens, every token but the first
predicted once.

| split | files | predicted tokens | nats per token |
|---|---:|---:|---:|
{table}

```yaml
{yaml.safe_dump(shareable, sort_keys=False).rstrip()}
```
"""


def without_folder(argument: str) -> str:
    """An argument with the folder of an absolute path in it left out."""
    key, equals, value = argument.rpartition("=")
    return key + equals + (Path(value).name if Path(value).expanduser().is_absolute() else value)
