"""A model hub on this machine: the answers that `huggingface_hub` asks for, over real HTTP."""

import base64
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from evomerge.sources.hub import hub_model, small_files, snapshot

TOKEN = "hf_secret"


def forget() -> None:
    """Forget what the hub has answered, as a new process would."""
    for known in (snapshot, hub_model, small_files):
        known.cache_clear()


class Hub:
    """Repositories by name, each a list of commits, the newest last; a commit is file -> content.

    asked: the paths of all requests.
    sent: file name -> how many bytes of it have been downloaded.
    objects: what was uploaded as large files, by SHA-256.
    received: bytes that were uploaded as large files.
    broken: whether commits are refused, as if the connection broke before the last step of an upload.
    private: repositories that were made so.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.asked: list[str] = []
        self.sent: Counter[str] = Counter()
        self.objects: dict[str, bytes] = {}
        self.received = 0
        self.broken = False
        self.private: set[str] = set()

    def push(self, repository: str, folder: Path) -> str:
        """A new commit on `main`; its name."""
        return self.add(repository, {f.name: f.read_bytes() for f in sorted(folder.iterdir())})

    def add(self, repository: str, files: dict[str, bytes]) -> str:
        commits = self.commits.setdefault(repository, {})
        commit = hashlib.sha1(f"{repository} {len(commits)}".encode()).hexdigest()
        commits[commit] = files
        return commit

    def commit(self, repository: str, revision: str) -> str:
        commits = self.commits[repository]
        return list(commits)[-1] if revision == "main" else revision

    def newest(self, repository: str) -> dict[str, bytes]:
        return self.commits[repository][self.commit(repository, "main")]


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *details: object) -> None:
        self.hub = hub
        super().__init__(*details)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.hub.asked.append(self.path)
        parts = self.path.partition("?")[0].strip("/").split("/")
        try:
            if parts[:2] == ["api", "models"]:
                self.answer_json(self.information(*parts[2:]))
            else:
                self.answer_file("/".join(parts[:2]), parts[3], parts[4])
        except (KeyError, IndexError):
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def information(self, owner: str, name: str, kind: str = "revision", revision: str = "main", *rest: str) -> object:
        """What the hub says of a commit, or the files in it."""
        repository = f"{owner}/{name}"
        commit = self.hub.commit(repository, revision)
        files = self.hub.commits[repository][commit]
        if kind == "tree":
            return [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
        siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
        return {"id": repository, "sha": commit, "siblings": siblings}

    def answer_file(self, repository: str, revision: str, name: str) -> None:
        commit = self.hub.commit(repository, revision)
        body = self.hub.commits[repository][commit][name]
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        status = 200
        if given := self.headers.get("Range"):
            first, _, last = given.removeprefix("bytes=").partition("-")
            headers["Content-Range"] = f"bytes {first}-{last or len(body) - 1}/{len(body)}"
            status, body = 206, body[int(first) : int(last) + 1 if last else None]
        self.hub.sent[name] += len(body) if self.command == "GET" else 0
        self.answer(status, body, headers)

    def do_POST(self) -> None:
        self.hub.asked.append(self.path)
        body = (
            self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else self.chunks()
        )
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, b"", {})
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts == ["api", "validate-yaml"]:
            self.answer_json({"errors": [], "warnings": []})
        elif parts == ["api", "repos", "create"]:
            self.create(json.loads(body))
        elif parts[4:5] == ["preupload"]:
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]
            self.answer_json({"files": [f | {"shouldIgnore": False} for f in files]})
        elif parts[-1] == "batch":
            self.answer_json({"objects": [self.wanted(o["oid"], o["size"]) for o in json.loads(body)["objects"]]})
        elif parts[4:5] == ["commit"]:
            self.make_commit("/".join(parts[2:4]), [json.loads(line) for line in body.splitlines()])
        else:
            self.answer(404, b"", {})
        return None

    def create(self, asked: dict[str, str]) -> None:
        repository = f"{asked['organization']}/{asked['name']}"
        if repository in self.hub.commits:
            self.answer_json({"error": "exists", "url": f"{constants.ENDPOINT}/{repository}"}, 409)
            return
        if asked.get("visibility") == "private" or asked.get("private"):
            self.hub.private.add(repository)
        self.hub.add(repository, {".gitattributes": b""})
        self.answer_json({"url": f"{constants.ENDPOINT}/{repository}"})

    def wanted(self, oid: str, size: int) -> dict[str, object]:
        """Where a large file is to be put; nowhere if it is there already."""
        upload = {"upload": {"href": f"{constants.ENDPOINT}/objects/{oid}"}}
        return {"oid": oid, "size": size} | ({} if oid in self.hub.objects else {"actions": upload})

    def make_commit(self, repository: str, lines: list[dict[str, dict[str, str]]]) -> None:
        if self.hub.broken:
            self.answer(400, b"", {})
            return None
        files = dict(self.hub.newest(repository))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        commit = self.hub.add(repository, files)
        return self.answer_json(
            {"commitUrl": f"{constants.ENDPOINT}/{repository}/commit/{commit}", "commitOid": commit}
        )

    def do_PUT(self) -> None:
        data = (
            self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else self.chunks()
        )
        self.hub.received += len(data)
        self.hub.objects[hashlib.sha256(data).hexdigest()] = data
        self.answer(200, b"", {})

    def body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def answer_json(self, content: object, status: int = 200) -> None:
        self.answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *details: object) -> None:
        pass


@contextmanager
def running_hub(cache: Path, patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, the only one that this process knows while this lasts, with an empty cache in `cache`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Answer, hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    patch.setenv("NO_PROXY", "127.0.0.1")
    patch.delenv("HF_TOKEN", raising=False)
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "ENDPOINT", address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    huggingface_hub.close_session()
    forget()
    try:
        yield hub
    finally:
        huggingface_hub.close_session()
        forget()
        server.shutdown()
        server.server_close()
