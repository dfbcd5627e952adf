"""A Hub on loopback: repositories in memory, and the requests that the Hugging Face libraries make of one.

Enough to create a repository, push to it, and load models and data sets from it, whole or streamed. Point
``HF_ENDPOINT`` of a fresh process at :attr:`LoopbackHub.endpoint`; the libraries read it when imported.
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
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse


class LoopbackHub:
    """The server; use it as a context manager.

    ``repositories`` maps ``"name"`` of a model or ``"datasets/name"`` of a data set to its files;
    ``requests`` lists ``"METHOD path"``.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}  # large files by SHA-256, as uploaded
        self.requests: list[str] = []
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
            "HF_TOKEN": "hf_loopback",
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
        content = self._body()
        self.hub.objects[hashlib.sha256(content).hexdigest()] = content
        self._json({})

    def do_POST(self) -> None:
        path, body = self._path(), self._body()
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            name = ("datasets/" if asked.get("type") == "dataset" else "") + name
            self.hub.repositories.setdefault(name, {})
            self._json({"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            self._json({"files": [{**f, "uploadMode": self._mode(f), "shouldIgnore": False} for f in files]})
        elif path.endswith("/info/lfs/objects/batch"):
            self._lfs_batch(json.loads(body))
        elif path == "/verify":
            self._json({})
        elif "/commit/" in path:
            self._commit(path, body)
        elif "/paths-info/" in path:
            repository, _ = self._repository(path)
            files = self.hub.repositories[repository]
            wanted = json.loads(body or b"{}").get("paths", [])
            self._json([_entry(name, files[name]) for name in wanted if name in files])
        else:
            self._missing("EntryNotFound")

    def _mode(self, file: dict[str, Any]) -> str:
        return "lfs" if file["path"].endswith((".safetensors", ".gz", ".parquet")) else "regular"

    def _lfs_batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for o in asked["objects"]:
            upload = {"href": f"{self.hub.endpoint}/upload/{o['oid']}", "header": {}}
            verify = {"href": f"{self.hub.endpoint}/verify", "header": {}}
            objects.append({**o, "actions": {"upload": upload, "verify": verify}})
        self._json({"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")

    def _commit(self, path: str, body: bytes) -> None:
        repository, _ = self._repository(path)
        files = self.hub.repositories[repository]
        for line in body.splitlines():
            change = json.loads(line)
            value = change["value"]
            if change["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        commit = self.hub.commit_of(repository)
        self._json({"commitUrl": f"{self.hub.endpoint}/{repository}/commit/{commit}", "commitOid": commit})

    def _read(self) -> None:
        path = self._path()
        if path == "/api/whoami-v2":
            self._json({"name": "me", "type": "user", "orgs": []})
            return
        repository, rest = self._repository(path)
        if repository not in self.hub.repositories:
            self._missing("RepoNotFound")
            return
        files = self.hub.repositories[repository]
        if rest.startswith("/resolve/"):
            self._file(repository, rest.split("/", 3)[3])
        elif rest.startswith("/tree/"):
            folder = "/".join(rest.split("/")[3:])
            recursive = parse_qs(urlparse(self.path).query).get("recursive", ["false"])[0].lower() == "true"
            self._json(_tree(files, folder, recursive=recursive))
        else:
            commit = self.hub.commit_of(repository)
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": repository, "sha": commit, "siblings": siblings, "private": False, "tags": []})

    def _file(self, repository: str, name: str) -> None:
        files = self.hub.repositories[repository]
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
            "X-Repo-Commit": self.hub.commit_of(repository),
            "ETag": f'"{hashlib.sha256(whole).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        if status == 206:
            headers["Content-Range"] = f"bytes {begin}-{begin + len(content) - 1}/{len(whole)}"
        self._send(status, content, headers)

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

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


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
