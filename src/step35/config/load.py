"""Settings from files: TOML, or JSON such as a run's own `config.json`."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from step35.config.base import Config
from step35.errors import ConfigError

C = TypeVar("C", bound=Config)


def load_file(path: str | Path, kind: type[C], default: C | None = None) -> C:
    """Read `path` as settings of `kind`, laid over `default` key by key.

    Raises `ConfigError` for a bad file, and for unknown or wrong keys.
    """
    file = Path(path)
    if not (isinstance(kind, type) and issubclass(kind, Config)):
        raise ConfigError("--config is not available for this verb; give its options as flags.")
    try:
        text = file.read_text(encoding="utf-8")
        values = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file} cannot be read: {error}.") from None
    except ValueError as error:
        language = "TOML" if file.suffix == ".toml" else "JSON"
        raise ConfigError(f"--config {file} is not valid {language}: {error}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {file} holds a {type(values).__name__}; a table of settings is needed.")
    base = default.model_dump() if default is not None else {}
    return kind.parse(lay_over(base, values), where=str(file))


def lay_over(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `values` over it, table by table; a table of another `kind` replaces the whole table."""
    merged = dict(base)
    for key, value in values.items():
        old = base.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value.get("kind", old.get("kind")) == old.get("kind"):
            value = lay_over(old, value)
        merged[key] = value
    return merged
