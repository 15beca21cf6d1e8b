"""README.md of an adapter on the hub: what `pardec.json` and `tuned.json` say of it, and how it is used.

Knows Markdown and the hub's header, nothing of the network.
"""

import math
from collections.abc import Sequence
from typing import Any

import yaml

from pardec.adapters.adapter import UNIFORM_NOISE, Adapter
from pardec.adapters.hub import HubName
from pardec.adapters.tuned import TunedChoice
from pardec.arguments import real
from pardec.draft_tree import DynamicTree
from pardec.exports.doors import door_of
from pardec.exports.export import record_of
from pardec.exports.record import DOOR_NAMES
from pardec.target.base import BUILT_IN_BASES, SMOLLM2

CARD_FILE = "README.md"
_ON_THE_HUB = {SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct"}
_WAYS = ("sampled", "sampled_without_head", "greedy", "greedy_without_head")


def base_on_the_hub(name: str) -> str | None:
    """The hub name of a base, from the name that an adapter has for it; None for one that is not there."""
    known = _ON_THE_HUB.get(name, name)
    return None if known in BUILT_IN_BASES or HubName.parse(known) is None else known


def card_of(adapter: Adapter, name: HubName, choices: Sequence[TunedChoice], licence: dict[str, str]) -> str:
    """The card in Markdown, with its header.

    Args:
        adapter: as others may read it.
        name: on the hub.
        choices: what it was tuned to, with the speeds that were measured.
        licence: of the base, by the hub's keys `license`, `license_name` and `license_link`; empty if not known.
    """
    base, metadata = adapter.metadata.base, adapter.metadata
    on_hub = base_on_the_hub(base.name)
    header = {
        **licence,
        **({} if on_hub is None else {"base_model": on_hub, "base_model_relation": "adapter"}),
        "library_name": "pardec",
        "tags": ["parallel-decoding", "speculative-decoding", *(["lora"] if adapter.lora is not None else [])],
    }
    told = licence.get("license_name") or licence.get("license") or "not known here"
    revision = "" if base.revision is None else f", revision `{base.revision}`"
    return f"""---
{yaml.safe_dump(header, sort_keys=False).rstrip()}
---
# {name.repo.partition("/")[2]}

An adapter of pardec with which `{base.name}` drafts its own next tokens, several for each forward pass; what comes out is exactly what the model alone would have written.

| | |
|---|---|
| base | `{base.name}`{"" if on_hub in (None, base.name) else f", on the hub `{on_hub}`"}{revision} |
| licence of the base | {told} |
| drafted tokens (K) | {metadata.num_speculative_tokens} |
| learned | {_parts(adapter)} |
{_trained(metadata.training)}
## Acceptance

{_acceptance(metadata.measured)}

## Speed

{_speed(choices)}

## Use

```
pardec generate {name} --prompt "Once upon a time" --compare
pardec chat {name}
pardec tune {name}    # how to draft on your device, and how much; perhaps not at all
```

```python
import pardec

model = pardec.load("{name}")
print(model.generate("Once upon a time", max_new_tokens=64).text[0])
```

{_doors(adapter, name)}"""  # noqa: E501


def _parts(adapter: Adapter) -> str:
    metadata, parts, tensors = adapter.metadata, [], []
    if adapter.mask_embeddings is not None:
        tensors.append(adapter.mask_embeddings)
        parts.append(f"{metadata.mask_sharing} mask embeddings {list(adapter.mask_embeddings.shape)}")
    if adapter.lora is not None:
        noise = ", random tokens at draft rows" if metadata.draft_input == UNIFORM_NOISE else ""
        parts.append(f"a LoRA of rank {adapter.lora.rank} that acts at draft rows only{noise}")
        tensors += adapter.lora.tensors.values()
    if adapter.head is not None and metadata.head is not None:
        parts.append(f"a sampler head of width {metadata.head.width}")
        tensors += adapter.head.values()
    return f"{'; '.join(parts)}: {sum(tensor.numel() for tensor in tensors):,} numbers"


def _trained(training: dict[str, Any]) -> str:
    """Rows of the table: whatever is known of how it was made."""
    rows = []
    if isinstance(training.get("command"), str):
        rows.append(("training command", f"`{training['command']}`"))
    if isinstance(training.get("imported"), dict):
        rows.append(("made from", f"a LoRA in the form of {training['imported'].get('form')}"))
    if isinstance(training.get("moved_from"), dict):
        rows.append(("moved from", _moved(training["moved_from"])))
    for key, name in (("step", "steps"), ("device", "trained on"), ("git_commit", "commit of pardec")):
        if training.get(key) is not None:
            rows.append((name, str(training[key])))
    rows = [(name, " ".join(value.replace("|", r"\|").split())) for name, value in rows]
    return "".join(f"| {name} | {value} |\n" for name, value in rows)


def _moved(source: dict[str, Any]) -> str:
    """The base that training started from an adapter of, and what that adapter had there."""
    lengths = source.get("mean_acceptance_length")
    found = {way: real(length) for way, length in (lengths if isinstance(lengths, dict) else {}).items()}
    told = ", ".join(f"{length:.2f} {way}" for way, length in found.items() if length >= 1)
    return f"an adapter of `{source.get('base')}`" + (
        f", whose mean acceptance length there was {told}" if told else ""
    )


def _acceptance(measured: dict[str, Any]) -> str:
    rows = []
    for way in _WAYS:
        found = measured.get(way)
        length = real(found.get("mean_acceptance_length")) if isinstance(found, dict) else math.nan
        if not isinstance(found, dict) or not length >= 1:
            continue
        top_k = "" if found.get("top_k") is None else f", top-k {found['top_k']}"
        drawn = "" if found.get("temperature") is None else f" at temperature {found['temperature']}{top_k}"
        rows.append(f"| {way.replace('_', ' ')}{drawn} | {length:.2f} | {_interval(found.get('interval'))} |")
    if not rows:
        return "The adapter was not measured, so nothing can be promised."
    about = f"{measured.get('num_prompts', 'some')} prompts of the {measured.get('split', 'held-out')} split"
    if measured.get("max_new_tokens") is not None:
        about += f", {measured['max_new_tokens']} new tokens each"
    if isinstance(measured.get("prompts_sha256"), str):
        about += f" (sha256 of the prompts {measured['prompts_sha256'][:12]})"
    table = "\n".join(["| drafts | mean acceptance length | 95 % interval over prompts |", "|---|---|---|", *rows])
    return (
        f"{table}\n\nAccepted drafts of a step and its bonus token, by pardec's own decoder on {about}. "
        "Plain decoding has 1; other texts give other figures."
    )


def _interval(found: object) -> str:
    low, high = (real(one) for one in found) if isinstance(found, list) and len(found) == 2 else (math.nan, math.nan)
    return f"{low:.2f} to {high:.2f}" if low <= high else "not known"


def _speed(choices: Sequence[TunedChoice]) -> str:
    if not choices:
        return "Not measured. It depends on the device; `pardec tune` measures yours."
    rows = []
    for one in choices:
        drawn = "greedy" if one.temperature == 0 else f"temperature {one.temperature}"
        ratio = one.measured_tokens_per_second / one.plain_tokens_per_second
        rows.append(
            f"| {one.device} | {one.dtype}{', compiled' * one.compile} | {drawn}, batch {one.batch_size} | "
            f"{_way(one)} | {one.measured_tokens_per_second:.1f} | {ratio:.2f} |"
        )
    head = ["| device | dtype | decoding | chosen by `pardec tune` | tokens/s | x plain |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *rows])


def _way(choice: TunedChoice) -> str:
    """Mode, K, and what is verified besides a chain of K drafts."""
    words = [choice.mode, f"K = {choice.num_speculative_tokens}"]
    if choice.tree is not None:
        kind = "dynamic tree" if isinstance(choice.tree, DynamicTree) else "tree"
        words.append(f"a {kind} of {choice.tree.num_nodes} nodes")
    if choice.copy_tokens:
        words.append(f"{choice.copy_tokens} copied tokens")
    return ", ".join(words)


def _doors(adapter: Adapter, name: HubName) -> str:
    """How every engine that can serve the adapter is asked for it."""
    found = []
    for door in map(door_of, DOOR_NAMES):
        if door.counted is None or door.refusal(adapter) is not None:
            continue
        commands = door.commands(record_of(adapter, door, sources=adapter.metadata.files), "out")
        found.append(
            f"With {door.engine} (checked against {door.tested}):\n\n"
            f"```\npardec export {name} --to {door.name} --output out\n```\n\n```{door.language}\n{commands}\n```\n"
        )
    return "\n".join(found)
