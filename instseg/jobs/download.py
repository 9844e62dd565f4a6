"""One file over HTTP: what is there already is not sent again, and what is kept is what was published."""

from __future__ import annotations

import hashlib
import shutil
import ssl
import sys
from collections.abc import Sequence
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tenacity import RetryCallState, retry, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from instseg.jobs.progress import byte_progress

ATTEMPTS = 8  # at one URL, each from where the last one ended
MAX_WAIT_S = 30.0  # between two of them
TIMEOUT_S = 60.0  # without a byte
_CHUNK = 1 << 20
_NETWORK = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


def download(urls: Sequence[str], target: Path, checksum: str) -> None:
    """Download a file from the first of these URLs that has it as it was published.

    What an interrupted download left is completed where the server says that its file is still the same one.

    Args:
        urls: Of http or https, tried in turn.
        target: The file to write; what there is of it lies in TARGET.part until it is all there.
        checksum: As `verify` has it.

    Raises:
        OSError: If no URL has it, with the reason of each, or the disk is full.
    """
    part = target.with_name(f"{target.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    reasons = []
    for url in urls:
        try:
            _receive_patiently(url, part)
            verify(part, checksum)
        except _NETWORK as error:
            reasons.append(f"{url}: {error}")
        except ValueError as error:
            part.unlink(missing_ok=True)
            _version(part).unlink(missing_ok=True)
            reasons.append(f"{url}: {error}")
        else:
            part.replace(target)
            _version(part).unlink(missing_ok=True)
            return
    raise OSError(
        f"{target.name}: cannot be downloaded: {'; '.join(reasons)}; run the same command again, which goes on where "
        "this one ended, name a mirror with --mirrors, or put the file into a folder and name that with --archives"
    )


def verify(path: Path, checksum: str) -> None:
    """Raise ValueError unless a file has this checksum: "md5:" or "sha256:" and the digest in hexadecimal."""
    print(f"checking {path}", flush=True)
    algorithm, expected = checksum.split(":")
    with path.open("rb") as file:
        got = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
    if got != expected:
        raise ValueError(f"{path}: expected {algorithm} {expected}, got {got}: damaged, or another version of the file")


def check_space(folder: Path, num_bytes: int) -> None:
    """Raise OSError unless the disk of an existing folder has room for so many bytes more."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            f"{folder}: expected {num_bytes / 1e6:.2f} MB of free space, got {free / 1e6:.2f} MB; make room, or choose "
            "another --out"
        )


def _receive_patiently(url: str, part: Path) -> None:
    def tell(state: RetryCallState) -> None:
        assert state.outcome is not None
        print(f"warning: {url}: {state.outcome.exception()}; trying again", file=sys.stderr, flush=True)

    patiently = retry(
        retry=retry_if_exception(_may_pass),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential_jitter(initial=1.0, max=MAX_WAIT_S),
        before_sleep=tell,
        reraise=True,
    )
    patiently(_receive)(url, part)


def _may_pass(error: BaseException) -> bool:
    """Whether the same may succeed later."""
    if isinstance(error, HTTPError):
        return error.code >= 500 or error.code in (408, 429)
    return isinstance(error, _NETWORK)


def _receive(url: str, part: Path) -> None:
    """Complete a partial file with one request, or begin it anew where the server has another one by now."""
    done = part.stat().st_size if part.exists() and _version(part).exists() else 0
    resume = {"Range": f"bytes={done}-", "If-Range": _version(part).read_text()} if done else {}
    try:
        with urlopen(Request(url, headers={"User-Agent": "instseg", **resume}), timeout=TIMEOUT_S) as response:
            _append(response, part, _start(response, part, done))
    except HTTPError as error:
        error.close()
        if error.code != 416:  # nothing is left to ask for: the checksum decides whether it is the file
            raise


def _start(response: HTTPResponse, part: Path, done: int) -> int:
    """The byte that the response begins with; a file that begins anew is emptied, and its version noted."""
    if response.status == 206:
        got = response.headers.get("Content-Range", "")
        if not got.startswith(f"bytes {done}-"):
            _version(part).unlink()  # for the next attempt to ask for the whole
            raise ConnectionError(f"expected the file from byte {done} on, got {got!r}")
        return done
    part.write_bytes(b"")
    version = _validator(response)
    if version:
        _version(part).write_text(version)
    else:
        _version(part).unlink(missing_ok=True)
    return 0


def _append(response: HTTPResponse, part: Path, done: int) -> None:
    length = response.headers.get("Content-Length")
    total = None if length is None else done + int(length)
    if total is not None:
        check_space(part.parent, total - done)
    chunks = iter(lambda: response.read1(_CHUNK), b"")
    with part.open("ab") as file:
        for chunk in byte_progress(chunks, done, total, f"downloaded {part.stem}"):
            file.write(chunk)
    size = part.stat().st_size
    if total is not None and size != total:
        raise ConnectionError(f"the connection was cut after {size} of {total} bytes")


def _validator(response: HTTPResponse) -> str:
    """What tells the server's file from another version of it, byte by byte; empty if nothing does."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified", "")


def _version(part: Path) -> Path:
    return part.with_name(f"{part.name}.version")
