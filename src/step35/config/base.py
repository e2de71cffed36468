"""The base of every config: frozen, unknown keys refused with a suggestion.

Part of `config/`, which never imports torch. Field docstrings become the text of `--help`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from step35.errors import ConfigError


def suggest(name: str, allowed: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the allowed name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


class Config(BaseModel):
    """A frozen group of knobs."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def parse(cls, values: dict[str, Any], *, where: str = "config") -> Self:
        """Validate `values`; raise `ConfigError` naming each bad key, its value and the remedy."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError("\n".join(_explain(cls, problem, where) for problem in error.errors())) from None


def _explain(cls: type[BaseModel], problem: Any, where: str) -> str:
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    if not path:  # a rule over several keys: its message names them
        return f"{where}: {problem['msg'].removeprefix('Value error, ')}."
    if problem["type"] != "extra_forbidden":
        return f"{where}: {key}={problem.get('input')!r}: {problem['msg']}."
    fields = _fields_at(cls, path[:-1])
    known = ", ".join(sorted(fields))
    return f"{where}: unknown key '{key}'.{suggest(path[-1], fields)} Known keys here: {known}."


def _fields_at(cls: type[BaseModel], path: list[str]) -> dict[str, Any]:
    """Return the fields of the config nested at `path` below `cls`."""
    for part in path:
        field = cls.model_fields.get(part)
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        cls = inner
    return cls.model_fields
