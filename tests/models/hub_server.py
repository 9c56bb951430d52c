"""A hub on this machine: the few addresses that huggingface_hub asks, over repositories that are folders."""

import json
import threading
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """Serves ``root/OWNER/NAME/…`` at the commit that ``commits`` says.

    Attributes:
        asked: every path that was asked for.
        served_instead: name of a file → the bytes that are sent in its place, while the listing stays as it is.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.commits = root, dict[str, str]()
        self.asked: list[str] = []
        self.served_instead: dict[str, bytes] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._listing("/".join(parts[2:4]), parts[5] if parts[4:5] == ["revision"] else None, body)
        elif parts[2:3] == ["resolve"]:
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body)
        else:
            self._send(404, b"", body, {})

    def _listing(self, repository: str, revision: str | None, body: bool) -> None:
        commit = self.server.commits.get(repository)
        if commit is None:
            self._send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        elif revision not in (None, commit):
            self._send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        else:
            folder = self.server.root / repository
            siblings = [_listed(path, folder) for path in sorted(folder.rglob("*")) if path.is_file()]
            content = {"id": repository, "sha": commit, "siblings": siblings}
            self._send(200, json.dumps(content).encode(), body, {"Content-Type": "application/json"})

    def _file(self, repository: str, revision: str, name: str, body: bool) -> None:
        path = self.server.root / repository / name
        if self.server.commits.get(repository) != revision or not path.is_file():
            self._send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
            return
        content = self.server.served_instead.get(name, path.read_bytes())
        self._send(200, content, body, {"ETag": f'"{sha256(content).hexdigest()}"', "X-Repo-Commit": revision})

    def _send(self, status: int, content: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


def _listed(path: Path, folder: Path) -> dict[str, object]:
    """A file as the hub lists it: large ones by their SHA-256, small ones by git's name of them."""
    content = path.read_bytes()
    blob = sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"rfilename": path.relative_to(folder).as_posix(), "size": len(content), "blobId": blob}
    if path.suffix in (".safetensors", ".bin"):
        entry["lfs"] = {"sha256": sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry
