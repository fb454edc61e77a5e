"""The page to play with, served by Python's own HTTP server: `/` is the page, `/draw?choice=0&classes=3` a PNG.

A drawing whose reader has gone away ends before its next pass through the network. A bad value comes back as its one
line, with status 400; whatever else goes wrong does too, with status 500, and the server stays.
"""

from __future__ import annotations

import html
import json
import select
import socket
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from pixelgen_fast.errors import InputError, UserError, printable
from pixelgen_fast.pages.demo import MOST_IMAGES, Demo
from pixelgen_fast.pages.template import as_json, fill


class Gone(Exception):
    """The reader of a drawing has closed the connection."""


class Server(ThreadingHTTPServer):
    """Serves a demo at `address`. port 0: one that is free. Raises InputError for an address that cannot be had."""

    daemon_threads = True

    def __init__(self, demo: Demo, host: str, port: int) -> None:
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise InputError(
                f"--host {host} --port {port}: {error}; choose another --port, 0 for one that is free"
            ) from error
        names = dict.fromkeys(about["run"] for about in demo.about)
        data = {"choices": demo.about, "most": MOST_IMAGES}
        self.demo = demo
        self.page = fill("demo.html", name=html.escape(" · ".join(names)), data=as_json(data)).encode()

    @property
    def address(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host}:{port}/"


class Handler(BaseHTTPRequestHandler):
    """Answers one reader."""

    server: Server

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/":
            self._answer(200, "text/html; charset=utf-8", self.server.page)
        elif url.path == "/draw":
            self._draw(dict(parse_qsl(url.query, keep_blank_values=True)))
        else:
            self._refuse(404, f"{url.path}: there are / and /draw")

    def _draw(self, asked: dict[str, str]) -> None:
        begin = time.perf_counter()
        try:
            png, nimg = self.server.demo.sheet(asked, self._stay)
        except Gone:
            return
        except (UserError, ValueError) as error:
            self._refuse(400, str(error))
        except Exception as error:  # such as a GPU without memory: the next drawing may be a smaller one
            self._refuse(500, f"{type(error).__name__}: {error}")
        else:
            self._answer(200, "image/png", png, seconds=f"{time.perf_counter() - begin:.3f}", nimg=nimg)

    def _stay(self) -> None:
        """Raise Gone where the reader has closed the connection."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        if readable and not self.connection.recv(1, socket.MSG_PEEK):
            raise Gone

    def _refuse(self, status: int, line: str) -> None:
        self._answer(status, "application/json", json.dumps({"error": printable(line)}).encode())

    def _answer(self, status: int, kind: str, body: bytes, **more: Any) -> None:
        """more: headers, as X-Name."""
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            for name, value in more.items():
                self.send_header(f"X-{name.capitalize()}", str(value))
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # the reader has gone
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """A drawing is no line in the terminal."""
