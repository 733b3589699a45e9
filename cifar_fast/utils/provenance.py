"""Origin of a result: the commit of this package, the command line, the time. No user and no host is named."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]


@functools.cache
def commit() -> str | None:
    """Return the commit that this package was checked out or installed from; None if it is not known.

    A suffix "-dirty" marks a checkout with changes.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(PACKAGE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # another project's repository may hold the environment
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        installed = importlib.metadata.distribution("cifar_fast").read_text("direct_url.json")
        return json.loads(installed or "{}").get("vcs_info", {}).get("commit_id")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None


def command_line(command: str, flags: Sequence[str]) -> str:
    """Return the line that starts ``cifar-fast COMMAND`` with ``flags``, without names as in :func:`without_names`."""
    line = shlex.join(["cifar-fast", command, *map(without_names, flags)])
    return re.sub(r"'(~/[\w@%+=:,./-]*)'", r"\1", line)  # a shell replaces "~" only without quotation marks


def without_names(value: Any) -> Any:
    """Return ``value`` with shorter absolute paths in it, and without the secrets of a URL.

    A path is a text, or what follows the "=" of a text, or a value of a dict. It becomes relative if it is below the
    working folder. Otherwise it begins with "~" if it is below the home folder, and with "..." before its last name
    elsewhere, because the folders of a machine may be called after persons and projects.
    """
    if isinstance(value, dict):
        return {key: without_names(item) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    if value.startswith("file://"):
        return "file://" + without_names(value.removeprefix("file://"))
    if "://" in value:
        return without_secrets(value)
    if not os.path.isabs(value):
        name, equals, path = value.partition("=")
        return name + equals + without_names(path) if os.path.isabs(path) else value
    for folder, short in _known_folders():
        if len(folder) > 1 and (value + os.sep).startswith(folder + os.sep):
            inside = value[len(folder) + 1 :]
            return inside if short == "." and inside else os.path.join(short, inside).rstrip(os.sep)
    return os.path.join("...", os.path.basename(value.rstrip(os.sep)))


def _known_folders() -> Iterator[tuple[str, str]]:
    """Yield the working folder and the home folder, with what a path below them begins with."""
    with contextlib.suppress(OSError):  # somebody has removed it
        yield os.getcwd(), "."
    yield os.path.expanduser("~"), "~"


def without_secrets(url: str) -> str:
    """Return ``url`` without user and password, and with "?..." for its query, because these may hold a token."""
    return re.sub(r"(://)[^/?#@\s]*@|([?#])\S.*", lambda found: found[1] or f"{found[2]}...", url)


def now() -> str:
    """Return date and time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
