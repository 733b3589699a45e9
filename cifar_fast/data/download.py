"""Download a file of known MD5 from the first source that works: resumable, with fallback to other sources."""

from __future__ import annotations

import contextlib
import http.client
import os
import time
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from cifar_fast.utils.errors import InputError, first_line
from cifar_fast.utils.files import expand_home, os_error_as_input_error
from cifar_fast.utils.progress import LOGGER, progress_bar
from cifar_fast.utils.provenance import without_secrets

TIMEOUT = 10.0
"""Seconds to wait for a connection, and for the next bytes of a response."""
SLOW = 200_000
"""Bytes per second. A slower source is dropped if there is another one."""
RATE_WINDOW = 15.0
"""Seconds over which the rate of a source is measured."""
CHUNK = 1 << 16


class SlowSource(Exception):
    """A source sends only ``rate`` bytes per second."""

    def __init__(self, rate: float) -> None:
        super().__init__(f"{rate / 1000:.0f} kB/s")
        self.rate = rate


def download(sources: Sequence[str], path: Path, md5: str, size: int) -> None:
    """Download the file with the MD5 sum ``md5`` to ``path``.

    The sources are tried in order. A source that is slow, cut off, wrong or longer than ``size`` is dropped for the
    next one. If all are slow, the fastest of them finishes the file. A source that was cut off is retried as long as it
    sends new bytes. Lines and messages show no password and no query of a URL, which may hold a token.

    Bytes are written to ``path`` with ".part" appended. The next source resumes from them, and so does the next call
    after a kill. The file is renamed to ``path`` once its MD5 sum is correct.

    Hold :func:`cifar_fast.utils.files.locked` on the folder during the call, so that no other process writes there.

    Args:
        sources: URLs, or paths of files.
        md5: the MD5 sum in hexadecimal.
        size: bytes of the file, or more.

    Raises:
        InputError: the file cannot be written.
        OSError: every source failed. The message gives the reason for each.
    """
    from torchvision.datasets.utils import check_md5  # here, because it imports torch

    part = path.with_name(f"{path.name}.part")
    start, queue = time.monotonic(), deque(map(_as_url, sources))
    slow: dict[str, float] = {}
    failures: dict[str, str] = {}
    while queue or slow:
        is_new = bool(queue)
        url = queue.popleft() if is_new else max(slow, key=lambda url: slow[url])
        slow.pop(url, None)
        before = _size(part)
        try:
            _fetch(url, part, size, is_new and bool(queue or slow))
            if not check_md5(part, md5):
                part.unlink()
                if before:  # the earlier bytes may be wrong, so this source is retried from the start
                    queue.appendleft(url)
                raise ValueError("not the published file: its MD5 sum is different")
            with os_error_as_input_error(str(path)):
                os.replace(part, path)
            LOGGER.info(
                f"{path.name} from {without_secrets(url)} in {time.monotonic() - start:.0f} s; its MD5 sum is correct"
            )
            return
        except SlowSource as error:
            slow[url] = error.rate
            failures[url] = str(error)
        except (OSError, ValueError, http.client.HTTPException) as error:
            if isinstance(error, InputError):
                raise
            failures[url] = _without(url, first_line(error))
            if _size(part) > before:
                queue.append(url)
        LOGGER.info(f"{without_secrets(url)}: {failures[url]}{', trying the next source' if queue or slow else ''}")
    raise OSError("; ".join(f"{without_secrets(url)}: {failure}" for url, failure in failures.items()))


def _without(url: str, text: str) -> str:
    """Return ``text``, an error about ``url``, without the parts that :func:`without_secrets` leaves out."""
    parts = urllib.parse.urlsplit(url)
    for secret in (parts.query, parts.fragment, parts.netloc.rpartition("@")[0], parts.password):
        text = text.replace(secret, "...") if secret else text
    return text


def _fetch(url: str, part: Path, size: int, has_alternative: bool) -> None:
    """Append the missing bytes of ``url`` to ``part``. If it is slow and ``has_alternative``, raise SlowSource.

    ``part`` is removed if the source sends more than ``size`` bytes, which raises a ValueError.
    """
    start = _size(part)
    headers = {"User-Agent": "cifar_fast"} | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(url, headers=headers)
    with contextlib.ExitStack() as stack:
        try:
            response = stack.enter_context(urllib.request.urlopen(request, timeout=TIMEOUT))
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing follows the bytes in the file: they are complete, or wrong
                return
            raise
        if response.headers.get_content_type() == "text/html":
            raise ValueError("a web page, not the file")
        if start and getattr(response, "status", None) != 206:  # the source does not support ranges
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        LOGGER.info(f"downloading {without_secrets(url)}" + (f" from byte {start:,}" if start else ""))
        bar = stack.enter_context(progress_bar(total, part.stem, "B"))
        bar.update(start)
        with os_error_as_input_error(str(part)):
            # Unbuffered, so that a full disk shows in a write and not only when the file is closed.
            file = stack.enter_context(open(part, "ab" if start else "wb", buffering=0))
        window, received = time.monotonic(), 0
        while data := response.read1(CHUNK):
            if file.tell() + len(data) > size:
                part.unlink()
                raise ValueError(f"sends more than the {size:,} bytes of the published file")
            bar.update(len(data))
            received += len(data)
            with os_error_as_input_error(str(part)):
                while data:
                    data = data[file.write(data) :]
            elapsed = time.monotonic() - window
            if elapsed >= RATE_WINDOW:
                done, rate = file.tell(), received / elapsed
                if rate < SLOW and has_alternative:
                    raise SlowSource(rate)
                if bar.disable:  # not on a terminal, so the log shows the progress
                    left = f", {(total - done) / rate:.0f} s left" if total else ""
                    LOGGER.info(f"{done / 1e6:.1f} MB downloaded, {rate / 1e6:.2f} MB/s{left}")
                window, received = time.monotonic(), 0
        if total is not None and _size(part) < total:
            raise OSError(f"cut off after {_size(part):,} of {total:,} bytes")


def _as_url(source: str) -> str:
    """Return a URL. A pipe is refused, because opening it would wait for a writer."""
    if "://" in source:
        return source
    path = expand_home(source).absolute()
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: not a file")
    return path.as_uri()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
