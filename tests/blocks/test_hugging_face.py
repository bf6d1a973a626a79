"""A model on the Hugging Face hub, through its own client, from a server in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.folders import sharded_model, stored

REPO = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAMES = ("good/model", "gone/model", "gated/model", "bin/model", "not a name")


class FakeHub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub's protocol as its client needs to download files."""

    root: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.path.partition("?")[0]
        repo = "/".join(path.removeprefix("/api/models/").strip("/").split("/")[:2])
        folder = self.root / repo
        if not folder.is_dir():
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        elif path.startswith("/api/models/") and "/tree/" in path:
            tree = [
                {"type": "file", "path": item.name, "size": item.stat().st_size, "oid": f"{item.name:a<40}"[:40]}
                for item in folder.iterdir()
            ]
            self._answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
        elif path.startswith("/api/models/"):
            about = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": item.name} for item in folder.iterdir()]}
            self._answer(200, json.dumps(about).encode(), {"Content-Type": "application/json"}, body)
        else:
            self._file(folder / path.rpartition("/")[2], body)

    def _file(self, path: Path, body: bool) -> None:
        if path.parts[-3:-1] == ("gated", "model"):
            self._answer(403, b"", {"X-Error-Code": "GatedRepo"}, body)
        elif not path.is_file():
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body)
        else:
            if body:
                self.asked.append(path.name)
            self._answer(200, path.read_bytes(), {"X-Repo-Commit": COMMIT, "ETag": f'"{path.name}"'}, body)

    def _answer(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None: ...


@contextmanager
def fake_hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    handler = type("Handler", (FakeHub,), {"root": root, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", handler.asked  # type: ignore[attr-defined]
        finally:
            server.shutdown()
            thread.join()


#: Runs in a process of its own: the client reads its settings when it is imported.
OPEN_ALL = """
import json, sys, torch
from blocks.source import open_model
from messaging.errors import InputError
said = {}
for name in sys.argv[1:]:
    try:
        model = open_model(name)
        value = model.source.read("model.embed_tokens.weight", torch.float32)
        said[name] = [model.name, len(list(model.source.names())), float(value.sum()), len(model.tokenizer())]
    except InputError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


def open_all(home: Path, endpoint: str, *names: str) -> dict[str, Any]:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()
    }
    environment = {**inherited, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OPEN_ALL, *names], cwd=REPO, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def test_a_model_of_the_hugging_face_hub_is_downloaded_as_far_as_it_is_read(tmp_path: Path) -> None:
    root = tmp_path / "hub"
    for name in ("good", "gated", "bin"):
        sharded_model(root / name / "model")
    for path in [*(root / "bin" / "model").glob("*.safetensors*")]:
        path.unlink()
    with fake_hub(root) as (endpoint, asked):
        said = open_all(tmp_path / "home", endpoint, *NAMES)
    tensors = stored(root / "good" / "model")
    total = float(tensors["model.embed_tokens.weight"].sum())
    assert said["good/model"] == ["good/model", len(tensors), pytest.approx(total), 259]
    assert [name for name in asked if name.endswith(".safetensors")] == ["model-00001-of-00006.safetensors"]
    assert "no such model on the Hugging Face hub" in said["gone/model"]
    assert "is gated: ask for access at https://huggingface.co/gated/model" in said["gated/model"]
    assert "has no such file" in said["bin/model"]
    assert "neither a folder here nor a name" in said["not a name"]

    # The hub is gone now: what was downloaded is still there, and nothing else is.
    said = open_all(tmp_path / "home", endpoint, "good/model", "other/model")
    assert said["good/model"][1] == len(tensors)
    assert "cannot be reached" in said["other/model"]
