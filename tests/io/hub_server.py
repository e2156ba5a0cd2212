"""A local Hugging Face Hub with the endpoints that huggingface_hub uses; it records all requests."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

Files = dict[str, bytes]


class Hub:
    """Repositories of this hub: {"org/name": {commit: files}}, the last commit being `main`.

    Attributes:
      gated: repositories that only `token` may read.
      asked: (method, path) of each request.
      fetched: the files whose contents were asked for.
      private: repositories that were created as private.
      stored: large files that were uploaded, by their SHA-256; a commit names them.
      puts: how many large files were sent.
      failures: statuses of the next answers to requests, by the end of their path.
      tokens: the Authorization of requests that write.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Files]] = {}
        self.tags: dict[tuple[str, str], str] = {}
        self.gated: set[str] = set()
        self.token = "hf_secret"
        self.asked: list[tuple[str, str]] = []
        self.url = ""
        self.private: set[str] = set()
        self.stored: dict[str, bytes] = {}
        self.puts = 0
        self.failures: dict[str, list[int]] = {}
        self.tokens: set[str | None] = set()

    def push(self, repo: str, files: Files, tag: str | None = None) -> str:
        """Adds a commit; returns its hash."""
        commits = self.repos.setdefault(repo, {})
        commit = hashlib.sha1(f"{repo}{len(commits)}".encode()).hexdigest()
        commits[commit] = files
        if tag:
            self.tags[repo, tag] = commit
        return commit

    def push_folder(self, repo: str, folder: Path, tag: str | None = None, **more: bytes) -> str:
        """Adds a commit of a folder's files; returns its hash."""
        files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return self.push(repo, files | more, tag)

    @property
    def fetched(self) -> list[str]:
        return sorted(path.split("/", 5)[5] for method, path in self.asked if method == "GET" and "/resolve/" in path)

    def failure(self, path: str) -> int | None:
        """The status with which a request fails, if it is to fail; each is used once."""
        for end, statuses in self.failures.items():
            if path.endswith(end) and statuses:
                return statuses.pop(0)
        return None

    def commit(self, repo: str, revision: str) -> str | None:
        commits = self.repos[repo]
        if revision == "main":
            return list(commits)[-1]
        return revision if revision in commits else self.tags.get((repo, revision))


class _Refused(Exception):
    def __init__(self, status: int, code: str):
        self.status, self.code = status, code


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers requests to `hub`, which a subclass sets."""

    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_POST(self) -> None:
        self._write()

    def do_PUT(self) -> None:
        self._write()

    def _write(self) -> None:
        """Answers requests that write: creation, the plan of an upload, large files and the commit."""
        path, sent = unquote(urlsplit(self.path).path), self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.asked.append((self.command, path))
        status = self.hub.failure(path)
        if self.command == "POST" and not path.startswith("/api/validate-yaml"):
            self.hub.tokens.add(self.headers.get("Authorization"))
        found: Any = {"error": "refused"}
        if status is None:
            status, found = 200, self._written(path, sent)
        body = json.dumps(found).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _written(self, path: str, sent: bytes) -> Any:
        hub, parts = self.hub, path.strip("/").split("/")
        if parts[0] == "lfs":
            assert hashlib.sha256(sent).hexdigest() == parts[1]
            hub.stored[parts[1]], hub.puts = sent, hub.puts + 1
            return {}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(sent)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo not in hub.repos:
                hub.push(repo, {".gitattributes": b""})
                hub.private |= {repo} if asked.get("private") or asked.get("visibility") == "private" else set()
            return {"url": f"{hub.url}/{repo}", "name": repo, "id": repo}
        if path.endswith("objects/batch"):
            return {"transfer": "basic", "objects": [self._planned(each) for each in json.loads(sent)["objects"]]}
        repo = "/".join(parts[2:4])
        if parts[4] == "preupload":
            large = (".safetensors", ".gguf")
            modes = [(each["path"], each["path"].endswith(large)) for each in json.loads(sent)["files"]]
            return {
                "files": [
                    {"path": name, "uploadMode": "lfs" if big else "regular", "shouldIgnore": False, "oid": None}
                    for name, big in modes
                ]
            }
        assert parts[4] == "commit", parts
        files = dict(hub.repos[repo][hub.commit(repo, "main") or ""])
        for line in map(json.loads, sent.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.stored[value["oid"]]
        commit = hub.push(repo, files)
        return {"commitOid": commit, "commitUrl": f"{hub.url}/{repo}/commit/{commit}", "success": True}

    def _planned(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The Git LFS plan of a large file; none for one that is stored."""
        upload = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}
        return asked | ({} if asked["oid"] in self.hub.stored else {"actions": upload})

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        try:
            body, headers = self._found(path.strip("/").split("/"))
            status = 200
        except _Refused as refused:
            body, headers, status = b"{}", {"X-Error-Code": refused.code}, refused.status
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _found(self, parts: list[str]) -> tuple[bytes, dict[str, str]]:
        of_api = parts[:2] == ["api", "models"]
        repo, *rest = self._repo(parts[2:] if of_api else parts)
        if of_api:
            return json.dumps(self._described(repo, rest)).encode(), {"Content-Type": "application/json"}
        kind, revision, *file = rest
        assert kind == "resolve", parts
        commit = self._commit(repo, revision)
        if (name := "/".join(file)) not in self.hub.repos[repo][commit]:
            raise _Refused(404, "EntryNotFound")
        body = self.hub.repos[repo][commit][name]
        return body, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": commit}

    def _repo(self, parts: list[str]) -> list[str]:
        repo = "/".join(parts[:2])
        if repo not in self.hub.repos:
            raise _Refused(401, "RepoNotFound")  # as the Hub says it to those it does not know
        if repo in self.hub.gated and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            raise _Refused(401, "GatedRepo")
        return [repo, *parts[2:]]

    def _commit(self, repo: str, revision: str) -> str:
        commit = self.hub.commit(repo, revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound")
        return commit

    def _described(self, repo: str, rest: list[str]) -> Any:
        commit = self._commit(repo, rest[1] if rest else "main")
        files = self.hub.repos[repo][commit]
        if rest[:1] == ["tree"]:
            return [
                {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for name, body in files.items()
            ]
        return {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}


@contextlib.contextmanager
def running(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """An empty hub that huggingface_hub uses instead of the real one, with an empty cache."""
    hub = Hub()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub})) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_port}"
        # huggingface_hub reads the environment once, when it is imported.
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_PROGRESS_BARS": True,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
