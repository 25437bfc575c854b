"""The studio's server: one page on the loopback interface, and three requests that it makes."""

import base64
import http.server
import json
from collections.abc import Callable
from importlib.resources import files
from typing import Any, Final

from textcraftor.errors import UserError
from textcraftor.loopback import HOST, LoopbackServer
from textcraftor.style.studio import Settings, Studio

PORT: Final = 8770
LARGEST: Final = 32_000_000  # bytes of a request
PAGES: Final = {"/": ("page.html", "text/html"), "/studio.js": ("studio.js", "text/javascript")}
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class StudioServer(LoopbackServer):
    """Serves a studio at http://127.0.0.1:PORT. port: 0 takes a free one.  Raises ConfigError when the port is taken."""

    def __init__(self, studio: Studio, port: int = PORT) -> None:
        self.studio = studio
        super().__init__(port, _Handler)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: StudioServer

    def do_GET(self) -> None:
        if not self._is_ours():
            return
        if self.path == "/studio.json":
            self._send_json(200, self.server.studio.defaults())
        elif self.path in PAGES:
            name, kind = PAGES[self.path]
            self._send(200, files("textcraftor.style").joinpath(name).read_bytes(), f"{kind}; charset=utf-8")
        else:
            self._send_json(404, {"error": "There is no such page"})

    def do_POST(self) -> None:
        answers: dict[str, Callable[[bytes], dict[str, Any]]] = {"/draw": self._draw, "/restore": self.server.studio.restore}
        if not self._is_ours():
            return
        length = int(self.headers.get("Content-Length") or 0)
        if self.path not in answers or not 0 < length <= LARGEST:
            self.close_connection = True
            return self._send_json(400, {"error": f"A request of {length:,} bytes to {self.path} is not answered"})
        try:
            self._send_json(200, answers[self.path](self.rfile.read(length)))
        except UserError as error:
            self._send_json(400, {"error": " ".join(str(error).split())})

    def _draw(self, body: bytes) -> dict[str, Any]:
        drawn = self.server.studio.draw(Settings.parse(body))
        for name in ("base", "blend"):
            drawn[name] = "data:image/png;base64," + base64.b64encode(drawn[name]).decode()
        return drawn

    def _is_ours(self) -> bool:
        """Refuse what another site's page sends: by its name for this machine, or by its origin."""
        port = self.server.server_port
        hosts = {f"{HOST}:{port}", f"localhost:{port}"}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in hosts and origin in {None, *(f"http://{host}" for host in hosts)}:
            return True
        self.close_connection = True
        self._send_json(403, {"error": "The studio answers its own page only"})
        return False

    def _send_json(self, status: int, data: dict[str, Any]) -> None:
        self._send(status, json.dumps(data).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing: prompts are the user's own."""
