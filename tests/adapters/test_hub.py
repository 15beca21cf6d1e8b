"""Adapters by their name on a hub: what is asked for, what comes of it, and what is said when it does not come."""

import json
import logging

import pytest
from adapter_samples import LORA_FILES, files_in, make_adapter, refusal, same
from hub_server import GOOD, READING
from huggingface_hub import constants

from pardec.adapters.files import load_adapter, save_adapter
from pardec.adapters.hub import HubName, hub_name, hub_problem
from pardec.adapters.packaged import tuned_folder
from pardec.run import cache_folder

NAME = "some/adapter"
WHOLE = {"pardec.json", "mask_embeddings.safetensors", "head.safetensors", *LORA_FILES}


@pytest.fixture
def adapter():
    return make_adapter(lora=True, head=True)


@pytest.fixture
def pushed(hub, adapter, tmp_path, monkeypatch):
    """The hub with an adapter of every part, and other files; the folder that we are in is empty."""
    folder = tmp_path / "pushed"
    save_adapter(adapter, folder)
    (folder / "README.md").write_text("a card")
    (folder / "code.py").write_text("raise SystemExit")
    (folder / "lora/pickle.bin").write_bytes(b"x")
    hub.put(NAME, folder)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return hub


def change(hub, **changes) -> None:
    """A commit in which pardec.json says something else."""
    repo = hub.repos[NAME]
    files = repo.commits[repo.branches["main"]]
    metadata = json.loads(files["pardec.json"]) | changes
    repo.commit("main", files | {"pardec.json": json.dumps(metadata).encode()})


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a/b", HubName("a/b")),
        ("a/b@v1", HubName("a/b", "v1")),
        ("Org-1/x.y_z@refs/pr/3", HubName("Org-1/x.y_z", "refs/pr/3")),
        *(
            (text, None)
            for text in ("a", "/a/b", "./b", "../b", "a/b/c", "a/", "/b", "a b/c", "a/b@", "a/ü", "", "~/b")
        ),
    ],
)
def test_names_of_the_hub_are_told_from_paths(text, name):
    assert hub_name(text) == HubName.parse(text) == name
    assert name is None or str(name) == text


def test_what_was_pushed_is_what_is_loaded_and_nothing_else_is_read(pushed, adapter):
    assert same(load_adapter(NAME), adapter)
    assert set(pushed.downloaded()) == WHOLE
    assert all("code.py" not in path and "pickle" not in path for _, path in pushed.requests)


def test_a_second_time_one_question_is_asked_and_nothing_is_read(pushed, adapter):
    load_adapter(NAME)
    pushed.requests.clear()
    assert same(load_adapter(NAME), adapter)
    assert [(method, path.split("/")[-1]) for method, path in pushed.requests] == [("HEAD", "pardec.json")]


def test_what_is_in_the_cache_is_loaded_offline(pushed, adapter, monkeypatch):
    load_adapter(NAME)
    pushed.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(load_adapter(NAME), adapter)
    assert pushed.requests == []


def test_and_where_the_hub_does_not_answer(pushed, adapter):
    load_adapter(NAME)
    pushed.say["."] = (503, "down for today")
    assert same(load_adapter(NAME), adapter)


def test_a_revision_is_a_branch_or_a_commit(pushed, adapter, tmp_path):
    first = pushed.repos[NAME].branches["main"]
    other = make_adapter(seed=1)
    save_adapter(other, tmp_path / "other")
    pushed.put(NAME, tmp_path / "other", "small")
    second = pushed.put(NAME, tmp_path / "other")
    assert same(load_adapter(f"{NAME}@small"), other)
    assert same(load_adapter(f"{NAME}@{first}"), adapter)
    assert same(load_adapter(NAME), other)
    assert same(load_adapter(f"{NAME}@{second}"), other)


def test_all_files_are_of_one_commit(pushed, adapter, tmp_path, monkeypatch):
    save_adapter(make_adapter(seed=1, lora=True, head=True), tmp_path / "other")
    from pardec.adapters import files

    def between(name, file):
        found = original(name, file)
        if file == "pardec.json":  # somebody pushes while we read
            pushed.put(NAME, tmp_path / "other")
        return found

    original = files.hub_file
    monkeypatch.setattr(files, "hub_file", between)
    assert same(load_adapter(NAME), adapter)


def test_a_folder_of_the_name_comes_first(pushed, tmp_path):
    mine = make_adapter(seed=2)
    save_adapter(mine, tmp_path / "here" / NAME)
    assert same(load_adapter(NAME), mine)
    assert pushed.requests == []
    assert tuned_folder(NAME).as_posix() == NAME


