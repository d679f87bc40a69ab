"""A server on this machine that speaks as much of the hub's API as a download needs."""

import contextlib
import hashlib
import http.server
import json
import pathlib
import threading
from collections.abc import Iterator

SHA = "0123456789" * 4  # the one commit of every repository


@contextlib.contextmanager
def serve(repositories: dict[str, pathlib.Path]) -> Iterator[str]:
    """The address of a hub that has these repositories ("owner/name" -> folder)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer()

        def do_HEAD(self) -> None:
            self.answer()

        def log_message(self, *args: object) -> None:
            pass

        def answer(self) -> None:
            path = self.path.split("?")[0].strip("/")
            for name, folder in repositories.items():
                if path.startswith(f"api/models/{name}/tree/"):
                    return self.reply(json.dumps(listing(folder)).encode())
                if path.startswith(f"api/models/{name}"):
                    return self.reply(json.dumps({"id": name, "sha": SHA}).encode())
                if path.startswith(f"{name}/resolve/{SHA}/"):
                    return self.reply((folder / path.split("/", 4)[4]).read_bytes())
            self.reply(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
            return None

        def reply(
            self, data: bytes, code: int = 200, headers: dict[str, str] | None = None
        ) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", SHA)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()


def listing(folder: pathlib.Path) -> list[dict[str, object]]:
    """The tree of a repository as the hub lists it."""
    return [
        {
            "type": "file", "path": str(p.relative_to(folder)), "size": p.stat().st_size,
            "oid": hashlib.sha1(p.read_bytes()).hexdigest(),
        }
        for p in sorted(folder.rglob("*")) if p.is_file()
    ]  # fmt: skip
