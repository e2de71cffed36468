"""Checkpoints on the Hugging Face hub: hf://ORG/NAME is downloaded once, and read from the cache from then on.

The whole address: hf://ORG/NAME[@REVISION][/FILE OR FOLDER]. Nothing else is ever taken for an address, so a mistyped
path never asks the network. The hub's own settings hold: HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from step35.errors import HubError

CHECKPOINT = ("*.json", "*.jinja", "*.safetensors")
"""What a checkpoint in the released layout consists of."""
_ADDRESS = re.compile(r"hf://([^/@]+/[^/@]+)(?:@([^/@]+))?(?:/(.+))?")


def fetched(path: str | Path, files: Sequence[str] = CHECKPOINT) -> Path:
    """Return `path` itself, or for an address where it lies now.

    Of a whole repository only `files` are downloaded. Raises `HubError` for an address that is none, does not exist, or
    cannot be reached and is not in the cache.
    """
    if not str(path).startswith("hf:"):
        return Path(path)
    address = re.sub("^hf:/*", "hf://", str(path))  # of which a Path keeps one slash
    parts = _ADDRESS.fullmatch(address)
    if parts is None:
        raise HubError(f"'{address}' is no address; give hf://ORG/NAME, or hf://ORG/NAME@REVISION/FILE.")
    from huggingface_hub import snapshot_download

    repository, revision, inner = parts.groups()
    try:
        folder = snapshot_download(
            repository,
            revision=unquote(revision) if revision else None,
            allow_patterns=[inner, f"{inner}/*"] if inner else list(files),
        )
    except Exception as error:  # of several libraries
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise HubError(
            f"{address} cannot be fetched ({reason}). Check its name, and that the hub can be reached; a private or "
            "gated repository needs a token in HF_TOKEN."
        ) from None
    found = Path(folder, inner or "")
    if not found.exists():
        raise HubError(f"{address}: the repository {repository} has no '{inner}'; its files are listed on its page.")
    return found
