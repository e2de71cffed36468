"""The run directory: the same files for every verb, written whole or not at all.

`config.json` (the settings, itself a valid input), `env.json`, `metrics.jsonl` (the truth), `events.jsonl`,
`console.log`, `checkpoints/step_N/`, `rollouts/step_N.jsonl`, `report.html`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from step35.errors import ConfigError
from step35.runtime.disk import disk_errors, write_text
from step35.runtime.machine import environment
from step35.runtime.metrics import EventsLog, MetricsLog

ABSENT = "(absent)"

FREE = {"checkpoints", "track", "stability"}
"""Settings that a resumed run may change: how it is saved, who is shown its metrics, and what follows from an alarm,
which is the remedy that a stopped run asks for."""

OF_A_START = {"architecture", "config.json", "console.log", "env.json", "events.jsonl", "inputs.json", "lock"}
"""What a run leaves that fails before anything is computed."""


class RunDir:
    """One run on disk. Creating the object creates the folder."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)

    @cached_property
    def metrics(self) -> MetricsLog:
        """The log of measured values, one record a step."""
        return MetricsLog(self.path / "metrics.jsonl")

    @cached_property
    def events(self) -> EventsLog:
        """The log of what happened: starts, resumes, warnings."""
        return EventsLog(self.path / "events.jsonl")

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints, made on first use by `checkpoint.save`."""
        return self.path / "checkpoints"

    @property
    def rollouts(self) -> Path:
        """The folder of rollouts, created here."""
        folder = self.path / "rollouts"
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
        return folder

    def write_json(self, name: str, obj: Any) -> Path:
        """Write `obj` as `name` in one step. Raises `DiskFullError`."""
        path = self.path / name
        write_text(path, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")
        return path

    def write_config(self, config: dict[str, Any]) -> Path:
        """Write the resolved settings."""
        return self.write_json("config.json", config)

    def write_env(self) -> Path:
        """Write versions, hardware and commit."""
        return self.write_json("env.json", environment())

    @property
    def begun(self) -> bool:
        """Whether something was computed here, which depends on the settings and the inputs."""
        return not OF_A_START.issuperset(path.name for path in self.path.iterdir())

    def check_config(self, config: dict[str, Any]) -> None:
        """Raise `ConfigError` if the folder holds a run with other settings than `config`.

        Those in `FREE` are left out.
        """
        path = self.path / "config.json"
        if not path.exists():
            return
        try:
            old = dict(_flatten(json.loads(path.read_text(encoding="utf-8"))))
        except ValueError as error:
            raise ConfigError(f"{path} is not valid JSON ({error}); delete {self.path} to start anew.") from None
        new = dict(_flatten(json.loads(json.dumps(config))))  # through JSON, so that tuples compare as lists
        lines = [
            f"  {key}: {old.get(key, ABSENT)!r} in the folder, {new.get(key, ABSENT)!r} now"
            for key in sorted(old.keys() | new.keys())
            if old.get(key, ABSENT) != new.get(key, ABSENT) and FREE.isdisjoint(key.split("."))
        ]
        if lines:
            raise ConfigError(
                f"{self.path} holds a run with other settings:\n" + "\n".join(lines) + "\n"
                "Use the old settings to resume it, another --out for a run of its own, "
                "or delete the folder to start anew."
            )


def _flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, leaf) for each leaf of nested dictionaries and lists of them; other lists are leaves."""
    if isinstance(value, list) and value and all(isinstance(inner, dict) for inner in value):
        value = dict(enumerate(value))
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flatten(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value
