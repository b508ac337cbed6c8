"""A hub on this machine: as much of the protocol of a model hub as ``huggingface_hub`` needs to push and pull.

``huggingface_hub`` reads its environment when it is imported, so the address is chosen when this plugin is, for the
tests and for the commands that they start. No test reaches another hub, nor uses the token or cache of its user.
"""

import base64
import hashlib
import json
import os
import re
import socket
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_of_the_tests"
_HOME = tempfile.TemporaryDirectory(prefix="hub-")
with socket.create_server(("127.0.0.1", 0)) as _free:
    PORT = _free.getsockname()[1]
ENDPOINT = f"http://127.0.0.1:{PORT}"
for _name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
    del os.environ[_name]
os.environ.update(HF_ENDPOINT=ENDPOINT, HF_HOME=_HOME.name, HF_TOKEN=TOKEN)
os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_XET="1")


class Hub:
    """What the stand-in stores, what it was asked, and how it fails."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, str]] = {}  # "datasets/owner/name" -> branch -> commit
        self.commits: dict[str, dict[str, str]] = {}  # commit -> path -> SHA-256
        self.objects: dict[str, bytes] = {}
        self.private: set[str] = set()
        self.requests: list[str] = []  # "GET /path", with the range if there is one
        self.cuts: dict[str, list[int]] = {}  # the next downloads of a file end after so many bytes
        self.status: int | None = None  # answer to everything

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        """Path to content."""
        branches = self.repositories[repository]
        tree = self.commits[branches.get(revision, revision)]
        return {path: self.objects[digest] for path, digest in tree.items()}

    def commit(self, repository: str, branch: str, changes: dict[str, bytes]) -> str:
        """Add or replace files."""
        branches = self.repositories.setdefault(repository, {})
        tree = dict(self.commits.get(branches.get(branch, ""), {}))
        for path, content in changes.items():
            tree[path] = self.store(content)
        name = hashlib.sha1(json.dumps([repository, branch, len(self.commits), tree]).encode()).hexdigest()
        self.commits[name], branches[branch] = tree, name
        return name

    def store(self, content: bytes) -> str:
        """The SHA-256 of new content."""
        digest = hashlib.sha256(content).hexdigest()
        self.objects[digest] = content
        return digest

    def downloads(self) -> list[str]:
        """Names of the files that were asked for, with the range."""
        return [line.rpartition("/")[2] for line in self.requests if line.startswith("GET") and "/resolve/" in line]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        range_ = self.headers.get("Range")
        self.hub.requests.append(f"{self.command} {path}" + (f" {range_}" if range_ else ""))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.hub.status is not None:
            return self._send(self.hub.status)
        if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401)
        for method, pattern, name in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                return getattr(self, f"_{name}")(*match.groups(), body)
        return self._send(404)

    def _send(self, status: int, content: bytes | dict | list = b"", **headers: object) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        kind, name = asked.get("type") or "model", f"{asked['organization']}/{asked['name']}"
        repository = name if kind == "model" else f"{kind}s/{name}"
        url = {"url": f"{ENDPOINT}/{repository}"}
        if repository in self.hub.repositories:
            return self._send(409, url)
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(repository)
        self.hub.commit(repository, "main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self._send(200, url)

    def _tree_of(self, repository: str, revision: str) -> tuple[str, dict[str, str]] | None:
        """Commit and files; if there are none, that is the answer."""
        branches = self.hub.repositories.get(repository)
        if branches is None or (repository in self.hub.private and not self.headers.get("Authorization")):
            return self._send(404 if self.headers.get("Authorization") else 401, X_Error_Code="RepoNotFound")
        commit = branches.get(revision, revision)
        if commit not in self.hub.commits:
            return self._send(404, X_Error_Code="RevisionNotFound")
        return commit, self.hub.commits[commit]

    def _branch(self, kind: str, name: str, branch: str, _: bytes) -> None:
        branches = self.hub.repositories[_repository(kind, name)]
        if branch in branches:
            return self._send(409)
        branches[branch] = branches["main"]
        return self._send(200, {})

    def _info(self, kind: str, name: str, revision: str | None, _: bytes) -> None:
        if found := self._tree_of(_repository(kind, name), revision or "main"):
            siblings = [{"rfilename": path} for path in found[1]]
            rest = {"private": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings}
            self._send(200, {"id": name, "_id": name, "sha": found[0], **rest})

    def _tree(self, kind: str, name: str, revision: str, _: bytes) -> None:
        if found := self._tree_of(_repository(kind, name), revision):
            rows = []
            for path, digest in found[1].items():
                size = len(self.hub.objects[digest])
                row = {"type": "file", "path": path, "size": size, "oid": digest[:40]}
                if _is_lfs(path):
                    row["lfs"] = {"oid": digest, "size": size, "pointerSize": 128}
                rows.append(row)
            self._send(200, rows)

    def _preupload(self, kind: str, name: str, revision: str, body: bytes) -> None:
        if self._tree_of(_repository(kind, name), revision):
            files = [
                {"path": row["path"], "uploadMode": "lfs" if _is_lfs(row["path"]) else "regular", "shouldIgnore": False}
                for row in json.loads(body)["files"]
            ]
            self._send(200, {"files": files})

    def _batch(self, _name: str, body: bytes) -> None:
        objects = []
        for row in json.loads(body)["objects"]:
            known = row["oid"] in self.hub.objects
            upload = {} if known else {"actions": {"upload": {"href": f"{ENDPOINT}/lfs/{row['oid']}"}}}
            objects.append({**row, **upload})
        self._send(200, {"transfer": "basic", "objects": objects})

    def _put(self, digest: str, body: bytes) -> None:
        self._send(200 if self.hub.store(body) == digest else 400)

    def _commit(self, kind: str, name: str, branch: str, body: bytes) -> None:
        changes = {}
        for row in map(json.loads, body.splitlines()):
            value = row["value"]
            if row["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                changes[value["path"]] = self.hub.objects[value["oid"]]
        commit = self.hub.commit(_repository(kind, name), branch, changes)
        url = f"{ENDPOINT}/{_repository(kind, name)}/commit/{commit}"
        self._send(200, {"commitOid": commit, "commitUrl": url, "success": True})

    def _resolve(self, repository: str, revision: str, path: str, _: bytes) -> None:
        found = self._tree_of(repository, revision)
        if found is None:
            return None
        commit, tree = found
        if path not in tree:
            return self._send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content = self.hub.objects[tree[path]]
        headers = {"ETag": f'"{tree[path]}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start = 0
        if range_ := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(range_[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        headers["Content-Length"] = str(len(content) - start)
        if self.command == "GET" and (cuts := self.hub.cuts.get(path)):
            content = content[: start + cuts.pop(0)]
        return self._send(206 if range_ else 200, content[start:], **headers)


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("POST", "/api/repos/create", "create"),
    ("POST", rf"/api/(model|dataset)s/{_NAME}/branch/(.+)", "branch"),
    ("GET", rf"/api/(model|dataset)s/{_NAME}(?:/revision/(.+))?", "info"),
    ("GET", rf"/api/(model|dataset)s/{_NAME}/tree/(.+)", "tree"),
    ("POST", rf"/api/(model|dataset)s/{_NAME}/preupload/(.+)", "preupload"),
    ("POST", rf"/api/(model|dataset)s/{_NAME}/commit/(.+)", "commit"),
    ("POST", rf"/(?:datasets/)?{_NAME}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/(\w{64})", "put"),
    ("HEAD GET", r"/((?:datasets/)?[\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", "resolve"),
]


def _repository(kind: str, name: str) -> str:
    return name if kind == "model" else f"{kind}s/{name}"


def _is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running stand-in; the cache of the test is empty."""
    cache = tmp_path / "hub-cache"
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    state = Hub()
    handler = type("Handler", (_Handler,), {"hub": state})
    with ThreadingHTTPServer(("127.0.0.1", PORT), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
