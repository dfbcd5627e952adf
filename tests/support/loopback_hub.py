"""A Hub on loopback: repositories in memory, and the requests that the Hugging Face libraries make of one.

Enough to create a repository, push to it, also to a branch, and load models and data sets from it, whole or
streamed; to refuse a token, and to lose a connection. Point ``HF_ENDPOINT`` of a fresh process at
:attr:`LoopbackHub.endpoint`; the libraries read it when imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SHUT_RDWR
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse


class LoopbackHub:
    """The server; use it as a context manager.

    ``repositories`` maps ``"name"`` of a model or ``"datasets/name"`` of a data set to its files, those of
    a branch being ``"name@branch"``; ``requests`` lists ``"METHOD path"``. ``private`` has what a repository
    was to be when it was made. Connections whose path has a key of ``cut`` in it are lost in the middle of
    the request, as often as it says; those whose path has a key of ``cut_short`` in the middle of the file
    that is read. Tokens other than ``TOKEN`` are refused, as is writing with
    ``READ_TOKEN``.
    """

    TOKEN, READ_TOKEN = "hf_loopback", "hf_loopback_read"

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}  # large files by SHA-256, as uploaded
        self.requests: list[str] = []
        self.private: dict[str, str | None] = {}
        self.cut: dict[str, int] = {}
        self.cut_short: dict[str, int] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit_of(self, repository: str) -> str:
        """A commit id that changes with the files."""
        digest = hashlib.sha1()
        for name, content in sorted(self.repositories[repository].items()):
            digest.update(name.encode() + hashlib.sha256(content).digest())
        return digest.hexdigest()

    def at(self, repository: str, revision: str) -> str | None:
        """The key of :attr:`repositories` for a branch or a commit that it is at; None if there is none."""
        names = [name for name in self.repositories if name.partition("@")[0] == repository]
        branch = repository if revision == "main" else f"{repository}@{revision}"
        if branch in names:
            return branch
        return next((name for name in names if self.commit_of(name) == revision), None)

    def run(self, script: str, *arguments: str, home: Path) -> str:
        """The output of a Python script that takes this server for the Hub; ``home`` is its cache."""
        run = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, **self.environment(home)},
        )
        assert run.returncode == 0, run.stderr
        return run.stdout

    def environment(self, home: Path) -> Mapping[str, str]:
        """Variables for a process that is to use this Hub."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": self.TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self._read()

    def do_GET(self) -> None:
        self._read()

    def do_PUT(self) -> None:
        path = self._path()
        if self._lost(path):
            return
        content = self._body()
        self.hub.objects[hashlib.sha256(content).hexdigest()] = content
        self._json({})

    def do_POST(self) -> None:
        path = self._path()
        if self._lost(path):
            return
        body = self._body()
        if self._refused(writes="/paths-info/" not in path and path != "/api/validate-yaml"):
            return
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            name = ("datasets/" if asked.get("type") == "dataset" else "") + name
            status = 200
            if name in self.hub.repositories:
                status = 409
            else:
                self.hub.repositories[name] = {}
                self.hub.private[name] = asked.get("visibility")
            made = {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name}
            self._send(status, json.dumps(made).encode(), {})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            there = self._files(path)
            self._json({"files": [self._preupload(f, there.get(f["path"])) for f in files]})
        elif "/branch/" in path:
            repository, rest = self._repository(path)
            branch = f"{repository}@{rest.removeprefix('/branch/')}"
            known = branch in self.hub.repositories
            self.hub.repositories.setdefault(branch, dict(self.hub.repositories[repository]))
            self._send(409 if known else 200, b"{}", {})
        elif path.endswith("/info/lfs/objects/batch"):
            self._lfs_batch(json.loads(body))
        elif path == "/verify":
            self._json({})
        elif "/commit/" in path:
            self._commit(path, body)
        elif "/paths-info/" in path:
            files = self._files(path)
            wanted = json.loads(body or b"{}").get("paths", [])
            self._json([_entry(name, files[name]) for name in wanted if name in files])
        else:
            self._missing("EntryNotFound")

    def _preupload(self, file: dict[str, Any], there: bytes | None) -> dict[str, Any]:
        large = file["path"].endswith((".safetensors", ".gz", ".parquet"))
        found = {**file, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if there is not None:
            kind, head = (hashlib.sha256, b"") if large else (hashlib.sha1, f"blob {len(there)}\0".encode())
            found["oid"] = kind(head + there).hexdigest()  # as git, and git LFS, name it
        return found

    def _files(self, path: str) -> dict[str, bytes]:
        """The files at the revision that a path of the API ends with, ``/kind/revision``."""
        repository, rest = self._repository(path)
        return self.hub.repositories[self.hub.at(repository, rest.split("/", 2)[2]) or repository]

    def _lfs_batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for o in asked["objects"]:
            upload = {"href": f"{self.hub.endpoint}/upload/{o['oid']}", "header": {}}
            verify = {"href": f"{self.hub.endpoint}/verify", "header": {}}
            objects.append({**o, "actions": {"upload": upload, "verify": verify}})
        self._json({"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")

    def _commit(self, path: str, body: bytes) -> None:
        repository, rest = self._repository(path)
        branch = self.hub.at(repository, rest.removeprefix("/commit/"))
        if branch is None:
            self._missing("RevisionNotFound")
            return
        files = dict(self.hub.repositories[branch])
        for line in body.splitlines():
            change = json.loads(line)
            value = change["value"]
            if change["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif change["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.repositories[branch] = files  # all of it at once
        commit = self.hub.commit_of(branch)
        self._json({"commitUrl": f"{self.hub.endpoint}/{repository}/commit/{commit}", "commitOid": commit})

    def _read(self) -> None:
        path = self._path()
        if self._lost(path) or self._refused(writes=False):
            return
        if path == "/api/whoami-v2":
            self._json({"name": "me", "type": "user", "orgs": []})
            return
        repository, rest = self._repository(path)
        if repository not in self.hub.repositories:
            self._missing("RepoNotFound")
            return
        kind, revision, name = [*rest.strip("/").split("/", 2), "", ""][:3]
        branch = self.hub.at(repository, revision or "main")
        if branch is None:
            self._missing("RevisionNotFound")
            return
        files = self.hub.repositories[branch]
        if kind == "resolve":
            self._file(branch, name)
        elif kind == "tree":
            recursive = parse_qs(urlparse(self.path).query).get("recursive", ["false"])[0].lower() == "true"
            self._json(_tree(files, name, recursive=recursive))
        else:
            commit = self.hub.commit_of(branch)
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": repository, "sha": commit, "siblings": siblings, "private": False, "tags": []})

    def _file(self, branch: str, name: str) -> None:
        files = self.hub.repositories[branch]
        if name not in files:
            self._missing("EntryNotFound")
            return
        content = whole = files[name]
        begin, status = 0, 200
        if asked := self.headers.get("Range"):
            first, last = asked.removeprefix("bytes=").split("-")
            begin, status = int(first), 206
            content = whole[begin : int(last) + 1 if last else None]
        headers = {
            "X-Repo-Commit": self.hub.commit_of(branch),
            "ETag": f'"{hashlib.sha256(whole).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        key = next((key for key, times in self.hub.cut_short.items() if times and key in name), None)
        if key is not None and self.command == "GET":
            self.hub.cut_short[key] -= 1
            self._send(status, content, headers, upto=len(content) // 2)
            self.close_connection = True
            self.connection.shutdown(SHUT_RDWR)
            return
        if status == 206:
            headers["Content-Range"] = f"bytes {begin}-{begin + len(content) - 1}/{len(whole)}"
        self._send(status, content, headers)

    def _refused(self, *, writes: bool) -> bool:
        """Whether the token is a wrong one, which has been answered then."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token == self.hub.TOKEN or (token in ("", self.hub.READ_TOKEN) and not writes):
            return False
        known = token == self.hub.READ_TOKEN
        said = "You don't have the rights" if known else "Invalid username or password."
        self._send(403 if known else 401, json.dumps({"error": said}).encode(), {"X-Error-Message": said})
        return True

    def _lost(self, path: str) -> bool:
        """Whether this connection is one to lose, which has been done then, in the middle of the request."""
        key = next((key for key, times in self.hub.cut.items() if times and key in path), None)
        if key is None:
            return False
        self.hub.cut[key] -= 1
        self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
        self.close_connection = True
        self.connection.shutdown(SHUT_RDWR)
        return True

    def _repository(self, path: str) -> tuple[str, str]:
        """``("name" or "datasets/name", the rest of the path)``; a name has two parts."""
        path = path.removeprefix("/api").removeprefix("/models").lstrip("/")
        parts = path.split("/")
        count = 3 if parts[0] == "datasets" else 2
        name = "/".join(parts[:count]).removesuffix(".git")
        return name, "/" + "/".join(parts[count:])

    def _path(self) -> str:
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        return path

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, value: object, kind: str = "application/json") -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": kind})

    def _missing(self, code: str) -> None:
        self._send(404, b"", {"X-Error-Code": code})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str], upto: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:upto])


def _entry(name: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def _tree(files: Mapping[str, bytes], folder: str, *, recursive: bool) -> list[dict[str, object]]:
    prefix = f"{folder}/" if folder else ""
    found: dict[str, dict[str, object]] = {}
    for name, content in files.items():
        if not name.startswith(prefix):
            continue
        head, slash, _ = name.removeprefix(prefix).partition("/")
        if slash:
            found[prefix + head] = {"type": "directory", "path": prefix + head, "size": 0, "oid": "0" * 40}
        if recursive or not slash:
            found[name] = _entry(name, content)
    return list(found.values())
