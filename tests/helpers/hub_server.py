"""A hub on this machine: repositories in memory, behind as much of the Hugging Face hub's HTTP API as is used.

The fixture `hub` of `conftest.py` lets huggingface_hub of this process talk to one.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

GOOD, READING = "hf_goodtoken", "hf_readingtoken"  # of the owner, and of somebody who may write nothing


def sha(*content: bytes) -> str:
    return hashlib.sha256(b"\0".join(content)).hexdigest()


@dataclass
class Repo:
    """A repository: commits are files by path, branches are commits by name."""

    private: bool = True
    gated: bool = False
    card: dict = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """A new commit that has these files and no others."""
        name = sha(str(len(self.commits)).encode(), branch.encode(), *files.values())[:40]
        self.commits[name] = dict(files)
        self.branches[branch] = name
        return name

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class Hub:
    """The server, running from `start` to `stop`; `repos` may be read and changed meanwhile.

    Attributes:
        requests: (method, path) of what was asked for.
        cut: how often the download of a path breaks off in the middle, by path.
        say: answers (status, message) to any request whose path matches the pattern.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.cut: Counter[str] = Counter()
        self.say: dict[str, tuple[int, str]] = {}
        hub = self
        handler = type("HandlerOfThisHub", (Handler,), {"hub": hub})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def start(self) -> None:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def put(self, repo: str, folder: Path, branch: str = "main", *, private: bool = False) -> str:
        """A commit of all files of a folder."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        there = self.repos.setdefault(repo, Repo(private=private))
        return there.commit(branch, files)

    def downloaded(self) -> list[str]:
        """Paths of files that were read, without the repository and the revision."""
        return [path.split("/", 5)[5] for method, path in self.requests if method == "GET" and "/resolve/" in path]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int, content: bytes | dict | list = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        length = headers.pop("length", str(len(body)))
        self.send_response(status)
        for name, value in (headers | {"Content_Length": length}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, message: str, code: str = "") -> None:
        self.answer(status, {"error": message}, **({"X_Error_Code": code} if code else {}), X_Error_Message=message)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_any(self) -> None:
        path, content = unquote(urlsplit(self.path).path), self.body()
        self.hub.requests.append((self.command, path))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        for pattern, said in self.hub.say.items():
            if re.search(pattern, path):
                return self.refuse(*said)
        if token not in (None, GOOD, READING):
            return self.refuse(401, "Invalid credentials in Authorization header")
        for method, pattern, do in ROUTES:
            match = re.fullmatch(pattern, path)
            if match is None or self.command not in method:
                continue
            if "repo" in match.groupdict():
                repo = self.hub.repos.get(match["repo"])
                if repo is None or (repo.private and token is None):
                    return self.refuse(401 if token is None else 404, "Repository not found", "RepoNotFound")
                if repo.gated and "/resolve/" in path:
                    return self.refuse(403, "Access to this repository is restricted", "GatedRepo")
            if self.command in ("POST", "PUT") and token != GOOD and "/storage/" not in path:
                return self.refuse(403, "You don't have the rights to write here")
            return do(self, content, **match.groupdict())
        self.refuse(404, f"no such address: {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    # ------------------------------------------------------------------ reading

    def resolve(self, content: bytes, repo: str, revision: str, file: str) -> None:
        there = self.hub.repos[repo]
        commit = there.find(revision)
        if commit is None:
            return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if file not in there.commits[commit]:
            return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        whole, start = there.commits[commit][file], 0
        facts = {"X_Repo_Commit": commit, "ETag": f'"{sha(whole)}"', "Accept_Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked:
            start = int(asked[1])
            facts["Content_Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        part = whole[start:]
        if self.command == "GET" and self.hub.cut[file]:
            self.hub.cut[file] -= 1
            self.answer(206 if asked else 200, part[: len(part) // 2], **facts, length=str(len(part)))
            self.close_connection = True
            return None
        return self.answer(206 if asked else 200, part, **facts, length=str(len(part)))

    def info(self, content: bytes, repo: str, revision: str = "main") -> None:
        there = self.hub.repos[repo]
        commit = there.find(revision)
        if commit is None:
            return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        siblings = [{"rfilename": path} for path in there.commits[commit]]
        facts = {"id": repo, "sha": commit, "private": there.private, "siblings": siblings, "cardData": there.card}
        return self.answer(200, facts)

    # ------------------------------------------------------------------ writing

    def create(self, content: bytes) -> None:
        asked = json.loads(content)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            return self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        self.hub.repos[name] = Repo(private=asked.get("visibility") == "private")
        self.hub.repos[name].commit("main", {".gitattributes": b""})
        return self.answer(200, {"url": f"{self.hub.url}/{name}"})

    def branch(self, content: bytes, repo: str, branch: str) -> None:
        there = self.hub.repos[repo]
        if branch in there.branches:
            return self.refuse(409, "Reference already exists")
        there.branches[branch] = there.branches["main"]
        return self.answer(200, {})

    def validate(self, content: bytes) -> None:
        text = json.loads(content)["content"]
        good = text.startswith("---\n") and "\n---\n" in text
        self.answer(200 if good else 400, {"errors": [] if good else [{"message": "no header"}], "warnings": []})

    def preupload(self, content: bytes, repo: str, revision: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(content)["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, content: bytes, repo: str) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.url}/storage/{one['oid']}"}}}
            for one in json.loads(content)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, content: bytes, oid: str) -> None:
        assert sha(content) == oid
        self.hub.blobs[oid] = content
        self.answer(200)

    def commit(self, content: bytes, repo: str, revision: str) -> None:
        there = self.hub.repos[repo]
        lines = [json.loads(line) for line in content.splitlines()]
        assert lines[0]["value"]["parentCommit"] == there.branches[revision]
        files = dict(there.commits[there.branches[revision]])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        commit = there.commit(revision, files)
        self.answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit})


REPO = r"(?P<repo>[^/]+/[^/]+?)"
ROUTES = (
    (("GET", "HEAD"), rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", Handler.resolve),
    (("GET",), rf"/api/models/{REPO}", Handler.info),
    (("GET",), rf"/api/models/{REPO}/revision/(?P<revision>[^/]+)", Handler.info),
    (("POST",), "/api/repos/create", Handler.create),
    (("POST",), "/api/validate-yaml", Handler.validate),
    (("POST",), rf"/api/models/{REPO}/branch/(?P<branch>[^/]+)", Handler.branch),
    (("POST",), rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (("PUT",), "/storage/(?P<oid>.+)", Handler.store),
    (("POST",), rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", Handler.commit),
)
