"""A small server with the protocol of the Hugging Face hub, for one model repository."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Hub:
    """Serve the files of `folder` as the main branch of `name`. `conversion`: a folder with the converter's pull request."""

    def __init__(self, name: str, folder: Path, conversion: Path | None = None, author: str = "SFconvertbot") -> None:
        self.name, self.author, self.status = name, author, 0
        self.token, self.cut = "", ""  # the only valid token, if not empty; a file whose content is cut in the middle
        self.requests: list[str] = []
        self.commits = {"main": ("a" * 40, folder)}
        if conversion:
            self.commits["refs/pr/1"] = ("b" * 40, conversion)

    def answer(self, path: str, authorization: str = "") -> tuple[int, bytes, dict[str, str]]:
        """Return the status, content and headers for a path."""
        self.requests.append(path)
        if self.token and authorization != f"Bearer {self.token}":
            return 401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"}
        path = path.partition("?")[0].replace("%2F", "/")
        if self.status:
            return self.status, b"{}", {}
        if not path.removeprefix("/api/models").startswith(f"/{self.name}"):
            return 401, b"{}", {"X-Error-Code": "RepoNotFound"}
        kind, _, rest = path.removeprefix("/api/models").removeprefix(f"/{self.name}").lstrip("/").partition("/")
        if kind == "resolve":
            commit, _, file = rest.partition("/")
            place = self.folder(commit) / file
            if not place.is_file():
                return 404, b"{}", {"X-Error-Code": "EntryNotFound"}
            content = place.read_bytes()
            return 200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
        if kind == "discussions":
            return 200, json.dumps(self.discussions()).encode(), {}
        if kind == "commits":
            return 200, json.dumps(self.history(rest)).encode(), {}
        revision = rest if kind == "revision" else "main"
        commits = dict(self.commits.values())
        sha, folder = self.commits.get(revision, (revision, commits.get(revision)))
        if folder is None:
            return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
        if kind == "tree":
            sha = self.commits.get(rest, (rest,))[0]
            files = sorted(self.folder(sha).iterdir())
            tree = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0"} for file in files]
            return 200, json.dumps(tree).encode(), {}
        names = [{"rfilename": file.name, "size": file.stat().st_size} for file in sorted(folder.iterdir())]
        return 200, json.dumps({"id": self.name, "sha": sha, "siblings": names, "private": False}).encode(), {}

    def folder(self, commit: str) -> Path:
        return next((folder for sha, folder in self.commits.values() if sha == commit), Path("/nowhere"))

    def discussions(self) -> dict[str, Any]:
        request = {
            "num": 1, "author": {"name": self.author}, "title": "Adding `safetensors` variant of this model", "status": "open",
            "isPullRequest": True, "createdAt": "2024-01-01T00:00:00.000Z", "repo": {"name": self.name, "type": "model"},
        }  # fmt: skip
        return {"discussions": [request] * (len(self.commits) > 1), "count": len(self.commits) - 1, "start": 0}

    def history(self, revision: str) -> list[dict[str, Any]]:
        commits = ["b" * 40, "a" * 40] if revision == "refs/pr/1" else ["a" * 40]
        return [
            {"id": sha, "authors": [], "date": "2024-01-01T00:00:00.000Z", "title": "", "message": "", "formatted": {}}
            for sha in commits
        ]


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """Serve a hub in a thread. Yield its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, with_content: bool) -> None:
            status, content, headers = hub.answer(self.path, self.headers.get("Authorization", ""))
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            if with_content and hub.cut and self.path.endswith(hub.cut):
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
            elif with_content:
                self.wfile.write(content)

        def do_GET(self) -> None:
            self.reply(True)

        def do_HEAD(self) -> None:
            self.reply(False)

        def do_POST(self) -> None:
            hub.requests.append(f"POST {self.path}")
            self.send_error(500)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
