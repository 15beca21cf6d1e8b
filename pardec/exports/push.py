"""`pardec push`: an adapter as a repository of the Hugging Face hub: its own files and a card, in one commit.

Knows the hub, through huggingface_hub, with its endpoint and its token.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
)
from huggingface_hub.utils import disable_progress_bars

from pardec.adapters.files import PART_FILES, load_adapter, save_adapter
from pardec.adapters.hub import HubName, hub_problem
from pardec.adapters.tuned import fresh_choices
from pardec.errors import shown
from pardec.exports.card import CARD_FILE, base_on_the_hub, card_of
from pardec.exports.public_form import public_form
from pardec.target.base import PACKAGED_BASE, resolve_base

_LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Pushed:
    """An adapter as it is on the hub.

    Attributes:
        url: of its commit.
        private: whether only its owners see it.
        base: by which others have to find the base.
        base_is_found: whether that is a hub name, or a base that comes with pardec.
    """

    url: str
    private: bool
    base: str
    base_is_found: bool


def push_adapter(directory: str | Path, repo: str, *, public: bool = False, base: str | None = None) -> Pushed:
    """Makes the repository unless it is there, and commits the adapter with a card to it.

    Files of an older adapter that this one does not have go with the same commit; all others stay, but for the card.

    Args:
        directory: of the adapter, or its name, as `pardec.load` takes it.
        repo: `user/name` or `user/name@branch`, which is made as well.
        public: lets everybody see a repository that is new; one that is there stays as visible as it is.
        base: hub name of the base, where the adapter has another for it.

    Raises:
        ValueError: for an unusable adapter or name, no token, and what the hub refuses.
    """
    name = HubName.parse(repo) if isinstance(repo, str) else None
    if name is None:
        raise ValueError(f"repo: expected user/name or user/name@branch, found {shown(repo)}")
    original = load_adapter(directory)
    adapter = public_form(original, base)
    choices = fresh_choices(directory, original.metadata.files)
    if get_token() is None:
        raise ValueError("token: expected one in HF_TOKEN or of `hf auth login`, found none")
    disable_progress_bars()
    called = adapter.metadata.base.name
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(adapter, folder)
        card = card_of(adapter, name, choices, _licence(called, adapter.metadata.base.revision))
        (Path(folder) / CARD_FILE).write_text(card, encoding="utf-8")
        try:
            url, private = _commit(Path(folder), name, public=public)
        except Exception as error:  # of the network and the hub
            raise ValueError(f"{name}: expected a repository to write to, found {hub_problem(name, error)}") from None
    return Pushed(url, private, called, called == PACKAGED_BASE or base_on_the_hub(called) is not None)


def _commit(folder: Path, name: HubName, *, public: bool) -> tuple[str, bool]:
    """The commit's address, and whether the repository is private."""
    api = HfApi(library_name="pardec")
    api.create_repo(name.repo, private=not public, exist_ok=True)
    if name.revision is not None:
        api.create_branch(name.repo, branch=name.revision, exist_ok=True)
    there = api.model_info(name.repo, revision=name.revision)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    stale = {one.rfilename for one in there.siblings or []}.intersection(PART_FILES).difference(files)
    operations = [CommitOperationDelete(path) for path in sorted(stale)]
    operations += [CommitOperationAdd(path_in_repo=path, path_or_fileobj=file) for path, file in files.items()]
    done = api.create_commit(
        name.repo, operations, commit_message="An adapter of pardec", revision=name.revision, parent_commit=there.sha
    )
    return done.commit_url, bool(there.private)


def _licence(base: str, revision: str | None) -> dict[str, str]:
    """What the base's own card says of its licence, by the keys of the hub's header; empty where nothing is known."""
    on_hub = base_on_the_hub(base)
    try:
        if on_hub is not None:
            data = HfApi(library_name="pardec").model_info(on_hub, revision=revision).card_data
        elif base == PACKAGED_BASE:
            data = ModelCard.load(Path(resolve_base(base)) / CARD_FILE).data
        else:
            return {}
    except Exception:  # a base that is gone, gated or offline: then its licence is not known here
        return {}
    found = {} if data is None else data.to_dict()
    return {key: found[key] for key in _LICENCE_KEYS if isinstance(found.get(key), str)}
