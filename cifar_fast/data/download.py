"""One file of known MD5 from several sources: resumed, and left for the next source where one is slow, cut off or
wrong.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import time
import urllib.request
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from cifar_fast.utils.errors import InputError
from cifar_fast.utils.files import os_error_as_input_error
from cifar_fast.utils.progress import LOGGER, progress_bar

TIMEOUT = 10.0
"""Seconds to wait for a connection, and for the next bytes of one."""
SLOW = 200_000
"""Bytes per second below which a source is left for the next one."""
PATIENCE = 15.0
"""Seconds over which a source's rate is taken."""
CHUNK = 1 << 16


class TooSlow(Exception):
    """A source gave ``rate`` bytes per second."""

    def __init__(self, rate: float) -> None:
        super().__init__(f"{rate / 1000:.0f} kB/s")
        self.rate = rate


def download(sources: Sequence[str], path: Path, md5: str) -> None:
    """Bring the file with the sum ``md5`` to ``path`` from the first of ``sources`` that is quick and right.

    Sources are URLs or paths of files. Bytes go to ``path`` with ".part" appended, from which the next source, and the
    next call after a kill, goes on; the file gets its name when its sum is right. Where all are slow, the fastest
    finishes it; a source that was cut off is asked again as long as each time brings new bytes. Hold
    :func:`cifar_fast.utils.files.locked` on the folder, so that no other process writes there.

    Raises:
        InputError: the file cannot be written.
        OSError: no source gave the file; its message says why for each.
    """
    part = path.with_name(f"{path.name}.part")
    begun, queue, slow = time.monotonic(), deque(map(_as_url, sources)), dict[str, float]()
    failures: dict[str, str] = {}
    while queue or slow:
        is_new = bool(queue)
        url = queue.popleft() if is_new else max(slow, key=lambda url: slow[url])
        slow.pop(url, None)
        before = _size(part)
        try:
            _fetch(url, part, is_new and bool(queue or slow))
            if not _has_md5(part, md5):
                part.unlink()
                if before:  # the earlier bytes may be at fault: this source gets another chance, from the start
                    queue.appendleft(url)
                raise ValueError("other bytes than the published file's")
            with os_error_as_input_error(str(path)):
                os.replace(part, path)
            LOGGER.info(f"{path.name} from {url} in {time.monotonic() - begun:.0f} s; its MD5 sum is right")
            return
        except TooSlow as error:
            slow[url] = error.rate
            failures[url] = str(error)
        except (OSError, ValueError, http.client.HTTPException) as error:
            if isinstance(error, InputError):
                raise
            failures[url] = " ".join(str(error).split()) or type(error).__name__
            if _size(part) > before:
                queue.append(url)
        LOGGER.info(f"{url}: {failures[url]}{', the next source goes on' if queue or slow else ''}")
    raise OSError("; ".join(f"{url}: {failure}" for url, failure in failures.items()))


def _fetch(url: str, part: Path, may_leave: bool) -> None:
    """Append to ``part`` what it lacks of ``url``; raise :class:`TooSlow` after slow seconds if there is a better place
    to go to.
    """
    start = _size(part)
    request = urllib.request.Request(
        url, headers={"User-Agent": "cifar_fast"} | ({"Range": f"bytes={start}-"} if start else {})
    )
    with contextlib.ExitStack() as stack:
        try:
            response = stack.enter_context(urllib.request.urlopen(request, timeout=TIMEOUT))
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing is after the bytes that are here: they are all, or they are wrong
                return
            raise
        if response.headers.get_content_type() == "text/html":
            raise ValueError("a web page, not the file")
        if start and getattr(response, "status", None) != 206:  # the source does not know ranges
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        LOGGER.info(f"downloading {url}" + (f" from byte {start:,} on" if start else ""))
        bar = stack.enter_context(progress_bar(total, part.stem, "B"))
        bar.update(start)
        with os_error_as_input_error(str(part)):
            # Unbuffered: closing must not be what finds the disk full.
            file = stack.enter_context(open(part, "ab" if start else "wb", buffering=0))
        window, received = time.monotonic(), 0
        while data := response.read1(CHUNK):
            bar.update(len(data))
            received += len(data)
            with os_error_as_input_error(str(part)):
                while data:
                    data = data[file.write(data) :]
            elapsed = time.monotonic() - window
            if elapsed >= PATIENCE:
                done, rate = file.tell(), received / elapsed
                if rate < SLOW and may_leave:
                    raise TooSlow(rate)
                if bar.disable:  # no terminal: a log takes lines
                    left = f", {(total - done) / rate:.0f} s left" if total else ""
                    LOGGER.info(f"{done / 1e6:.1f} MB are here, {rate / 1e6:.2f} MB/s{left}")
                window, received = time.monotonic(), 0
        if total is not None and _size(part) < total:
            raise OSError(f"cut off after {_size(part):,} of {total:,} bytes")


def _as_url(source: str) -> str:
    return source if "://" in source else Path(source).expanduser().absolute().as_uri()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _has_md5(path: Path, md5: str) -> bool:
    from torchvision.datasets.utils import check_md5  # imports torch: not before it is needed

    return check_md5(path, md5)
