"""The part of the Hugging Face Hub's HTTP API by which a model is downloaded, on a port of this machine.

What each repository answers follows the Hub's: error codes in ``X-Error-Code``, ETags that are the SHA-256 of
large files, ranges, and 401 for what there is not where no token is given.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

#: The commit of each repository's one revision.
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_ofAnAccountWithAccess"


@dataclass
class Repository:
    """:param gated: only :data:`TOKEN` opens it.
    :param cut: files of which a connection breaks off after so many bytes, until it is healed.
    """

    files: dict[str, bytes]
    gated: bool = False
    revisions: tuple[str, ...] = ("main", COMMIT)
    cut: dict[str, int] = field(default_factory=dict)


@dataclass
class Hub:
    """:ivar taken: names of the files of which bytes were sent, in order."""

    url: str
    repositories: dict[str, Repository]
    taken: list[str] = field(default_factory=list)
    asked: int = 0


@contextmanager
def serving(repositories: dict[str, Repository]) -> Iterator[Hub]:
    hub = Hub("", repositories)

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        self.state.asked += 1
        parts = urlsplit(self.path).path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        name, rest = "/".join(parts[:2]), parts[2:]
        repository = self.state.repositories.get(name)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repository is None:
            return self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in repository.revisions:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if api and rest[:1] == ["tree"]:
            return self._send_json([_listed(path, data) for path, data in repository.files.items()])
        if api:
            siblings = [{"rfilename": path} for path in repository.files]
            return self._send_json({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings})
        if repository.gated and token != TOKEN:
            return self._refuse(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted")
        return self._send_file(repository, "/".join(rest[2:]), body)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_json(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _send_file(self, repository: Repository, path: str, body: bool) -> None:
        data = repository.files.get(path)
        if data is None:
            return self._refuse(404, "EntryNotFound", f"{path} does not exist")
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{_digest(path, data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if not body:
            return
        self.state.taken.append(path)
        if path in repository.cut:
            self.wfile.write(data[start : start + repository.cut[path]])
            self.close_connection = True
            return
        self.wfile.write(data[start:])


def _digest(path: str, data: bytes) -> str:
    """Of a large file its SHA-256, of a small one that of its Git blob."""
    if path.endswith(".safetensors"):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _listed(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _digest(path, data)}
    if path.endswith(".safetensors"):
        entry["lfs"] = {"oid": _digest(path, data), "size": len(data), "pointerSize": 134}
    return entry
