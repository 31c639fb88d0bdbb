"""Published models by name, from a hub played by a local server: what is fetched, what is kept, what is said."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen_jax.errors import FileError, ModelError, UserError
from qwen_jax.weights import hub

huggingface_hub = pytest.importorskip("huggingface_hub")

from huggingface_hub import constants

ROOT = Path(__file__).parents[2]
NAME = "Owner/Tiny-1.5"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_thisIsTheSecret"


def safetensors(**arrays: np.ndarray) -> bytes:
    header, data = {}, b""
    for name, array in arrays.items():
        start, data = len(data), data + array.tobytes()
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


CONFIG = {"config.json": b'{"model_type": "qwen2"}', "tokenizer.json": b"{}", "merges.txt": b"a b\n"}
WEIGHTS = {"model.safetensors": safetensors(a=np.arange(12, dtype=np.float32))}
PICKLES = {"pytorch_model.bin": b"PK weights"}
# What must stay where it is: code, other formats, folders, pickles that are no weights.
OTHERS = {
    "modeling.py": b"raise SystemExit",
    "README.md": b"",
    "training_args.bin": b"PK",
    "original/model.safetensors": b"",
    "original/config.json": b"",
}


@dataclasses.dataclass
class Answer:
    status: int = 200
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""
    length: int | None = None  # says another one than the body's


@dataclasses.dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]


class Server:
    """Answers each request by a function of it, and remembers the requests."""

    def __init__(self, answer: Callable[[Request], Answer]) -> None:
        self.answer = answer
        self.requests: list[Request] = []
        self.released = threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def handle_one(self) -> None:
                request = Request(self.command, urllib.parse.unquote(self.path), dict(self.headers))
                if "agent-harnesses" not in request.path:  # which the library asks on its own account, without a token
                    server.requests.append(request)
                answer = server.answer(request)
                self.send_response(answer.status)
                length = len(answer.body) if answer.length is None else answer.length
                for key, value in {"Content-Length": str(length), **answer.headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body)

            do_GET = do_HEAD = handle_one

            def log_message(self, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,)).start()

    def close(self) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    def tokens(self) -> set[str | None]:
        return {request.headers.get("authorization") for request in self.requests}


class Hub(Server):
    """A hub with one model. `changes` maps the end of a path to what is answered instead."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(self.serve)
        self.files = files
        self.changes: dict[str, Callable[[Request], Answer]] = {}

    def serve(self, request: Request) -> Answer:
        for end, answer in self.changes.items():
            if request.path.partition("?")[0].endswith(end):
                return answer(request)
        return self.usual(request)

    def usual(self, request: Request) -> Answer:
        path = request.path.partition("?")[0]
        resolve = f"/{NAME}/resolve/"
        if path.startswith(resolve):
            revision, _, file = path.removeprefix(resolve).partition("/")
            if revision not in ("main", "v1", COMMIT):
                return Answer(404, {"X-Error-Code": "RevisionNotFound"})
            if file not in self.files:
                return Answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            body = self.files[file]
            return Answer(200, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}, body)
        if path == f"/api/models/{NAME}/tree/{COMMIT}":
            tree = [{"type": "file", "path": p, "size": len(b), "oid": "0" * 40} for p, b in self.files.items()]
            return Answer(200, {"Content-Type": "application/json"}, json.dumps(tree).encode())
        return Answer(404, {"X-Error-Code": "RepoNotFound"})


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a hub with these files, and points huggingface_hub at it."""
    with contextlib.ExitStack() as stack:

        def started(files: dict[str, bytes]) -> Hub:
            server = Hub(files)
            stack.callback(server.close)
            # Read from HF_ENDPOINT when the library is loaded.
            monkeypatch.setattr(constants, "ENDPOINT", server.url)
            template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            return server

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield started
        huggingface_hub.close_session()


@pytest.fixture
def naps(monkeypatch):
    """How long the library would have slept before it tried again."""
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_error(kind: type[UserError], *words: str, reference: str = NAME, allow_pickle_format: bool = False) -> str:
    """Downloading raises an error of one line with these words, and without the token."""
    with pytest.raises(kind) as caught:
        hub.download(reference, allow_pickle_format=allow_pickle_format)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in message and message.isprintable() and TOKEN not in message, message
    for word in words:
        assert word in message, message
    return message


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B", NAME + "@main", "a/b@refs/pr/1", f"a/b@{COMMIT}"])
def test_names(name):
    assert hub.is_name(name)


@pytest.mark.parametrize(
    "reference",
    ["Qwen", "a/b/c", "/a/b", "./a", "../a", "a/..", "a/b@", "a/b@/etc/x", "a/b@../x", "a/b@x/../y", "a/b@x/", "a/b c",
     "a/b\n", "a--b/c", "a/b@x@y", "ä/b", "", "~/b"],
)  # fmt: skip
def test_other_references_are_no_names(reference):
    assert not hub.is_name(reference)


@pytest.mark.parametrize("reference", [NAME, NAME + "@v1", f"{NAME}@{COMMIT}"])
def test_a_model_is_fetched_once(start, monkeypatch, reference):
    server = start({**CONFIG, **WEIGHTS, **OTHERS, **PICKLES})
    folder = hub.download(reference, allow_pickle_format=True)
    assert contents(folder) == {**CONFIG, **WEIGHTS}
    assert folder.name == COMMIT
    bodies = [request.path for request in server.requests if request.method == "GET"]
    assert len(bodies) == 1 + len(CONFIG) + len(WEIGHTS)
    assert hub.download(reference, allow_pickle_format=False) == folder
    assert [request.path for request in server.requests if request.method == "GET"] == bodies
    # and then without the hub
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(server.requests)
    assert hub.download(reference, allow_pickle_format=False) == folder
    assert len(server.requests) == before


def test_the_pickle_format_must_be_asked_for(start):
    server = start({**CONFIG, **PICKLES, **OTHERS})
    check_error(ModelError, NAME, "no weights in safetensors", "--allow-pickle-format")
    assert not any(request.path.endswith(".bin") for request in server.requests)
    assert contents(hub.download(NAME, allow_pickle_format=True)) == {**CONFIG, **PICKLES}


def test_a_cache_that_is_not_complete_is_not_enough(start, monkeypatch):
    server = start({**CONFIG, **WEIGHTS})
    server.changes["model.safetensors"] = lambda _: Answer(403)
    check_error(FileError, "HTTP 403")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check_error(FileError, NAME, "not complete", constants.HF_HUB_CACHE, "HF_HUB_OFFLINE")
    check_error(FileError, "not complete", reference="Owner/Never-Seen")


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_asked_again(start, naps, status):
    server = start({**CONFIG, **WEIGHTS})
    refusals = {"config.json": 3, COMMIT: 2}

    def sometimes(end: str) -> Callable[[Request], Answer]:
        def answer(request: Request) -> Answer:
            refusals[end] -= 1
            return Answer(status) if refusals[end] >= 0 else server.usual(request)

        return answer

    server.changes = {end: sometimes(end) for end in refusals}
    assert contents(hub.download(NAME, allow_pickle_format=False)) == {**CONFIG, **WEIGHTS}
    assert naps and naps == sorted(naps[:2]) + sorted(naps[2:])  # it waits longer and longer


@pytest.mark.parametrize(("end", "status"), [("config.json", 429), (COMMIT, 503), ("model.safetensors", 500)])
def test_a_hub_that_stays_busy_is_left(start, naps, end, status):
    server = start({**CONFIG, **WEIGHTS})
    server.changes[end] = lambda _: Answer(status, {}, f"you sent {TOKEN}\nagain".encode())
    check_error(FileError, NAME, f"HTTP {status}", "later")
    assert sum(naps) < 60


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(401, {"X-Error-Code": "GatedRepo"}), ("gated", "HTTP 401", "licence", "HF_TOKEN")),
        (Answer(403, {"X-Error-Code": "GatedRepo"}), ("gated", "HTTP 403", "licence", "HF_TOKEN")),
        (Answer(401, {"X-Error-Code": "RepoNotFound"}), ("no folder here", "HTTP 401", "private", "HF_TOKEN")),
        (Answer(404, {"X-Error-Code": "RepoNotFound"}), ("no folder here", "HTTP 404", "private", "HF_TOKEN")),
        (Answer(404), ("no folder here", "HTTP 404")),
        (Answer(401, {"X-Error-Message": f"bad {TOKEN}"}), ("refuses", "HTTP 401", "HF_TOKEN")),
        (Answer(403, body=f"bad {TOKEN}".encode()), ("refuses", "HTTP 403", "HF_TOKEN")),
        (Answer(418), ("HTTP 418",)),
        (Answer(200, {"ETag": "x"}), ("FileMetadataError", "HF_ENDPOINT")),
        (Answer(200, {"X-Repo-Commit": COMMIT}), ("FileMetadataError", "HF_ENDPOINT")),
        (Answer(302, {"Location": "/elsewhere"}), ("HTTP 404",)),
        (Answer(302, {"Location": f"/{NAME}/resolve/main/config.json"}), ("TooManyRedirects",)),
    ],
)
def test_refusals_say_the_way_out(start, naps, answer, words):
    start({}).changes["config.json"] = lambda _: answer
    check_error(FileError, *words)


def test_what_is_not_there(start):
    start(WEIGHTS)
    check_error(FileError, NAME, "no revision v9", "HTTP 404", reference=NAME + "@v9")
    check_error(ModelError, NAME, "config.json", "HTTP 404")


def test_a_host_that_is_not_there(start, naps):
    server = start({})
    server.close()
    check_error(FileError, NAME, "127.0.0.1", "ConnectError", "HF_ENDPOINT")
    assert sum(naps) < 60


@pytest.mark.parametrize("end", ["config.json", COMMIT, "model.safetensors"])
def test_a_hub_that_says_nothing_is_not_waited_for(start, naps, monkeypatch, end):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    server = start({**CONFIG, **WEIGHTS})
    server.changes[end] = lambda _: server.released.wait(30) and Answer()
    began = time.monotonic()
    check_error(FileError, NAME, "ReadTimeout", "try again")
    assert time.monotonic() - began < 10


def test_a_cut_connection_is_resumed(start, naps):
    server = start({**CONFIG, **WEIGHTS})
    body = WEIGHTS["model.safetensors"]
    cuts = iter([True, True])

    def cut(request: Request) -> Answer:
        usual = server.usual(request)
        return dataclasses.replace(usual, body=body[:9], length=len(body)) if next(cuts, False) else usual

    server.changes["model.safetensors"] = lambda request: (cut if request.method == "GET" else server.usual)(request)
    assert contents(hub.download(NAME, allow_pickle_format=False)) == {**CONFIG, **WEIGHTS}


def test_a_connection_that_is_always_cut_leaves_nothing_behind(start, naps):
    server = start({**CONFIG, **WEIGHTS})
    body = WEIGHTS["model.safetensors"]
    server.changes["model.safetensors"] = lambda request: dataclasses.replace(
        server.usual(request), body=body[:9], length=len(body)
    )
    check_error(FileError, NAME, "RemoteProtocolError")
    kept = contents(Path(constants.HF_HUB_CACHE)).values()
    assert not any(body.startswith(part) for part in kept if part)


def test_a_file_of_another_size_is_refused(start):
    server = start({**CONFIG, **WEIGHTS})

    def longer(request: Request) -> Answer:
        usual = server.usual(request)
        return dataclasses.replace(usual, length=len(usual.body) + 1) if request.method == "HEAD" else usual

    server.changes["model.safetensors"] = longer
    check_error(FileError, NAME, "size")
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))


@pytest.mark.parametrize("status", [302, 307])
@pytest.mark.parametrize("methods", [("HEAD", "GET"), ("GET",)])
@pytest.mark.parametrize("end", ["config.json", "model.safetensors"])
def test_the_token_stays_with_the_hub(start, end, methods, status):
    server = start({**CONFIG, **WEIGHTS})
    elsewhere = Server(lambda _: Answer(body=server.files[end]))
    foreign = elsewhere.url.replace("127.0.0.1", "localhost")
    etag = {"X-Linked-Etag": '"abc"', "X-Linked-Size": str(len(server.files[end])), "X-Repo-Commit": COMMIT}

    def redirect(request: Request) -> Answer:
        if request.method not in methods:
            return server.usual(request)
        return Answer(status, {"Location": f"{foreign}/blob", **etag})

    server.changes[end] = redirect
    try:
        folder = hub.download(NAME, allow_pickle_format=False)
    finally:
        elsewhere.close()
    assert contents(folder) == {**CONFIG, **WEIGHTS}
    assert server.tokens() == {f"Bearer {TOKEN}"}
    assert elsewhere.tokens() == {None}


def test_the_token_does_not_follow_a_list_of_files(start):
    server = start({**CONFIG, **WEIGHTS})
    elsewhere = Server(lambda request: server.usual(request))
    foreign = elsewhere.url.replace("127.0.0.1", "localhost")
    server.changes[COMMIT] = lambda request: Answer(307, {"Location": foreign + request.path})
    try:
        hub.download(NAME, allow_pickle_format=False)
    finally:
        elsewhere.close()
    assert elsewhere.tokens() == {None}


def test_a_password_in_the_address_is_not_shown(start, naps, monkeypatch):
    server = start({})
    server.changes["config.json"] = lambda _: Answer(200, {"ETag": "x"})
    address = server.url.replace("//", f"//user:{TOKEN}@")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    check_error(FileError, "127.0.0.1", "FileMetadataError")


def test_a_token_that_is_no_header_is_not_shown(start, monkeypatch):
    start({**CONFIG, **WEIGHTS})
    monkeypatch.setenv("HF_TOKEN", TOKEN + "\x0bx")
    check_error(FileError, NAME)


@pytest.mark.parametrize(
    "file",
    ["../evil.safetensors", "/evil.safetensors", "..\\evil.safetensors", "C:\\evil.safetensors", "evil\0.safetensors",
     "evil\n.safetensors", "\x1b[2J.safetensors", "..", "evil/config.json"],
)  # fmt: skip
def test_names_of_files_that_lead_elsewhere_are_left_out(start, tmp_path, file):
    server = start({**CONFIG, **WEIGHTS, file: b"evil"})
    assert contents(hub.download(NAME, allow_pickle_format=True)) == {**CONFIG, **WEIGHTS}
    assert b"evil" not in contents(tmp_path).values()
    assert not any("evil" in request.path for request in server.requests)


def test_a_name_of_a_file_can_be_too_long(start):
    start({**CONFIG, **WEIGHTS, "x" * 5000 + ".safetensors": b"evil"})
    check_error(FileError, NAME, "too long")


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("ETag", '"../../../../../evil"'),
        ("ETag", 'W/"/evil"'),
        ("ETag", '""'),
        ("X-Linked-Etag", '"../../../../../evil"'),
        ("X-Linked-Etag", "x" * 300),
        ("X-Repo-Commit", "../../../../evil"),
        ("X-Repo-Commit", "evil"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_hashes_that_are_paths_are_refused(start, tmp_path, file, header, value):
    server = start({**CONFIG, **WEIGHTS})

    def answer(request: Request) -> Answer:
        usual = server.usual(request)
        return dataclasses.replace(usual, headers=usual.headers | {header: value})

    server.changes[file] = answer
    check_error(ModelError, "127.0.0.1", "HF_ENDPOINT")
    assert not any("evil" in str(path) for path in tmp_path.rglob("*"))


def test_the_commit_of_a_missing_file_is_checked_too(start, tmp_path):
    headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "../../../../evil"}
    start({}).changes["config.json"] = lambda _: Answer(404, headers)
    check_error(ModelError, "no hashes", "HF_ENDPOINT")
    assert not any("evil" in str(path) for path in tmp_path.rglob("*"))


def test_other_hashes_are_fine(start):
    server = start({**CONFIG, **WEIGHTS})
    server.changes["model.safetensors"] = lambda request: dataclasses.replace(
        usual := server.usual(request), headers=usual.headers | {"ETag": 'W/"57-QXrk+/Zz9a="'}
    )
    assert contents(hub.download(NAME, allow_pickle_format=False)) == {**CONFIG, **WEIGHTS}


def test_a_cache_that_cannot_be_written(start, tmp_path):
    start({**CONFIG, **WEIGHTS})
    (tmp_path / "home").write_text("not a folder")
    check_error(FileError, NAME, "cannot be kept", constants.HF_HUB_CACHE, "HF_HOME")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    check_error(FileError, NAME, "pip install 'qwen-jax[hub]'")


def test_the_session_is_left_as_it_was(start):
    before = {kind: list(hooks) for kind, hooks in huggingface_hub.get_session().event_hooks.items()}
    start({**CONFIG, **WEIGHTS})
    hub.download(NAME, allow_pickle_format=False)
    assert huggingface_hub.get_session().event_hooks == before


def test_the_environment_is_honoured_and_the_token_not_logged(start, tmp_path):
    server = start({**CONFIG, **WEIGHTS})
    code = f"""
from qwen_jax.weights import hub
print(hub.download("{NAME}", allow_pickle_format=False))
hub.download("Owner/Other", allow_pickle_format=False)
"""
    home = tmp_path / "other"
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_DEBUG": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert contents(Path(done.stdout.strip())) == {**CONFIG, **WEIGHTS}
    assert Path(done.stdout.strip()).is_relative_to(home)
    assert "Owner/Other is no folder here" in done.stderr
    assert server.tokens() == {f"Bearer {TOKEN}"} and TOKEN not in done.stdout + done.stderr
