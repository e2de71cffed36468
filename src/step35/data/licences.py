"""Which installed packages may be trained on: those whose metadata names only permissive licences.

Reads the three places where Python packages state a licence: `License-Expression` (SPDX), the free-text
`License` field and the classifiers. What cannot be recognised counts as not permissive. It reads metadata,
not licence files, so it is a filter for a training corpus and no legal advice.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageMetadata

_PERMISSIVE_IDS = frozenset(
    """
    0BSD Apache-2.0 BSD-2-Clause BSD-3-Clause BSL-1.0 BlueOak-1.0.0 CC0-1.0 HPND ISC LLVM-exception
    MIT MIT-0 MIT-CMU NCSA PSF-2.0 Python-2.0 Unlicense Zlib
    """.split()  # noqa: SIM905
)
_PERMISSIVE_TEXT = re.compile(
    r"\b(mit|bsd|apache|isc|psf|python software foundation|zlib|unlicense|0bsd|public domain)\b",
    re.IGNORECASE,
)
_REFUSED_TEXT = re.compile(
    r"\b([al]?gpl|gnu|affero|mpl|mozilla|eupl|cddl|epl|eclipse|share.?alike|proprietary|commercial)",
    re.IGNORECASE,
)


def licence_problem(metadata: PackageMetadata) -> str:
    """Return why a package must be left out, or an empty string when all its licences are permissive."""
    if expression := _field(metadata, "License-Expression"):
        return _expression_problem(expression)
    # Some packages paste the whole licence into the field; its first line is the title.
    title = _field(metadata, "License").partition("\n")[0]
    classifiers = [line for line in metadata.get_all("Classifier") or [] if line.startswith("License ::")]
    stated = [title, *classifiers]
    for text in stated:
        if _REFUSED_TEXT.search(text):
            return f"not permissive: {text[:80]}"
    if any(_PERMISSIVE_TEXT.search(text) for text in stated):
        return ""
    return "unknown licence"


def _field(metadata: PackageMetadata, name: str) -> str:
    return str((metadata.get_all(name) or [""])[0]).strip()


def _expression_problem(expression: str) -> str:
    # Strict on purpose: "A OR B" needs both, since files of either licence may be in the package.
    names = set(re.split(r"[\s()]+", expression)) - {"AND", "OR", "WITH", ""}
    refused = sorted(names - _PERMISSIVE_IDS)
    return f"not permissive: {', '.join(refused)}" if refused else ""
