"""An S3 server on loopback, for tests of roots in an object store; it can fail, and kill who asks."""

from __future__ import annotations

import logging
import os
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "somebody",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_EC2_METADATA_DISABLED": "true",  # a lookup that takes seconds where there is none
}
_ERROR = '<?xml version="1.0"?><Error><Code>{0}</Code><Message>{0}</Message></Error>'


class S3:
    """The server. Called with a bucket's name, it makes it and gives the URI of its root.

    Attributes:
        requests: What it was asked, as "PUT /bucket/key".
        hook: Called before each request with what is asked and the port that asks; gives a status and an S3 error code
            to answer with, such as ("503 Slow Down", "SlowDown"), or None to serve it.
    """

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self.requests: list[str] = []
        self.hook: Callable[[str, int], tuple[str, str] | None] = lambda *_: None
        self.address = ""
        self._app = app

    def __call__(self, bucket: str) -> str:
        request = urllib.request.Request(f"http://{self.address}/{bucket}", method="PUT")
        urllib.request.urlopen(request).close()
        return f"s3://{bucket}?endpoint_override={self.address}&scheme=http"

    def serve(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """A WSGI application."""
        asked = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        self.requests.append(asked)
        refusal = self.hook(asked, environ["REMOTE_PORT"])
        if refusal is None:
            return self._app(environ, start_response)
        start_response(refusal[0], [("Content-Type", "application/xml")])
        return [_ERROR.format(refusal[1]).encode()]


@contextmanager
def running_s3() -> Iterator[S3]:
    """An S3 server for as long as the context lasts, with the credentials for it in the environment."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    os.environ.update(ENVIRONMENT)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    s3 = S3(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, s3.serve, threaded=True, request_handler=MotoRequestHandler)
    s3.address = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield s3
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
