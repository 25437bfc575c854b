"""A small hub on this machine that answers what huggingface_hub asks (resolve, ETag, commit, Range), and can fail."""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """files: "owner/name/path" -> bytes, all at one commit; paths that start with "/" are served as plain URLs."""

    files: dict[str, bytes]
    commit: str = COMMIT
    cut_after: int | None = None  # bytes after which the connection breaks and the server is down
    wrong_content: dict[str, bytes] = field(default_factory=dict)  # sent instead of the content that the ETag describes
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # (method, path, Range)
    down: bool = False
    address: str = ""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Run the hub on a free port of loopback; its URL is `hub.address`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            range_ = self.headers.get("Range", "")
            hub.requests.append((self.command, self.path, range_))
            match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([0-9a-f]+)/(.+)", self.path)
            name = f"{match[1]}/{match[3]}" if match else self.path
            if hub.down or name not in hub.files:
                self.send_response(503 if hub.down else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = hub.wrong_content.get(name, hub.files[name])
            start = int(range_.removeprefix("bytes=").rstrip("-")) if range_ else 0
            self.send_response(206 if range_ else 200)
            if range_:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            if match:
                self.send_header("ETag", f'"{hashlib.sha256(hub.files[name]).hexdigest()}"')
                self.send_header("X-Repo-Commit", hub.commit)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if not with_body:
                return
            if hub.cut_after is not None:
                self.wfile.write(content[start : hub.cut_after])
                hub.down, self.close_connection = True, True
                return
            self.wfile.write(content[start:])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
