"""How this package was installed: where, what its build left out and why, and the command that installs it anew."""

from __future__ import annotations

import json
import shlex
from importlib import metadata
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

# Where a process that runs `python -m mmkernels...` has to start: -m looks first in the folder it starts in, where
# another mmkernels may lie, as a checkout that nobody built.
IMPORTED_FROM = Path(__file__).parents[1]


def left_out(part: str) -> dict[str, str]:
    """Why the build has no "core" or no "cuda" (`reason`), and what to do about it before installing anew (`mend`)."""
    record = Path(__file__).with_name("_build.json")  # setup.py writes it
    return json.loads(record.read_text()).get(part, {}) if record.exists() else {}


def reinstall() -> str:
    """From where it came: a folder that pip keeps in mind (PEP 610), or else the source distribution of that name."""
    try:
        origin = metadata.distribution("mmkernels").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        origin = None
    origin = json.loads(origin) if origin else {}
    if "dir_info" not in origin:
        return "pip install --force-reinstall --no-deps --no-binary mmkernels mmkernels"
    editable = "-e " if origin["dir_info"].get("editable") else ""
    folder = shlex.quote(url2pathname(urlparse(origin["url"]).path))
    return f"pip install --force-reinstall --no-deps {editable}{folder}"
