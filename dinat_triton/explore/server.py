"""Serves the page and its answers on loopback."""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from urllib.parse import urlsplit

from dinat_triton.explore.answers import answer

LOOPBACK = "127.0.0.1"
# The page loads its own files and asks this server, and nothing else.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# One at a time: a hundred at once would need memory for a hundred, and take no less time.
ANSWERING = threading.Lock()
FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD requests from this machine."""

    server_version, sys_version = "dinat-triton", ""
    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds for a request to arrive, so that a silent client does not hold a thread

    def do_GET(self) -> None:
        if not self._is_local():
            self._send(403, "application/json", b'{"error": "only 127.0.0.1 and localhost are served"}')
            return
        url = urlsplit(f"http://{LOOPBACK}{self.path}") if self.path.startswith("/") else None
        if url is not None and url.path in FILES:
            name, kind = FILES[url.path]
            self._send(200, kind, files("dinat_triton.explore").joinpath(name).read_bytes())
            return
        self._send(*self._answer(url.path if url else "", url.query if url else ""))

    do_HEAD = do_GET  # `_send` keeps the body back

    def _is_local(self) -> bool:
        """Whether the page was opened under this machine's own name: another site's name may point here too."""
        host = self.headers.get("Host", LOOPBACK).rpartition(":")[0] or self.headers.get("Host", LOOPBACK)
        return host in (LOOPBACK, "localhost")

    def _answer(self, path: str, query: str) -> tuple[int, str, bytes]:
        try:
            with ANSWERING:
                found = answer(path, query)
            status, body = (404, {"error": f"nothing lives at {path[:60]!r}"}) if found is None else (200, found)
        except (ValueError, TypeError) as error:
            status, body = 400, {"error": str(error)}
        return status, "application/json", json.dumps(body).encode()

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: hovering asks often."""


class Server(ThreadingHTTPServer):
    """Listens on loopback only. Port 0 takes a free one."""

    daemon_threads = True
    request_queue_size = 128  # connections that wait to be accepted

    def __init__(self, port: int = 0):
        super().__init__((LOOPBACK, port), Handler)

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.server_port}/"

    def handle_error(self, request, client_address) -> None:
        """A browser that hangs up is no error; anything else is told."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)
