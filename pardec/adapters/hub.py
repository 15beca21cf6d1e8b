"""Adapters on the Hugging Face hub: names such as `user/adapter@revision`, and files brought to the hub's own cache.

Knows names, commits and what goes wrong on the way, not what an adapter consists of. Endpoint, token and cache are
those of huggingface_hub: HF_ENDPOINT, HF_TOKEN or `hf auth login`, HF_HOME. The token is shown nowhere.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pardec.adapters.adapter import AdapterError
from pardec.errors import first_line, short

_WORD = r"\w(?:[\w.-]{0,94}\w)?"
_NAME = re.compile(rf"({_WORD}/{_WORD})(?:@([\w./-]{{1,200}}))?", re.ASCII)


@dataclass(frozen=True)
class HubName:
    """A repository of the hub.

    Attributes:
        repo: `user/name`.
        revision: branch, tag or commit; None for the default branch.
    """

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"

    @classmethod
    def parse(cls, text: str) -> "HubName | None":
        """The name in a text of the form `user/name` or `user/name@revision`; None for any other text."""
        match = _NAME.fullmatch(text)
        return None if match is None else cls(match[1], match[2])


def hub_name(directory: str | os.PathLike[str]) -> HubName | None:
    """What an adapter is called on the hub; None for what can be no such name, and for what is there on this disk."""
    text = os.fspath(directory)
    name = HubName.parse(text) if isinstance(text, str) else None
    return None if name is None or os.path.lexists(text) else name


def hub_file(name: HubName, file: str) -> Path:
    """A file of a repository in the hub's cache: `.../snapshots/<commit>/<file>`; downloaded if it is not there.

    Offline (HF_HUB_OFFLINE=1), and where the hub does not answer, the cache alone is looked through.

    Raises:
        AdapterError: saying what was looked for where.
    """
    try:
        return Path(hf_hub_download(name.repo, file, revision=name.revision, library_name="pardec"))
    except Exception as error:  # of the network, the hub, the disk
        found = f"no folder of that name in {Path.cwd()}, and {hub_problem(name, error, file)}"
        raise AdapterError(f"{name}: expected an adapter directory or a hub name, found {found}") from None


def hub_problem(name: HubName, error: Exception, file: str | None = None) -> str:
    """What went wrong between here and the hub, in one line that begins with what was found.

    Args:
        name: of the repository.
        error: of huggingface_hub.
        file: that was asked for, if one was.
    """
    where, wanted = f"{constants.ENDPOINT}/{name.repo}", file or name.repo
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        if constants.HF_HUB_OFFLINE:
            return f"no {wanted} in the hub's cache {constants.HF_HUB_CACHE}, offline as HF_HUB_OFFLINE is set"
        return f"no {wanted} from {where}: {_line(error)}"
    if isinstance(error, GatedRepoError):
        return f"a repository at {where} to which its owners give access one by one: ask there, and log in"
    if isinstance(error, RepositoryNotFoundError):
        reader = "anybody" if get_token() is None else "the owner of this token"
        return f"no repository at {where} that {reader} may read"
    if isinstance(error, RevisionNotFoundError):
        return f"no revision {name.revision} at {where}"
    if isinstance(error, EntryNotFoundError):
        return f"no {wanted} at {where}, revision {name.revision or constants.DEFAULT_REVISION}"
    if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
        return f"a token (HF_TOKEN, or of `hf auth login`) that {constants.ENDPOINT} does not accept"
    return f"at {where}: {_line(error)}"


def _line(error: Exception) -> str:
    """The first of an error's causes in one line, without the token."""
    while isinstance(error.__cause__, Exception) and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    text = first_line(error)
    if isinstance(error, HfHubHTTPError):
        text = f"HTTP {error.response.status_code} {error.server_message or error.response.reason_phrase}"
    elif isinstance(error, LookupError | TypeError | AttributeError):  # of huggingface_hub, which found no key there
        text = f"an answer that is no hub's ({type(error).__name__}: {text})"
    for token in {os.environ.get("HF_TOKEN", ""), get_token() or ""} - {""}:
        text = text.replace(token, "...")  # of headers that cannot be sent, say
    return short(text, 200)
