"""The server's knobs are a config like all others: frozen, checked, named when wrong."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from step35.config.serve import ServeSettings
from step35.errors import ConfigError


def test_settings_are_frozen_and_checked() -> None:
    settings = ServeSettings.parse({"max_concurrent": 2})
    assert settings.max_concurrent == 2
    with pytest.raises(ValidationError):
        settings.max_concurrent = 3  # type: ignore[misc]
    with pytest.raises(ConfigError, match=r"unknown key 'max_concurent'. Did you mean 'max_concurrent'\?"):
        ServeSettings.parse({"max_concurent": 2})
    with pytest.raises(ConfigError, match="max_concurrent=0"):
        ServeSettings.parse({"max_concurrent": 0})


def test_every_knob_is_explained() -> None:
    assert all(field.description for field in ServeSettings.model_fields.values())
