"""The base of every config: frozen, unknown keys refused with a suggestion.

Part of `config/`, which never imports torch. Field docstrings become the text of `--help`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from step35.errors import ConfigError

Trackers = tuple[Literal["tensorboard", "trackio", "wandb"], ...]
"""Where metrics can be shown besides `metrics.jsonl`."""


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
        return f"{where}: {problem['msg'].removeprefix('Value error, ').removesuffix('.')}."
    if problem["type"] != "extra_forbidden":
        return f"{where}: {key}={problem.get('input')!r}: {problem['msg']}."
    group, path = _resolve(cls, path)
    known = ", ".join(sorted(group.model_fields))
    hint = suggest(path[-1], group.model_fields)
    return f"{where}: unknown key '{'.'.join(path)}'.{hint} Known keys here: {known}."


def _resolve(cls: type[BaseModel], path: list[str]) -> tuple[type[BaseModel], list[str]]:
    """Return the config that holds the last key of `path`, and the path without the tags of tagged unions."""
    keys = []
    members: tuple[Any, ...] = ()
    for part in path[:-1]:
        tagged = [m for m in members if part in get_args(m.model_fields["kind"].annotation)]
        if tagged:
            cls, members = tagged[0], ()
            continue
        keys.append(part)
        annotation = cls.model_fields[part].annotation if part in cls.model_fields else None
        members = tuple(m for m in get_args(annotation) if isinstance(m, type) and issubclass(m, BaseModel))
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            cls = annotation
    return cls, [*keys, path[-1]]
