"""HTTP servers that only this machine reaches."""

import http.server
import socketserver
from typing import Final

from textcraftor.errors import ConfigError

HOST: Final = "127.0.0.1"


class LoopbackServer(http.server.ThreadingHTTPServer):
    """Serves at http://127.0.0.1:PORT/, each connection in a thread of its own.

    port: 0 takes a free one.  Raises ConfigError when the port is taken.
    """

    def __init__(self, port: int, handler: type[http.server.BaseHTTPRequestHandler]) -> None:
        try:
            super().__init__((HOST, port), handler)
        except OSError as error:
            raise ConfigError(f"--port {port} cannot be used: {error.strerror}. Take another, or 0 for a free one") from None

    def server_bind(self) -> None:
        # Without HTTPServer's look-up of this machine's name, which may ask a network.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    @property
    def address(self) -> str:
        """The URL of its root."""
        return f"http://{HOST}:{self.server_port}/"
