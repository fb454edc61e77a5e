"""A hub in a folder: what huggingface_hub asks of huggingface.co for models, answered over HTTP.

<root>/OWNER/NAME/<files>          made by POST /api/repos/create, one revision, main
The library is the real one. `refuse` makes the server answer every request with a status; `asked` lists them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NO_REPOSITORY = {"X-Error-Code": "RepoNotFound"}


class FolderHub(ThreadingHTTPServer):
    """Serves a folder; `url` is the endpoint."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.url = root, f"http://127.0.0.1:{self.server_address[1]}"
        self.refuse: tuple[int, dict[str, str]] | None = None
        self.asked: list[str] = []
        self.created: list[dict] = []  # what was asked of repos/create


class Handler(BaseHTTPRequestHandler):
    server: FolderHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None: ...

    def answer(self, status: int, body: object = None, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_one(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        sent = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        if self.server.refuse is not None:
            status, headers = self.server.refuse
            self.answer(status, {"error": "refused"}, headers)
        elif path.startswith("/api/"):
            self.api(path.removeprefix("/api/"), sent)
        else:
            self.resolve(path)

    do_GET = do_HEAD = do_POST = handle_one

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def api(self, path: str, sent: bytes) -> None:
        if path == "repos/create":
            asked = json.loads(sent)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.server.created.append(asked)
            (self.server.root / name).mkdir(parents=True, exist_ok=True)
            return self.answer(200, {"url": f"{self.server.url}/{name}", "name": name})
        if path == "validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if not path.startswith("models/"):
            return self.answer(404, {"error": "not of models"})
        _, owner, name, verb, *rest = path.split("/")
        folder = self.server.root / owner / name
        if not folder.is_dir():
            return self.answer(404, {"error": "no such repository"}, NO_REPOSITORY)
        if verb in ("revision", "tree") and rest[0] not in ("main", COMMIT):
            return self.answer(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
        files = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()]
        if verb == "preupload":
            wanted = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(sent)["files"]]
            return self.answer(200, {"files": [file | {"shouldIgnore": False} for file in wanted]})
        if verb == "commit":
            return self.commit(folder, sent, f"{self.server.url}/{owner}/{name}/commit/{COMMIT}")
        if verb == "tree":
            return self.answer(200, [self.entry(folder / file, file) for file in files])
        siblings = [{"rfilename": file} for file in files]
        return self.answer(200, {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings, "private": False})

    def commit(self, folder: Path, sent: bytes, address: str) -> None:
        for line in sent.decode().splitlines():
            step = json.loads(line)
            value = step["value"]
            if step["key"] == "file":
                (folder / value["path"]).parent.mkdir(parents=True, exist_ok=True)
                (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif step["key"] == "deletedFile":
                (folder / value["path"]).unlink()
        self.answer(200, {"commitUrl": address, "commitOid": COMMIT, "success": True})

    def entry(self, file: Path, name: str) -> dict:
        return {"type": "file", "path": name, "size": file.stat().st_size, "oid": self.etag(file)}

    def etag(self, file: Path) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()

    def resolve(self, path: str) -> None:
        owner, name, _, _, *rest = path.strip("/").split("/")
        file = self.server.root / owner / name / "/".join(rest)
        if not file.is_file():
            return self.answer(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
        self.answer(200, file.read_bytes(), {"ETag": f'"{self.etag(file)}"', "X-Repo-Commit": COMMIT})


@contextmanager
def serving(root: Path) -> Iterator[FolderHub]:
    """A hub of a folder, until the block ends."""
    hub = FolderHub(root)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


@pytest.fixture
def folder_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FolderHub]:
    """A hub in a temporary folder, which huggingface_hub of this process takes for huggingface.co."""
    from huggingface_hub import constants

    with serving(tmp_path / "hub") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        yield hub
