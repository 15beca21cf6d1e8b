"""Adapters on the way to a hub: what arrives there, who may see it, and what is said when nothing does."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from adapter_samples import LORA_FILES
from export_samples import sample
from hub_server import GOOD, READING, Repo
from huggingface_hub import constants

from pardec.adapters.files import load_adapter, save_adapter
from pardec.adapters.tuned import TUNED_FILE, TunedChoice, weights_of, write_tuned
from pardec.exports.push import push_adapter

NAME = "me/adapter"
PARTS = {"pardec.json", "mask_embeddings.safetensors", "head.safetensors", *LORA_FILES}
OWN = {".gitattributes", "README.md"}
# huggingface_hub's upload by LFS, to its own HTTP library
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def directory(packaged_adapter, tmp_path):
    """An adapter of every part, and what else lies in the folder of a run."""
    folder = tmp_path / "runs/mine"
    adapter = sample(packaged_adapter, "transformers")
    adapter.metadata.base.name = "/home/me/models/tiny"
    save_adapter(adapter, folder)
    (folder / "metrics.jsonl").write_text("{}")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/state.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def token(monkeypatch, hub):
    monkeypatch.setenv("HF_TOKEN", GOOD)


def files(hub, branch="main") -> dict[str, bytes]:
    return hub.repos[NAME].commits[hub.repos[NAME].branches[branch]]


def header(hub) -> dict:
    return yaml.safe_load(files(hub)["README.md"].decode().split("---\n")[1])


def refusal(*arguments, **options) -> str:
    with pytest.raises(ValueError) as caught:
        push_adapter(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_adapters_files_and_a_card_arrive_in_one_commit(hub, directory):
    done = push_adapter(directory, NAME)
    assert files(hub).keys() == PARTS | OWN
    assert len(hub.repos[NAME].commits) == 2  # the hub makes the first
    assert done.url == f"{hub.url}/{NAME}/commit/{hub.repos[NAME].branches['main']}"


def test_what_arrives_is_what_was_trained(hub, directory):
    push_adapter(directory, NAME)
    here, there = load_adapter(directory), load_adapter(NAME)
    assert torch.equal(here.mask_embeddings, there.mask_embeddings)
    assert all(torch.equal(here.lora.tensors[name], there.lora.tensors[name]) for name in here.lora.tensors)
    assert all(torch.equal(here.head[name], there.head[name]) for name in here.head)
    assert there.metadata.fingerprint == here.metadata.fingerprint
    assert there.metadata.measured == here.metadata.measured


def test_nothing_tells_of_the_machine_that_trained(hub, directory, tmp_path):
    push_adapter(directory, NAME)
    for name, content in files(hub).items():
        assert b"/home/me" not in content, name
        assert str(tmp_path).encode() not in content, name
    assert load_adapter(NAME).metadata.base.name == "tiny"
    assert b"data.path=texts.jsonl" in files(hub)["README.md"]


@pytest.mark.parametrize("public", [False, True])
def test_a_new_repository_is_private_unless_asked_otherwise(hub, directory, public):
    assert push_adapter(directory, NAME, public=public).private is not public
    assert hub.repos[NAME].private is not public


def test_one_that_is_there_stays_as_visible_as_it_is(hub, directory):
    push_adapter(directory, NAME, public=True)
    assert push_adapter(directory, NAME).private is False
    assert hub.repos[NAME].private is False


def test_files_of_an_older_adapter_go_and_others_stay(hub, directory, packaged_adapter, tmp_path):
    push_adapter(directory, NAME)
    hub.repos[NAME].commit("main", files(hub) | {"notes.md": b"mine"})
    save_adapter(packaged_adapter(2), tmp_path / "smaller")
    push_adapter(tmp_path / "smaller", NAME)
    assert files(hub).keys() == {"pardec.json", "mask_embeddings.safetensors", "notes.md"} | OWN
    assert load_adapter(NAME).lora is None


def test_a_branch_is_made_and_written_to(hub, directory, packaged_adapter, tmp_path):
    push_adapter(directory, NAME)
    before = files(hub)
    save_adapter(packaged_adapter(3), tmp_path / "other")
    push_adapter(tmp_path / "other", f"{NAME}@three")
    assert files(hub) == before
    assert load_adapter(f"{NAME}@three").metadata.num_speculative_tokens == 3
    assert f'pardec.load("{NAME}@three")' in files(hub, "three")["README.md"].decode()


def test_a_packaged_adapter_and_one_of_the_hub_are_pushed_by_their_names(hub):
    assert push_adapter("smollm2_embeddings", NAME).base_is_found
    push_adapter(NAME, "me/copy")
    assert torch.equal(load_adapter("me/copy").mask_embeddings, load_adapter("smollm2_embeddings").mask_embeddings)


# ---------------------------------------------------------------------- the base


@pytest.mark.parametrize(
    ("base", "on_hub", "found"),
    [
        ("/home/me/models/tiny", None, False),
        ("tiny-python", None, True),
        ("smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("some/base", "some/base", True),
    ],
)
def test_the_base_is_called_by_its_hub_name_where_it_has_one(hub, directory, base, on_hub, found):
    adapter = load_adapter(directory)
    adapter.metadata.base.name = base
    save_adapter(adapter, directory)
    assert push_adapter(directory, NAME).base_is_found is found
    assert header(hub).get("base_model") == on_hub


def test_a_local_base_can_be_given_its_hub_name(hub, directory):
    assert push_adapter(directory, NAME, base="some/base").base_is_found
    assert load_adapter(NAME).metadata.base.name == "some/base"
    assert header(hub)["base_model"] == "some/base"


@pytest.mark.parametrize(
    ("card", "told"),
    [
        ({"license": "apache-2.0", "tags": ["x"]}, "apache-2.0"),
        ({"license": "other", "license_name": "own", "license_link": "https://example.org/own"}, "own"),
        ({"license": ["mit", 3]}, "not known here"),
        ({}, "not known here"),
        (None, "not known here"),
    ],
)
def test_the_licence_of_the_base_is_that_of_its_own_card(hub, directory, card, told):
    if card is not None:
        hub.repos["some/base"] = Repo(private=False, card=card)
        hub.repos["some/base"].commit("main", {})
    push_adapter(directory, NAME, base="some/base")
    expected = {} if told == "not known here" else {key: card[key] for key in card if key != "tags"}
    assert {key: value for key, value in header(hub).items() if key.startswith("license")} == expected
    assert f"| licence of the base | {told} |" in files(hub)["README.md"].decode()


def test_the_licence_of_the_packaged_base_is_known(hub, directory):
    push_adapter(directory, NAME, base="tiny-python")
    assert header(hub)["license"] == "other"
    assert header(hub)["license_name"]


def test_speeds_that_were_measured_are_in_the_card_and_the_choice_stays_here(hub, directory):
    facts = (weights_of(directory), 1.0, 2.0, 30.0, 20.0, [0.5, 0.5])
    write_tuned(directory, TunedChoice("a card of 2026", "bfloat16", True, (1, 1), *facts))
    push_adapter(directory, NAME)
    assert TUNED_FILE not in files(hub)
    row = "| a card of 2026 | bfloat16, compiled | greedy, batch 1 | fused, K = 1 | 30.0 | 1.50 |"
    assert row in files(hub)["README.md"].decode()


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("repo", ["adapter", "me/adapter/more", "/me/adapter", "me/adapter@", "", 3, None])
def test_what_can_be_no_repository_is_told(hub, directory, repo):
    assert refusal(directory, repo).startswith("repo: expected user/name or user/name@branch, found ")
    assert hub.requests == []


def test_an_adapter_that_cannot_be_read_is_not_pushed(hub, directory):
    (directory / "head.safetensors").write_bytes(b"x")
    assert "head.safetensors: expected sha256" in refusal(directory, NAME)
    assert hub.repos == {}


def test_without_a_token_nothing_is_asked(hub, directory, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert refusal(directory, NAME) == "token: expected one in HF_TOKEN or of `hf auth login`, found none"
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("hf_oldtoken", "found a token (HF_TOKEN, or of `hf auth login`) that http://127.0.0.1:"),
        (READING, "HTTP 403 You don't have the rights to write here"),
        ("hf_not a\x01token", "found"),
    ],
)
def test_a_token_that_may_not_write_is_told_and_never_shown(hub, directory, monkeypatch, token, words, caplog, capfd):
    monkeypatch.setenv("HF_TOKEN", token)
    said = refusal(directory, NAME)
    assert said.startswith(f"{NAME}: expected a repository to write to, found ")
    assert words in said
    assert token not in said + caplog.text + "".join(capfd.readouterr())
    assert hub.repos == {}


def test_offline_nothing_is_pushed(hub, directory, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline as HF_HUB_OFFLINE is set" in refusal(directory, NAME)


def test_an_upload_that_breaks_off_changes_nothing_and_is_made_again(hub, directory):
    push_adapter(directory, NAME)
    before = files(hub)
    adapter = load_adapter(directory)
    save_adapter(replace(adapter, mask_embeddings=adapter.mask_embeddings + 1), directory)
    hub.say["/commit/"] = (500, "out of order")
    assert "HTTP 500 out of order" in refusal(directory, NAME)
    assert files(hub) == before
    hub.say.clear()
    push_adapter(directory, NAME)
    assert torch.equal(load_adapter(NAME).mask_embeddings, adapter.mask_embeddings + 1)


@pytest.mark.parametrize("address", ["/api/repos/create", f"/api/models/{NAME}$"])
def test_what_answers_and_is_no_hub_is_told(hub, directory, address):
    hub.say[address] = (200, "welcome")
    assert f"{NAME}: an answer that is no hub's (KeyError: '" in refusal(directory, NAME)


def test_a_record_of_other_measurements_is_pushed_as_it_is(hub, directory):
    adapter = load_adapter(directory)
    adapter.metadata.measured.update(json.loads('{"sampled": 3, "greedy": {"mean_acceptance_length": "x"}}'))
    save_adapter(adapter, directory)
    push_adapter(directory, NAME)
    assert "The adapter was not measured" in files(hub)["README.md"].decode()