def test_a_tuned_choice_is_kept_in_the_users_cache(pushed):
    assert tuned_folder(NAME) == tuned_folder(f"{NAME}@main") == cache_folder() / "tuned/some--adapter"
    assert pushed.requests == []


def test_a_private_repository_is_read_with_a_token(pushed, adapter, monkeypatch):
    pushed.repos[NAME].private = True
    assert f"no repository at {pushed.url}/{NAME} that anybody may read" in refusal(NAME)
    monkeypatch.setenv("HF_TOKEN", GOOD)
    assert same(load_adapter(NAME), adapter)


def test_a_download_that_breaks_off_goes_on(pushed, adapter):
    pushed.cut["lora/adapter_model.safetensors"] = 2
    assert same(load_adapter(NAME), adapter)
    assert pushed.downloaded().count("lora/adapter_model.safetensors") == 3


def test_one_that_breaks_off_for_good_is_told_and_goes_on_the_next_time(pushed, adapter, tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    pushed.say[r"resolve/[0-9a-f]{40}/head"] = (500, "out of order")
    said = refusal(NAME)
    assert said.startswith(f"{NAME}@{pushed.repos[NAME].branches['main']}: expected an adapter directory or a hub na")
    assert f"no head.safetensors from {pushed.url}/{NAME}: HTTP 500 out of order" in said
    pushed.say.clear()
    assert same(load_adapter(NAME), adapter)


# ---------------------------------------------------------------------- what is said


def test_a_name_that_is_neither_says_what_was_looked_for_where(pushed, tmp_path):
    assert refusal("no/such") == (
        f"no/such: expected an adapter directory or a hub name, found no folder of that name in {tmp_path}/here, and "
        f"no repository at {pushed.url}/no/such that anybody may read"
    )
    assert files_in(tmp_path / "here") == set()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{NAME}@v9", "and no revision v9 at http://127.0.0.1:"),
        ("some/text", "and no pardec.json at http://127.0.0.1:"),
        ("some/closed", "to which its owners give access one by one"),
    ],
)
def test_what_a_repository_has_not_is_told(pushed, tmp_path, name, words):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/README.md").write_text("no adapter")
    pushed.put("some/text", tmp_path / "text")
    pushed.put("some/closed", tmp_path / "text")
    pushed.repos["some/closed"].gated = True
    assert words in refusal(name)


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("hf_oldtoken", "a token (HF_TOKEN, or of `hf auth login`) that http://127.0.0.1:"),
        ("hf_not a\x01token", "found"),
        ("hf_töken", "found"),
        (READING, "that the owner of this token may read"),
    ],
)
def test_a_token_is_never_shown(hub, monkeypatch, token, words, caplog, capfd):
    monkeypatch.setenv("HF_TOKEN", token)
    said = refusal(NAME)
    assert words in said
    assert token not in said + caplog.text + "".join(capfd.readouterr())


def test_a_token_that_another_librarys_error_quotes_is_left_out(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", GOOD)
    try:
        raise OSError("no connection") from ValueError(f"Illegal header value b'Bearer {GOOD}'")
    except OSError as error:
        said = hub_problem(HubName(NAME), error)
    assert said == f"at {hub.url}/{NAME}: Illegal header value b'Bearer ...'"


def test_offline_the_cache_that_was_looked_through_is_told(pushed, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(NAME).endswith(
        f"and no pardec.json in the hub's cache {constants.HF_HUB_CACHE}, offline as HF_HUB_OFFLINE is set"
    )
    assert pushed.requests == []


def test_a_hub_that_does_not_answer_is_told(pushed):
    pushed.stop()
    assert f"and no pardec.json from {pushed.url}/{NAME}: " in refusal(NAME)


@pytest.mark.parametrize("file", ["code.py", "README.md", "lora/pickle.bin", "../../etc/passwd", "tuned.json"])
def test_files_that_no_adapter_has_are_not_asked_for(pushed, file):
    change(pushed, files={"mask_embeddings.safetensors": "0" * 64, "head.safetensors": "0" * 64, file: "0" * 64})
    said = refusal(NAME)
    assert "expected files" in said
    assert f"found '{file}'" in said
    assert pushed.downloaded() == ["pardec.json"]


def test_a_file_of_another_digest_is_refused(pushed):
    repo = pushed.repos[NAME]
    files = repo.commits[repo.branches["main"]]
    weights = bytearray(files["lora/adapter_model.safetensors"])
    weights[-1] ^= 1
    repo.commit("main", files | {"lora/adapter_model.safetensors": bytes(weights)})
    said = refusal(NAME)
    assert "lora/adapter_model.safetensors: expected sha256 " in said
    assert said.endswith("the file is truncated or was changed")
