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
            raise ConfigError("\n".join(_explain(cls, problem, where) for problem in _causes(error))) from None


def _causes(error: ValidationError) -> list[Any]:
    """Return the problems without those of a list that is only too short because its entries are wrong."""
    places = [problem["loc"] for problem in error.errors()]
    return [
        problem
        for problem, place in zip(error.errors(), places, strict=True)
        if not any(len(other) > len(place) and other[: len(place)] == place for other in places)
    ]


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
    configs = [cls]  # what the value reached so far may be
    for part in path[:-1]:
        if tagged := [config for config in configs if part in _tags(config)]:
            configs = tagged
            continue
        keys.append(part)
        if part in configs[0].model_fields:  # else it is the number of an entry
            configs = _configs(configs[0].model_fields[part].annotation) or configs
    return configs[0], [*keys, path[-1]]


def _tags(config: type[BaseModel]) -> tuple[str, ...]:
    """Return the values of `kind` that choose `config` from a tagged union."""
    return get_args(config.model_fields["kind"].annotation) if "kind" in config.model_fields else ()


def _configs(annotation: Any) -> list[type[BaseModel]]:
    """Return the configs that a value of this type may be, or hold as entries."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [config for part in get_args(annotation) for config in _configs(part)]
