"""A data set streamed from the Hub: a server on loopback speaks the few requests that `datasets` makes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlparse

import pytest

REPO = "someone/c4"
COMMIT = "a" * 40
CARD = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
---
"""


class Hub(BaseHTTPRequestHandler):
    files: dict[str, bytes]
    requests: list[str]

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        asked = json.loads(self.rfile.read(length) or b"{}").get("paths", [])
        self.requests.append(f"POST {self.path}")
        self.send_json([self.entry(p) for p in asked if p in self.files])

    def answer(self, *, body: bool) -> None:
        path = unquote(urlparse(self.path).path)
        self.requests.append(f"{self.command} {path}")
        api = f"/api/datasets/{REPO}"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in self.files]
            self.send_json({"id": REPO, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        elif path.startswith(f"{api}/tree/"):
            folder = "/".join(path.removeprefix(f"{api}/tree/").split("/")[1:])
            self.send_json(self.tree(folder, recursive="recursive=true" in self.path.lower()))
        elif path.startswith(f"/datasets/{REPO}/resolve/"):
            self.send_file(path.split("/resolve/")[1].split("/", 1)[1], body=body)
        else:
            self.fail("RepoNotFound" if "/api/" not in path else "EntryNotFound")

    def entry(self, name: str) -> dict[str, object]:
        content = self.files[name]
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": oid}

    def tree(self, folder: str, *, recursive: bool) -> list[dict[str, object]]:
        prefix = f"{folder}/" if folder else ""
        found: dict[str, dict[str, object]] = {}
        for name in self.files:
            if not name.startswith(prefix):
                continue
            head, slash, _ = name.removeprefix(prefix).partition("/")
            if slash:
                path = prefix + head
                found[path] = {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
            if recursive or not slash:
                found[name] = self.entry(name)
        return list(found.values())

    def send_file(self, name: str, *, body: bool) -> None:
        if name not in self.files:
            self.fail("EntryNotFound")
            return
        content = whole = self.files[name]
        begin, status = 0, 200
        if asked := self.headers.get("Range"):
            first, last = asked.removeprefix("bytes=").split("-")
            begin, status = int(first), 206
            content = whole[begin : int(last) + 1 if last else None]
        self.send_response(status)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(whole).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{begin + len(content) - 1}/{len(whole)}")
        self.end_headers()
        if body:
            self.wfile.write(content)

    def send_json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def fail(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub(texts: Path) -> Iterator[tuple[str, list[str]]]:
    files = {f"en/{path.name}": path.read_bytes() for path in texts.iterdir()}
    requests: list[str] = []
    handler = type("Handler", (Hub,), {"files": {"README.md": CARD.encode(), **files}, "requests": requests})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()


SCRIPT = """
import sys, json
sys.path.insert(0, sys.argv[1])
from itertools import islice
from recipe import Recipe
from sources import Source

source = Source(Recipe(dataset=sys.argv[2], dataset_config=sys.argv[3]))
train = [t for v in range(2) for t, _ in source.read("train", None, part=v, parts=2)]
some = [(t, s()) for t, s in islice(source.read("train", None, part=1, parts=2), 9)]
rest = [t for t, _ in source.read("train", json.loads(json.dumps(some[-1][1])), part=1, parts=2)]
print(json.dumps({
    "train": sorted(train),
    "validation": [t for t, _ in source.read("validation", None)],
    "some": [t for t, _ in some], "rest": rest,
    "whole": [t for t, _ in source.read("train", None, part=1, parts=2)],
}))
"""


def test_streaming_from_the_hub(hub, texts, helpers, tmp_path):
    address, requests = hub
    extra = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment = {**helpers.environment(), **extra, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(helpers.ROOT / "training"), REPO, "en"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr + "\n".join(requests)
    found = json.loads(done.stdout)
    assert found["train"] == sorted(helpers.sentences(260, 0) + helpers.sentences(240, 1))
    assert found["validation"] == helpers.sentences(60, 2)
    assert found["some"] + found["rest"] == found["whole"]
    # Read as a stream: no data file came to this machine.
    assert not list((tmp_path / "home").rglob("*.json.gz"))
