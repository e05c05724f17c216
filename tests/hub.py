"""A model hub on this machine: the few answers that `huggingface_hub` asks for, over real HTTP."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from evomerge.sources.locate import snapshot


class Hub:
    """Repositories by name, each a list of commits, the newest last; a commit is a folder.

    asked: the paths of all requests.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Path]] = {}
        self.asked: list[str] = []

    def push(self, repository: str, folder: Path) -> str:
        """A new commit on `main`; its name."""
        commits = self.commits.setdefault(repository, {})
        commit = hashlib.sha1(f"{repository} {len(commits)}".encode()).hexdigest()
        commits[commit] = folder
        return commit

    def commit(self, repository: str, revision: str) -> str:
        commits = self.commits[repository]
        return list(commits)[-1] if revision == "main" else revision

    def files(self, repository: str, commit: str) -> dict[str, bytes]:
        return {f.name: f.read_bytes() for f in sorted(self.commits[repository][commit].iterdir())}


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *details: object) -> None:
        self.hub = hub
        super().__init__(*details)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.hub.asked.append(self.path)
        parts = self.path.partition("?")[0].strip("/").split("/")
        headers: dict[str, str] = {}
        try:
            if parts[:2] == ["api", "models"]:
                repository, kind, revision = "/".join(parts[2:4]), parts[4], parts[5]
                commit = self.hub.commit(repository, revision)
                files = self.hub.files(repository, commit)
                content = {"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                body = json.dumps(content if kind == "revision" else tree).encode()
                headers["Content-Type"] = "application/json"
            else:
                repository, commit, name = "/".join(parts[:2]), self.hub.commit("/".join(parts[:2]), parts[3]), parts[4]
                body = self.hub.files(repository, commit)[name]
                headers |= {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": commit}
        except (KeyError, IndexError):
            self.send_error(404)
            return
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

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
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "ENDPOINT", address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    huggingface_hub.close_session()
    snapshot.cache_clear()
    try:
        yield hub
    finally:
        huggingface_hub.close_session()
        snapshot.cache_clear()
        server.shutdown()
        server.server_close()
