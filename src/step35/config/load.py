"""Settings from files: TOML, or JSON such as a run's own `config.json`."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from step35.config.base import Config
from step35.errors import ConfigError

C = TypeVar("C", bound=Config)


def load_file(path: str | Path, kind: type[C]) -> C:
    """Read `path` as settings of `kind`; raise `ConfigError` for a bad file, and for unknown or wrong keys."""
    file = Path(path)
    if not (isinstance(kind, type) and issubclass(kind, Config)):
        raise ConfigError("--config is not available for this verb; give its options as flags.")
    try:
        text = file.read_text(encoding="utf-8")
        values: dict[str, Any] = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file} cannot be read: {error}.") from None
    except ValueError as error:
        language = "TOML" if file.suffix == ".toml" else "JSON"
        raise ConfigError(f"--config {file} is not valid {language}: {error}.") from None
    return kind.parse(values, where=str(file))
