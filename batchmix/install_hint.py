"""The command that adds what an optional part needs, to the batchmix that runs."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from urllib.parse import urlsplit
from urllib.request import url2pathname


def install_hint(extra: str) -> str:
    """`pip install -e '/src/batchmix[s3]'` of a clone that was installed from its folder, else `pip install 'batchmix[s3]'`.

    Where it was installed from is in `direct_url.json` (PEP 610).
    """
    try:
        text = distribution("batchmix").read_text("direct_url.json")
        origin = json.loads(text) if text else {}
    except (PackageNotFoundError, ValueError):
        origin = {}
    if "dir_info" not in origin:
        return f"pip install 'batchmix[{extra}]'"
    folder = url2pathname(urlsplit(origin["url"]).path)
    editable = "-e " if origin["dir_info"].get("editable") else ""
    return f"pip install {editable}{shlex.quote(f'{folder}[{extra}]')}"
