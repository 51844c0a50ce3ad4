"""A loopback Hub: as much of the Hub's protocol as the clients `huggingface_hub` and `datasets` speak over HF_ENDPOINT.

Two servers on 127.0.0.1: the Hub, and the host of large files that it sends the clients to. Repositories are folders.
Small files lie behind a relative redirect and are named by their git blob, large ones behind an absolute redirect to
the other host and are named by their sha256, as the Hub does; ranges are answered. A gated repository tells its list of
files to everybody and gives no file. Nothing is said of Xet.
"""

from __future__ import annotations

import functools
import hashlib
import http
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

KINDS = ("models", "datasets")
LARGE = (".safetensors", ".parquet", ".bin")
API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
    r"(?:/(?P<verb>revision|tree|paths-info|refs|auth-check)(?:/(?P<revision>[^/]+))?(?:/(?P<path>.*))?)?"
)
RESOLVE = re.compile(r"/(?:(?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
SMALL = re.compile(
    r"/api/resolve-cache/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)/(?P<revision>[^/]+)/(?P<path>.+)"
)
BLOCK = 1 << 20  # bytes sent at once


@dataclass(frozen=True)
class File:
    """One file of a repository: where it lies, and what names its content."""

    path: Path
    size: int
    blob: str  # git's name of the content: sha1
    sha256: str  # of a large file, else ""

    @property
    def etag(self) -> str:
        return self.sha256 or self.blob


@functools.cache
def file_of(path: Path) -> File:
    """A file's facts; its content must not change while a Hub serves it."""
    size = path.stat().st_size
    if path.suffix in LARGE:
        with path.open("rb") as stream:
            return File(path, size, "0" * 40, hashlib.file_digest(stream, "sha256").hexdigest())
    return File(path, size, hashlib.sha1(b"blob %d\0" % size + path.read_bytes()).hexdigest(), "")


@dataclass
class Repository:
    """Folders by commit (40 hex digits), and the branches that name commits."""

    commits: dict[str, Path]
    branches: dict[str, str]
    gated: bool = False

    @classmethod
    def of(cls, folder: Path, commit: str = "c0" * 20, *, gated: bool = False) -> Repository:
        """One commit on `main`."""
        return cls({commit: folder}, {"main": commit}, gated)

    def commit(self, revision: str) -> str:
        """The commit that a branch or commit names, '' where there is none."""
        found = self.branches.get(revision, revision)
        return found if found in self.commits else ""

    def files(self, commit: str) -> dict[str, File]:
        """Every file of a commit by its name."""
        folder = self.commits[commit]
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): file_of(path) for path in paths}


@dataclass
class Cut:
    """A file whose transfer breaks off behind so many bytes of it, so many times."""

    after: int
    times: int = 1


