"""An S3 server on loopback, for tests of roots in an object store."""

from __future__ import annotations

import logging
import os
import re
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "somebody",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_EC2_METADATA_DISABLED": "true",  # a lookup that takes seconds where there is none
}


class S3(logging.Handler):
    """Called with a bucket's name, it makes it and gives the URI of its root; `requests` has what it was asked."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__()
        self.address = f"{host}:{port}"
        self.requests: list[str] = []

    def __call__(self, bucket: str) -> str:
        request = urllib.request.Request(f"http://{self.address}/{bucket}", method="PUT")
        urllib.request.urlopen(request).close()
        return f"s3://{bucket}?endpoint_override={self.address}&scheme=http"

    def emit(self, record: logging.LogRecord) -> None:
        """Remember a line of the server's log: 127.0.0.1 - - [date] "PUT /bucket/key HTTP/1.1" 200 -."""
        line = re.sub("\x1b\\[[0-9]+m", "", record.getMessage())  # colours
        self.requests.append(line.split('"')[1].removesuffix(" HTTP/1.1"))


@contextmanager
def running_s3() -> Iterator[S3]:
    """An S3 server for as long as the context lasts, with the credentials for it in the environment."""
    from moto.server import ThreadedMotoServer

    os.environ.update(ENVIRONMENT)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    s3, log = S3(*server.get_host_and_port()), logging.getLogger("werkzeug")
    log.addHandler(s3)
    log.propagate = False
    log.setLevel(logging.INFO)
    try:
        yield s3
    finally:
        log.removeHandler(s3)
        server.stop()
