"""A web server of this machine with files in memory, which fails where it is told to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import NamedTuple


class Request(NamedTuple):
    path: str
    range: str | None
    if_range: str | None


@dataclass
class FileServer:
    """What it serves, how it fails, and what it was asked."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    validators: dict[str, str] = field(default_factory=lambda: {"ETag": '"one"'})  # headers that tell versions apart
    ranges: bool = True
    failures: list[int] = field(default_factory=list)  # statuses of the next answers
    cuts: list[int] = field(default_factory=list)  # after how many bytes the next answers end too early
    requests: list[Request] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)  # of the answers there were

    def answer(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        self.requests.append(request)
        content = self.files.get(request.path)
        if self.failures or content is None:
            return self.failures.pop(0) if self.failures else 404, {}, b""
        start = re.match(r"bytes=(\d+)-$", request.range or "")
        same = request.if_range is None or request.if_range in self.validators.values()
        if not self.ranges or start is None or not same:
            return 200, self.validators, content
        if int(start[1]) >= len(content):
            return 416, {"Content-Range": f"bytes */{len(content)}"}, b""
        where = {"Content-Range": f"bytes {start[1]}-{len(content) - 1}/{len(content)}"}
        return 206, self.validators | where, content[int(start[1]) :]


@contextmanager
def serve() -> Iterator[FileServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            request = Request(self.path[1:], self.headers["Range"], self.headers["If-Range"])
            status, headers, body = server.answer(request)
            server.statuses.append(status)
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server = FileServer(f"http://127.0.0.1:{http.server_port}")
        thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