@dataclass
class Hub:
    """What is served, what was asked for, and what goes wrong."""

    repositories: dict[str, dict[str, Repository]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    moved: dict[str, str] = field(default_factory=dict)  # old name of a model -> its name
    cuts: dict[str, Cut] = field(default_factory=dict)  # by file name
    failing: dict[str, int] = field(default_factory=dict)  # a word of a path -> status answered; 0: no answer at all
    token_error: str = ""  # the message that goes with a planned 401
    asked: list[str] = field(default_factory=list)  # 'GET /api/models/...', with ' bytes=5-' where a range was
    url: str = ""
    store: str = ""  # of the other host

    def client(self, home: Path) -> dict[str, str]:
        """The environment of a process that asks this Hub and no other, and keeps what it fetches under `home`."""
        kept = {name: text for name, text in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**kept, **own, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def large(self, sha256: str) -> File | None:
        """The large file of that content."""
        repositories = (one for kind in KINDS for one in self.repositories[kind].values())
        files = (file for one in repositories for commit in one.commits for file in one.files(commit).values())
        return next((file for file in files if file.sha256 == sha256), None)


class Handler(BaseHTTPRequestHandler):
    """Answers of the Hub."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are kept in `Hub.asked`, not printed."""

    def answer(self) -> None:
        """Any request: planned failures first, then what the path names."""
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        asked, span = unquote(self.path), self.headers.get("Range")
        self.hub.asked.append(f"{self.command} {asked}{f' {span}' if span else ''}")
        for word, status in self.hub.failing.items():
            if word in asked:
                self.close_connection = True
                if status:
                    self.refuse(status, "", {"X-Error-Message": self.hub.token_error})
                return
        self.route(urlsplit(asked).path)

    do_GET = do_HEAD = do_POST = answer

    def route(self, path: str) -> None:
        for old, new in self.hub.moved.items():
            for before in (f"/api/models/{old}", f"/{old}/resolve"):
                if path == before or path.startswith(f"{before}/"):
                    return self.redirect(http.HTTPStatus.TEMPORARY_REDIRECT, path.replace(old, new, 1))
        for pattern, act in ((SMALL, self.small), (API, self.api), (RESOLVE, self.resolve)):
            if match := pattern.fullmatch(path):
                asked = match.groupdict()
                kind = asked["kind"] or "models"
                repository = self.hub.repositories[kind].get(asked["name"])
                if repository is None:
                    return self.refuse(404, "RepoNotFound")
                commit = repository.commit(asked["revision"] or "main")
                if not commit:
                    return self.refuse(404, "RevisionNotFound")
                return act(kind, asked["name"], repository, commit, asked)
        self.refuse(404, "")

    def api(self, kind: str, name: str, repository: Repository, commit: str, asked: Mapping[str, Any]) -> None:
        """What a repository is, and lists of its files."""
        files = repository.files(commit)
        match asked["verb"]:
            case "tree":
                under = f"{asked['path']}/" if asked["path"] else ""
                inside = {name: file for name, file in files.items() if name.startswith(under)}
                if under and not inside:
                    return self.refuse(404, "EntryNotFound")
                deep = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() in ("true", "1")
                self.tell(listed(inside, under, deep=deep))
            case "paths-info":
                wanted = self.wanted()
                found = [entry for entry in listed(files, "", deep=True) if entry["path"] in wanted]
                self.tell(found)
            case "auth-check" if repository.gated:
                self.refuse(401, "GatedRepo")
            case "refs":
                branches = [
                    {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": target}
                    for branch, target in repository.branches.items()
                ]
                self.tell({"branches": branches, "tags": [], "converts": []})
            case _:
                self.tell(
                    {
                        "_id": "0",
                        "id": name,
                        "sha": commit,
                        "private": False,
                        "gated": "manual" if repository.gated else False,
                        "disabled": False,
                        "tags": [],
                        "downloads": 0,
                        "likes": 0,
                        "siblings": [{"rfilename": file} for file in files],
                    }
                )

    def wanted(self) -> list[str]:
        """The paths that a request's form or JSON names."""
        if "json" in self.headers.get("Content-Type", ""):
            return list(json.loads(self.body)["paths"])
        return parse_qs(self.body.decode()).get("paths", [])

    def resolve(self, kind: str, name: str, repository: Repository, commit: str, asked: Mapping[str, Any]) -> None:
        """Where a file lies."""
        if repository.gated:
            return self.refuse(401, "GatedRepo")
        file = repository.files(commit).get(asked["path"])
        if file is None:
            return self.refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        facts = {"X-Repo-Commit": commit, "ETag": f'"{file.etag}"'}
        if not file.sha256:
            place = f"/api/resolve-cache/{kind}/{name}/{commit}/{asked['path']}"
            return self.redirect(http.HTTPStatus.TEMPORARY_REDIRECT, place, facts)
        facts |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        self.redirect(http.HTTPStatus.FOUND, f"{self.hub.store}/{file.sha256}?signature=made-up", facts)

    def small(self, kind: str, name: str, repository: Repository, commit: str, asked: Mapping[str, Any]) -> None:
        """A small file itself."""
        file = repository.files(commit).get(asked["path"])
        if file is None or repository.gated:
            return self.refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        self.send_file(file, {"X-Repo-Commit": commit})

    def send_file(self, file: File, facts: Mapping[str, str]) -> None:
        """A file or the range of it that is asked for; the connection is dropped where a cut is planned."""
        start, end = 0, file.size
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span:
            start, end = int(span[1]), min(int(span[2] or file.size - 1) + 1, file.size)
        if start > end or (span and start == file.size):
            return self.refuse(416, "", {"Content-Range": f"bytes */{file.size}"})
        self.send_response(206 if span else 200)
        facts = {**facts, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes", "Content-Length": str(end - start)}
        if span:
            facts["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
        self.end(facts)
        if self.command == "HEAD":
            return
        cut = self.hub.cuts.get(file.path.name)
        if cut is not None and cut.times and cut.after < end:
            cut.times, end, self.close_connection = cut.times - 1, max(start, cut.after), True
        with file.path.open("rb") as stream:
            stream.seek(start)
            while (left := end - stream.tell()) > 0:
                self.wfile.write(stream.read(min(BLOCK, left)))

    def tell(self, answer: Any) -> None:
        """An answer in JSON."""
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.end({"Content-Type": "application/json", "Content-Length": str(len(data))})
        if self.command != "HEAD":
            self.wfile.write(data)

    def redirect(self, status: http.HTTPStatus, place: str, facts: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        self.end({"Location": place, "Content-Length": "0", **(facts or {})})

    def refuse(self, status: int, code: str, facts: Mapping[str, str] | None = None) -> None:
        """A refusal as the Hub words it."""
        self.send_response(status)
        self.end({"X-Error-Code": code, "X-Error-Message": code, "Content-Length": "0", **(facts or {})})

    def end(self, facts: Mapping[str, str]) -> None:
        for key, value in facts.items():
            if value:
                self.send_header(key, value)
        self.end_headers()


class StoreHandler(Handler):
    """Answers of the host of large files."""

    def route(self, path: str) -> None:
        file = self.hub.large(path.strip("/"))
        if file is None:
            return self.refuse(404, "")
        self.send_file(file, {})


def listed(files: Mapping[str, File], under: str, *, deep: bool) -> list[dict[str, Any]]:
    """Entries of a tree: files, and the folders between, those below a folder only where `deep`."""
    folders: dict[str, dict[str, Any]] = {}
    found: list[dict[str, Any]] = []
    for name, file in files.items():
        parts = name.removeprefix(under).split("/")
        for depth in range(1, len(parts) if deep else min(len(parts), 2)):
            folder = under + "/".join(parts[:depth])
            folders[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
        if deep or len(parts) == 1:
            entry = {"type": "file", "path": name, "oid": file.blob, "size": file.size}
            if file.sha256:
                entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
            found.append(entry)
    return [*folders.values(), *found]


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub without repositories, while the block lasts."""
    hub = Hub()
    servers = []
    for base in (Handler, StoreHandler):
        handler = type(base.__name__, (base,), {"hub": hub})
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
    hub.url, hub.store = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()
