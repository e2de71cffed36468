"""Turns the docstrings of a Python file into one prose document."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from pathlib import PurePosixPath


def docstring_document(code: str, source: str) -> str:
    """Join the docstrings of module, classes and functions, each under its dotted name; "" if there are none.

    `source` is the file's relative name, "rich/console.py". Raises SyntaxError, ValueError or RecursionError
    for text that is not Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        module = ast.parse(code)
    return "\n\n".join(f"{name}\n\n{docstring}" for name, docstring in _docstrings(module, _dotted_name(source)))


def _dotted_name(source: str) -> str:
    parts = list(PurePosixPath(source).with_suffix("").parts)
    if parts[0] == "stdlib":
        parts = parts[1:]
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


def _docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[tuple[str, str]]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield name, docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")
