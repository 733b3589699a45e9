"""Origin of a result: the commit of this package, the command line, the time. No user and no host is named."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
from collections.abc import Sequence
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
    """Return the line that starts ``cifar-fast COMMAND`` with ``flags``."""
    return without_names(shlex.join(["cifar-fast", command, *flags]))


def without_names(value: Any) -> Any:
    """Return ``value`` with "~" for the home folder in its texts, and without the user and password of a URL."""
    if isinstance(value, dict):
        return {key: without_names(item) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    text = re.sub(r"://[^/@\s]+@", "://", value)
    home = os.path.expanduser("~")
    return re.sub(rf"{re.escape(home)}(?=[/'\"]|$|\s)", "~", text) if len(home) > 1 else text


def now() -> str:
    """Return date and time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
