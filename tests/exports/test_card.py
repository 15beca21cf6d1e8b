"""The card of an adapter on the hub says what is known of it, and nothing else."""

from dataclasses import replace

import pytest
import yaml
from export_samples import exported, sample

from pardec.adapters.files import load_adapter
from pardec.adapters.hub import HubName
from pardec.adapters.packaged import PACKAGED_ADAPTERS
from pardec.adapters.tuned import shipped_choice
from pardec.draft_tree import DraftTree
from pardec.exports.card import card_of
from pardec.exports.doors import door_of
from pardec.exports.public_form import public_form
from pardec.exports.record import DOOR_NAMES, read_record

NAME = HubName("me/adapter")


def card(adapter, choices=(), licence=None) -> str:
    return card_of(public_form(adapter), NAME, choices, licence or {})


def test_the_header_is_what_the_hub_reads(packaged_adapter):
    adapter = sample(packaged_adapter, "transformers")
    adapter.metadata.base.name = "some/base"
    text = card(adapter, licence={"license": "mit"})
    assert text.startswith("---\n")
    assert yaml.safe_load(text.split("---\n")[1]) == {
        "license": "mit",
        "base_model": "some/base",
        "base_model_relation": "adapter",
        "library_name": "pardec",
        "tags": ["parallel-decoding", "speculative-decoding", "lora"],
    }
    assert "lora" not in card(sample(packaged_adapter, "vllm-stock")).split("---\n")[1]


def test_a_shipped_adapter_is_told_with_its_figures():
    adapter, choice = load_adapter("smollm2"), shipped_choice("smollm2")
    assert choice is not None
    text = card(adapter, [choice])
    for words in (
        "| base | `smollm2-135m-instruct`, on the hub `HuggingFaceTB/SmolLM2-135M-Instruct` |",
        "| drafted tokens (K) | 4 |",
        "a LoRA of rank 16 that acts at draft rows only; a sampler head of width 256: 1,",
        "| training command | `train_adapter.py recipes/smollm2.yaml` |",
        "| sampled at temperature 0.8, top-k 10 | 1.82 | 1.74 to 1.90 |",
        "| sampled without head at temperature 0.8, top-k 10 | 1.69 | 1.62 to 1.76 |",
        "| greedy | 2.02 | 1.92 to 2.14 |",
        "32 prompts of the validation split, 64 new tokens each (sha256 of the prompts 0c5ac327a26c)",
        "| bfloat16 | greedy, batch 1 | fused, K = 2, a tree of 4 nodes, 6 copied tokens | 55.1 | 1.53 |",
    ):
        assert words in text


def test_what_was_tuned_is_told_with_its_tree_or_its_copies():
    adapter, choice = load_adapter("smollm2"), shipped_choice("smollm2")
    assert choice is not None
    tree = DraftTree((0, 0, 1), (0, 1, 0), (2, 1, 2, 0))
    ways = {
        "fused, K = 2, a tree of 3 nodes": {"tree": tree, "block_lengths": (2, 2, 2)},
        "two_pass, K = 2, 4 copied tokens": {"mode": "two_pass", "block_lengths": (2, 2, 2), "copy_tokens": 4},
        "fused, K = 0, 2 copied tokens": {"block_lengths": (0, 0, 0), "copy_tokens": 2},
    }
    plainly = replace(choice, mode="fused", tree=None, copy_tokens=0, block_lengths=(1, 1))
    text = card(adapter, [replace(plainly, batch_size=n, **way) for n, way in enumerate(ways.values(), start=1)])
    for n, words in enumerate(ways, start=1):
        assert f"| greedy, batch {n} | {words} | {choice.measured_tokens_per_second:.1f} |" in text


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ({"sampled": 1.753, "greedy": 2.0}, ", whose mean acceptance length there was 1.75 sampled, 2.00 greedy |"),
        ({"sampled": None}, " |"),
        ("nonsense", " |"),
    ],
)
def test_a_moved_adapter_says_from_where(packaged_adapter, lengths, words):
    adapter = sample(packaged_adapter, "transformers")
    adapter.metadata.training["moved_from"] = {"base": "some/base", "mean_acceptance_length": lengths}
    assert f"| moved from | an adapter of `some/base`{words}\n" in card(adapter)


@pytest.mark.parametrize("door", ["vllm-stock", "sglang", "transformers"])
def test_every_door_that_can_serve_it_has_its_commands(packaged_adapter, door):
    text = card(sample(packaged_adapter, door))
    assert f"pardec export {NAME} --to {door} --output out\n" in text
    assert "custom_generate=" in text  # transformers holds every adapter
    assert ("sglang.launch_server" in text) == (door == "sglang")
    assert ("--to vllm-stock" in text) == (door == "vllm-stock")
    assert ("vllm serve" in text) == (door != "sglang")  # the plugin takes what the stock form refuses
    assert "--to peft" not in text  # nothing drafts with it
    assert f'pardec.load("{NAME}")' in text


@pytest.mark.parametrize("door", DOOR_NAMES)
def test_its_commands_are_those_of_the_exported_folder(packaged_adapter, door, tmp_path):
    adapter = sample(packaged_adapter, door)
    folder = exported(adapter, door, tmp_path)
    commands = door_of(door).commands(read_record(folder), "out")
    assert (commands in card(load_adapter(tmp_path / "adapter"))) == (door != "peft")  # with which nothing drafts


@pytest.mark.parametrize("interval", [None, [1.5], ["a", "b"], [2.0, 1.0], 3])
def test_an_interval_in_another_form_is_not_told(packaged_adapter, interval):
    adapter = sample(packaged_adapter, "transformers")
    found = {"greedy": {"mean_acceptance_length": 2.3, "interval": interval}}
    adapter = replace(adapter, metadata=adapter.metadata.model_copy(update={"measured": found}))
    assert "| greedy | 2.30 | not known |" in card(adapter)


def test_a_command_stays_in_its_cell_of_the_table(packaged_adapter):
    adapter = packaged_adapter(2)
    adapter.metadata.training["command"] = "train_adapter.py 'a|b'\nmore"
    assert "| training command | `train_adapter.py 'a\\|b' more` |\n" in card(adapter)


def test_what_is_not_known_is_not_told(packaged_adapter):
    text = card(packaged_adapter(2))
    assert "The adapter was not measured, so nothing can be promised." in text
    assert "Not measured. It depends on the device" in text
    assert "| licence of the base | not known here |" in text
    assert "training command" not in text


def test_every_shipped_adapter_has_a_card():
    for name in PACKAGED_ADAPTERS:
        assert "x plain" in card(load_adapter(name), [c for c in [shipped_choice(name)] if c])
