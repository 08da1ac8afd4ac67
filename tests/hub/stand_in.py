"""A stand-in for the hub on loopback: the requests that huggingface_hub 2.4 makes, a log of them, and faults by a script.

Repositories live in memory. Large and binary files are "LFS": their address redirects to a second one, as on the hub.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from finetune.hub import commits

_LFS = (".safetensors", ".bin", ".pt", ".parquet")
_LFS_BYTES = 1 << 20
_REPOSITORY = r"([\w.-]+/[\w.-]+)"


@dataclass
class Repository:
    """Commits as `{name: content}` under their hash, and what branches stand for."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        name = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[name] = dict(files)
        self.refs[branch] = name
        return name


@dataclass
class Fault:
    """What goes wrong at requests whose path holds `match`; `times` counts down, and `method` limits it to one."""

    match: str
    do: str  # status, cut, hang, refuse, wrong
    code: int = 500
    error: str = ""
    message: str = ""
    method: str = ""
    times: int = 1000
    body: bytes = b""


@dataclass
class Request:
    """A line of the log."""

    method: str
    path: str
    token: str | None


class StandIn:
    """The server with its repositories, its log and its faults."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.created: list[dict[str, Any]] = []
        self.uploaded: dict[str, bytes] = {}
        self.closing = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes], kind: str = "models") -> str:
        """Add a commit to a repository, and return its hash."""
        return self.repositories.setdefault((kind, name), Repository()).commit(files)

    def add_folder(self, name: str, folder: Path, **more: bytes) -> str:
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return self.add(name, {**files, **more})

    def forget(self) -> None:
        """Let this process be as one that has just begun."""
        commits._known.clear()
        self.log.clear()

    def list_fetched(self) -> set[str]:
        """Return the names of the files whose content was asked for."""
        found = (
            re.search(r"/(?:resolve|cdn/[^?]*?)/[0-9a-f]{40}/([^?]+)", one.path)
            for one in self.log
            if one.method == "GET"
        )
        return {unquote(match[1]) for match in found if match}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandIn

    def log_message(self, *words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.token = (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
        self.hub.log.append(Request(self.command, self.path, self.token))
        self.fault = next(
            (f for f in self.hub.faults if f.times > 0 and f.match in self.path and f.method in ("", self.command)),
            None,
        )
        try:
            if self.fault is None or self._play(self.fault):
                self._route(unquote(urlsplit(self.path).path), parse_qs(urlsplit(self.path).query))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _play(self, fault: Fault) -> bool:
        """Do what a fault says; return whether the request is answered nevertheless."""
        fault.times -= 1
        if fault.do == "status":
            self._send(
                fault.code,
                fault.body or {"error": fault.message or "no"},
                *self._name_error(fault.error, fault.message),
            )
        elif fault.do == "hang":
            self.hub.closing.wait(60)
            self._drop()
        elif fault.do == "refuse":
            self._drop()
        return fault.do in ("cut", "wrong")

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _name_error(self, code: str, message: str = "") -> list[tuple[str, str]]:
        return [(name, value) for name, value in (("X-Error-Code", code), ("X-Error-Message", message)) if value]

    def _refuse(self, status: int, code: str, message: str = "") -> None:
        self._send(status, {"error": message or code}, *self._name_error(code, message))

    def _send(self, status: int, body: Any, *headers: tuple[str, str]) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _route(self, path: str, query: dict[str, list[str]]) -> None:
        for pattern, answer in _ROUTES:
            if match := re.fullmatch(pattern, path):
                answer(self, *match.groups(), **({"query": query} if answer is _Handler.tree else {}))
                return
        self._refuse(404, "", f"the stand-in knows no {path}")

    def find(self, kind: str, name: str, revision: str) -> tuple[Repository, str] | None:
        """Return a repository and its commit, or send what the hub says instead."""
        repository = self.hub.repositories.get((kind, name))
        if repository is None or (repository.private and self.token not in repository.tokens):
            self._refuse(401 if self.token is None else 404, "RepoNotFound", "Repository not found")
            return None
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, commit

    def whoami(self) -> None:
        self._send(200, {"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def info(self, kind: str, name: str, revision: str | None) -> None:
        if found := self.find(kind, name, revision or "main"):
            files = found[0].commits[found[1]]
            self._send(
                200,
                {
                    "_id": "0",
                    "id": name,
                    "sha": found[1],
                    "private": found[0].private,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                    "siblings": [{"rfilename": file, "size": len(content)} for file, content in files.items()],
                },
            )

    def tree(self, kind: str, name: str, revision: str, under: str | None, query: dict[str, list[str]]) -> None:
        if found := self.find(kind, name, revision):
            files = found[0].commits[found[1]]
            inside = {file: content for file, content in files.items() if file.startswith(under or "")}
            self._send(200, [_describe(file, content) for file, content in inside.items()])

    def paths(self, kind: str, name: str, revision: str) -> None:
        if found := self.find(kind, name, revision):
            files = found[0].commits[found[1]]
            try:
                asked = json.loads(self.body)["paths"]
            except ValueError:
                asked = parse_qs(self.body.decode()).get("paths", [])
            self._send(200, [_describe(file, files[file]) for file in asked if file in files])

    def resolve(self, kind: str | None, name: str, revision: str, file: str) -> None:
        kind = "datasets" if kind else "models"
        found = self.find(kind, name, revision)
        if found is None:
            return
        repository, commit = found
        if repository.gated and self.token not in repository.tokens:
            self._refuse(401 if self.token is None else 403, "GatedRepo", "Access to the model is restricted.")
            return
        content = repository.commits[commit].get(file)
        if content is None:
            self._send(404, {}, ("X-Error-Code", "EntryNotFound"), ("X-Repo-Commit", commit))
        elif _is_lfs(file, content):
            target = f"{self.hub.url}/cdn/{kind}/{name}/{commit}/{file}"
            etag = hashlib.sha256(content).hexdigest()
            self._send(
                302,
                b"",
                ("Location", target),
                ("X-Repo-Commit", commit),
                ("X-Linked-Size", str(len(content))),
                ("X-Linked-ETag", f'"{etag}"'),
            )
        else:
            self._send_file(content, commit, _hash_as_git(content))

    def cdn(self, kind: str, name: str, commit: str, file: str) -> None:
        content = self.hub.repositories[kind, name].commits[commit][file]
        self._send_file(content, commit, hashlib.sha256(content).hexdigest())

    def _send_file(self, content: bytes, commit: str, etag: str) -> None:
        start = 0
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("range") or ""):
            start = int(asked[1])
        part = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(part)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is not None and self.fault.do == "wrong":
            part = part[:-1] + bytes([part[-1] ^ 1])
        if self.fault is not None and self.fault.do == "cut":
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            self._drop()
            return
        self.wfile.write(part)

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if ("models", name) in self.hub.repositories:
            self._send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            return
        self.hub.created.append(asked)
        private = asked.get("private", asked.get("visibility") == "private")
        repository = self.hub.repositories[("models", name)] = Repository(private=private, tokens=(self.token or "",))
        repository.commit({".gitattributes": b""})
        self._send(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def check_card(self) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def preupload(self, kind: str, name: str, revision: str) -> None:
        files = json.loads(self.body)["files"]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(_LFS) or file["size"] > _LFS_BYTES else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in files
        ]
        self._send(200, {"files": modes})

    def batch(self, name: str) -> None:
        objects = json.loads(self.body)["objects"]
        answers: list[dict[str, Any]] = []
        for one in objects:
            target = {"upload": {"href": f"{self.hub.url}/put/{one['oid']}"}}
            answers.append({**one, **({} if one["oid"] in self.hub.uploaded else {"actions": target})})
        self._send(200, {"transfer": "basic", "objects": answers})

    def put(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.uploaded[oid] = self.body
        self._send(200, {})

    def commit(self, kind: str, name: str, revision: str) -> None:
        repository = self.hub.repositories[kind, name]
        files = dict(repository.commits[repository.refs["main"]])
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploaded[value["oid"]]
        made = repository.commit(files)
        self._send(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{made}", "commitOid": made, "success": True})


_ROUTES = (
    (r"/api/whoami-v2", _Handler.whoami),
    (r"/api/repos/create", _Handler.create),
    (r"/api/validate-yaml", _Handler.check_card),
    (rf"/api/(models|datasets)/{_REPOSITORY}/preupload/(.+)", _Handler.preupload),
    (rf"/api/(models|datasets)/{_REPOSITORY}/commit/(.+)", _Handler.commit),
    (rf"/api/(models|datasets)/{_REPOSITORY}/paths-info/([^/]+)", _Handler.paths),
    (rf"/api/(models|datasets)/{_REPOSITORY}/tree/([^/]+)(?:/(.*))?", _Handler.tree),
    (rf"/api/(models|datasets)/{_REPOSITORY}(?:/revision/(.+))?", _Handler.info),
    (rf"/{_REPOSITORY}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"/put/([0-9a-f]+)", _Handler.put),
    (rf"/cdn/(models|datasets)/{_REPOSITORY}/([0-9a-f]{{40}})/(.+)", _Handler.cdn),
    (rf"/(datasets/)?{_REPOSITORY}/resolve/([^/]+)/(.+)", _Handler.resolve),
)


def _is_lfs(name: str, content: bytes) -> bool:
    return len(content) > _LFS_BYTES or name.endswith(_LFS)


def _hash_as_git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _describe(name: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": name, "size": len(content), "oid": _hash_as_git(content)}
    if _is_lfs(name, content):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 135}
    return entry
