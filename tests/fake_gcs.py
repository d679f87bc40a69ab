"""An object store in a process of its own, for real `gs://` paths: whole objects, no rename.

    server = fake_gcs.Server()                      # on a free port of this machine
    env = server.environment()                      # for processes that run tests/store_main.py
    server.objects["bucket/run/config.json"]        # the stored bytes

It speaks as much of the JSON interface of Google Cloud Storage (cloud.google.com/storage/docs/
json_api/v1) as its clients use: tensorstore's own client, which writes and reads the arrays of
checkpoints, and fsspec's for everything else.  That is gcsfs where it is installed, and otherwise
`Bucket` below.  Copies, compositions and patches are refused (`refused` lists them), so nothing can
be renamed or appended to; an object appears whole when its upload ends; names that begin with one
of `hidden` are missing from listings, as new ones may be for a while, and are read by name all the
same.
"""

import contextlib
import hashlib
import http.client
import http.server
import importlib.util
import io
import json
import os
import re
import sys
import threading
import time
import types
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem

HOST = "STORAGE_EMULATOR_HOST"  # as Google's clients call it


class Server:
    """The store and its HTTP server, in a thread."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.hidden: tuple[str, ...] = ()
        self.before_put: Callable[[str], None] = lambda name: None
        self.refused: list[str] = []  # what an object store cannot do
        self.requests: list[str] = []
        self.uploads: dict[str, str] = {}  # resumable ones under way: session -> name
        self.lock = threading.RLock()
        self.clock = 0
        handler = type("Handler", (_Handler,), {"store": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def environment(self) -> dict[str, str]:
        """What the clients of a process need to find it."""
        return {
            HOST: self.url, "TENSORSTORE_GCS_HTTP_URL": self.url, "NO_GCE_CHECK": "true",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x", "TENSORSTORE_GCS_HTTP_VERSION": "1.1",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.url,  # of ArrayRecord
        }  # fmt: skip

    def clear(self) -> None:
        """Forgets everything."""
        with self.lock:
            for held in (self.objects, self.generations, self.uploads, self.refused, self.requests):
                held.clear()
            self.hidden, self.before_put = (), lambda name: None

    def close(self) -> None:
        """Ends the server; what is stored stays readable here."""
        self._server.shutdown()
        self._server.server_close()

    def put(self, name: str, data: bytes) -> dict[str, Any]:
        """Stores an object, whole."""
        self.before_put(name)
        with self.lock:
            self.clock += 1
            self.objects[name], self.generations[name] = data, self.clock
            return self.about(name)

    def about(self, name: str) -> dict[str, Any]:
        """The metadata of an object."""
        bucket, _, key = name.partition("/")
        data, number = self.objects[name], str(self.generations[name])
        now = "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object", "name": key, "bucket": bucket, "size": str(len(data)),
            "generation": number, "metageneration": "1", "etag": number, "id": f"{name}/{number}",
            "timeCreated": now, "updated": now, "contentType": "application/octet-stream",
        }  # fmt: skip

    def drop(self, name: str) -> bool:
        """Deletes an object; whether there was one."""
        with self.lock:
            self.generations.pop(name, None)
            return self.objects.pop(name, None) is not None

    def listed(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        """A listing, as a prefix, a delimiter and a range of names ask for it."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        with self.lock:
            for name in sorted(self.objects):
                key = name.partition("/")[2]
                if name.split("/")[0] != bucket or not key.startswith(prefix):
                    continue
                if name.startswith(self.hidden):
                    continue
                if key < query.get("startOffset", "") or key >= query.get("endOffset", "\uffff"):
                    continue
                rest = key[len(prefix) :]
                if delimiter and delimiter in rest:
                    prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
                else:
                    items.append(self.about(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


class _Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    store: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def _any(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        body = self._body()
        self.store.requests.append(f"{self.command} {self.path}")
        answer = self._answer(url.path, query, body)
        status, headers, data = answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle(self) -> None:
        """Clients may hang up at any moment."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _any

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            found = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, path: str, query: dict[str, str], body: bytes) -> Any:
        """(status, headers, data) of a request."""
        if path.startswith("/batch/"):
            return self._batch(body)
        match = re.fullmatch(
            r"(?P<up>/upload|/resumable/upload|/download)?/storage/v1/b/(?P<bucket>[^/]+)"
            r"(?P<objects>/o(?:/(?P<key>.+))?)?", path,
        )  # fmt: skip
        if match is None:
            return self._refuse(path)
        bucket = match["bucket"]
        if match["objects"] is None:
            return _json({"name": bucket, "id": bucket, "kind": "storage#bucket"})
        if match["up"] and "upload" in match["up"]:
            return self._upload(bucket, query, body)
        if match["key"] is None:
            return _json(self.store.listed(bucket, query))
        if "/" in match["key"]:  # rewriteTo, copyTo, compose: slashes of names are escaped
            return self._refuse(path)
        return self._object(f"{bucket}/{urllib.parse.unquote(match['key'])}", query)

    def _refuse(self, path: str) -> Any:
        self.store.refused.append(f"{self.command} {path}")
        return _json({"error": {"code": 400, "message": "an object store cannot do that"}}, 400)

    def _object(self, name: str, query: dict[str, str]) -> Any:
        """Reads, describes or deletes one."""
        with self.store.lock:
            if name not in self.store.objects:
                return _json({"error": {"code": 404, "message": f"No such object: {name}"}}, 404)
            if failed := self._precondition(name, query):
                return failed
            data, about = self.store.objects[name], self.store.about(name)
            if self.command == "DELETE":
                self.store.drop(name)
                return 204, {}, b""
        if self.command not in ("GET", "HEAD"):
            return self._refuse(name)
        if query.get("alt") != "media":
            return _json(about)
        return self._content(data, about)

    def _content(self, data: bytes, about: dict[str, Any]) -> Any:
        headers = {"x-goog-generation": about["generation"], "ETag": about["etag"],
                   "Content-Type": about["contentType"]}  # fmt: skip
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return 200, headers, data
        first = int(match[1]) if match[1] else max(0, len(data) - int(match[2]))
        last = min(int(match[2]) if match[1] and match[2] else len(data) - 1, len(data) - 1)
        if first > last:
            return 416, {"Content-Range": f"bytes */{len(data)}"}, b""
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return 206, headers, data[first : last + 1]

    def _precondition(self, name: str, query: dict[str, str]) -> Any:
        now = self.store.generations.get(name, 0)
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != now:
            return _json({"error": {"code": 412, "message": "conditionNotMet"}}, 412)
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == now:
            return 304, {}, b""
        return None

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> Any:
        """Whole objects, in one request or several; they appear when the last one is there."""
        kind = query.get("uploadType", "media")
        if kind == "resumable":
            return self._resumable(bucket, query, body)
        name = f"{bucket}/{query.get('name', '')}"
        if kind == "multipart":
            _, first, rest = _parts(self.headers["Content-Type"], body)
            name, body = f"{bucket}/{query.get('name') or json.loads(first)['name']}", rest
        with self.store.lock:
            return self._precondition(name, query) or _json(self.store.put(name, body))

    def _resumable(self, bucket: str, query: dict[str, str], body: bytes) -> Any:
        store = self.store
        if "upload_id" not in query:
            name = query.get("name") or json.loads(body)["name"]
            session = hashlib.sha256(f"{name}{time.time_ns()}".encode()).hexdigest()[:16]
            store.uploads[session] = f"{bucket}/{name}"
            place = f"{store.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable"
            return 200, {"Location": f"{place}&upload_id={session}"}, b""
        session = query["upload_id"]
        held = store.uploads[session] if session in store.uploads else None
        if self.command == "DELETE" or held is None:
            store.uploads.pop(session, None)
            return 499, {}, b""
        part = f"{session}/part"
        store.uploads[part] = store.uploads.get(part, "") + body.decode("latin-1")
        total = self.headers.get("Content-Range", "bytes */*").rpartition("/")[2]
        whole = store.uploads[part].encode("latin-1")
        if total == "*" or len(whole) < int(total):
            return 308, {"Range": f"bytes=0-{len(whole) - 1}"} if whole else {}, b""
        return _json(store.put(store.uploads.pop(session), whole))

    def _batch(self, body: bytes) -> Any:
        """Deletions, several in one request."""
        _, *parts = _parts(self.headers["Content-Type"], body, heads=True)
        answers = []
        for i, part in enumerate(parts):
            found = re.search(rb"DELETE /storage/v1/b/([^/ ]+)/o/([^ ?]+)", part)
            if found is None:
                return self._refuse("batch " + part[:80].decode(errors="replace"))
            name = f"{found[1].decode()}/{urllib.parse.unquote(found[2].decode())}"
            gone = self.store.drop(name)
            status = "204 No Content" if gone else "404 Not Found"
            text = "" if gone else '{"error": {"code": 404, "message": "No such object"}}'
            answers.append(
                f"--edge\r\nContent-Type: application/http\r\nContent-ID: <response-{i + 1}>\r\n"
                f"\r\nHTTP/1.1 {status}\r\nContent-Length: {len(text)}\r\n\r\n{text}\r\n"
            )
        data = ("".join(answers) + "--edge--\r\n").encode()
        return 200, {"Content-Type": "multipart/mixed; boundary=edge"}, data


def _json(value: Any, status: int = 200) -> Any:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _parts(kind: str, body: bytes, heads: bool = False) -> list[bytes]:
    """The parts of a multipart body, the first one empty; with their headers where asked for."""
    edge = b"--" + re.search(r"boundary=[\"']?([^\"';]+)", kind)[1].encode()
    found = [b""]
    for part in body.split(edge)[1:-1]:
        part = part.removeprefix(b"\r\n").removeprefix(b"\n")
        part = part.removesuffix(b"\n").removesuffix(b"\r")
        inner = re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1]
        found.append(part if heads else inner)
    return found


# ----------------------------------------------------------------------------------------- clients


class Bucket(AbstractFileSystem):
    """fsspec's view of the store where gcsfs is not installed: what an object store can do."""

    protocol = ("gs", "gcs")
    cachable = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self._server = urllib.parse.urlsplit(os.environ[HOST]).netloc

    def _ask(self, method: str, path: str, body: bytes = b"", **query: str) -> tuple[int, bytes]:
        with contextlib.closing(http.client.HTTPConnection(self._server, timeout=60)) as link:
            link.request(method, f"{path}?{urllib.parse.urlencode(query)}", body)
            answer = link.getresponse()
            return answer.status, answer.read()

    def _path(self, path: str) -> tuple[str, str]:
        bucket, _, key = self._strip_protocol(path).partition("/")
        return bucket, key

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        bucket, key = self._path(path)
        name = f"{bucket}/{key}"
        where = f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(key, safe='')}"
        status, body = self._ask("GET", where) if key else (404, b"")
        if status == 200:
            return {"name": name, "size": int(json.loads(body)["size"]), "type": "file"}
        if not key or self._list(bucket, key + "/", delimiter="/"):
            return {"name": name.rstrip("/"), "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def _list(self, bucket: str, prefix: str, **query: str) -> list[dict[str, Any]]:
        _, body = self._ask("GET", f"/storage/v1/b/{bucket}/o", prefix=prefix, **query)
        found = json.loads(body)
        return [
            *({"name": f"{bucket}/{p}".rstrip("/"), "size": 0, "type": "directory"}
              for p in found["prefixes"]),
            *({"name": f"{bucket}/{i['name']}", "size": int(i["size"]), "type": "file"}
              for i in found["items"]),
        ]  # fmt: skip

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        bucket, key = self._path(path)
        found = self._list(bucket, f"{key}/" if key else "", delimiter="/")
        if not found and self.info(path)["type"] == "file":
            found = [self.info(path)]
        return found if detail else [each["name"] for each in found]

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> io.BytesIO:
        if mode not in ("rb", "wb"):
            raise NotImplementedError(f"an object store cannot open with mode {mode!r}")
        if mode == "wb":
            return _Upload(self, path)
        bucket, key = self._path(path)
        where = f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(key, safe='')}"
        status, body = self._ask("GET", where, alt="media")
        if status != 200:
            raise FileNotFoundError(path)
        return io.BytesIO(body)

    def upload(self, path: str, data: bytes) -> None:
        bucket, key = self._path(path)
        where = f"/upload/storage/v1/b/{bucket}/o"
        status, body = self._ask("POST", where, data, uploadType="media", name=key)
        if status != 200:
            raise OSError(body.decode())

    def rm_file(self, path: str) -> None:
        bucket, key = self._path(path)
        where = f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(key, safe='')}"
        if self._ask("DELETE", where)[0] == 404:
            raise FileNotFoundError(path)

    _rm = rm_file

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        bucket, key = self._path(path)
        found = self._list(bucket, key + "/") if recursive else []
        for each in found:
            self.rm_file(each["name"])
        if not found:
            self.rm_file(path)

    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        """A no-op: an object store has no folders."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """A no-op: an object store has no folders."""

    def rmdir(self, path: str) -> None:
        """A no-op: an object store has no folders."""

    def mv(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("an object store cannot rename")

    rename = move = cp_file = copy = mv


class _Upload(io.BytesIO):
    """Appears whole at close; never when its `with` block raised."""

    def __init__(self, bucket: Bucket, path: str) -> None:
        super().__init__()
        self._bucket, self._path, self._failed = bucket, path, False

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self._failed = kind is not None
        super().__exit__(kind, *rest)

    def close(self) -> None:
        if not self.closed and not self._failed:
            self._bucket.upload(self._path, self.getvalue())
        super().close()

    def __del__(self) -> None:
        self._failed = True


def real_clients() -> bool:
    """Whether gcsfs and google-cloud-storage are installed."""
    with contextlib.suppress(ModuleNotFoundError):
        return all(importlib.util.find_spec(n) for n in ("gcsfs", "google.cloud.storage"))
    return False


def register() -> None:
    """Lets `gs://` of this process mean the server of the environment, whatever is installed."""
    if real_clients():
        return
    for name in Bucket.protocol:
        fsspec.register_implementation(name, Bucket, clobber=True)
    # Orbax asks Google's client one thing: whether a bucket has real folders.  It has not.
    plain = types.SimpleNamespace(hierarchical_namespace_enabled=False)
    client = types.SimpleNamespace(get_bucket=lambda name: plain)
    storage: Any = types.ModuleType("google.cloud.storage")
    storage.Client = lambda: client
    cloud: Any = types.ModuleType("google.cloud")
    cloud.storage = storage
    sys.modules |= {"google.cloud": cloud, "google.cloud.storage": storage}


@contextlib.contextmanager
def served() -> Iterator[Server]:
    """A store for `gs://` of this process; everything is as before when it ends."""
    import etils.epath.backend as epath_backend

    server, before = Server(), dict(os.environ)
    modules = {name: sys.modules.get(name) for name in ("google.cloud", "google.cloud.storage")}
    os.environ.update(server.environment())
    register()
    try:
        yield server
    finally:
        server.close()
        for name in server.environment():
            os.environ.pop(name)
        os.environ.update(before)
        for name in Bucket.protocol:
            sys.modules["fsspec.registry"]._registry.pop(name, None)
        for name, module in modules.items():
            if module is None:
                sys.modules.pop(name, None)
        epath_backend.fsspec_backend._get_filesystem.cache_clear()
