"""`--backend vllm`: the command line that it makes of our settings. `make interop` runs it against a real vLLM."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from step35.cli.main import main
from step35.config.serve import ServeSettings, VllmSettings
from step35.errors import ConfigError
from step35.serve.vllm import NO_EQUAL, Target, command, run

TARGET = Target(path="/models/flash", model_name="flash", host="0.0.0.0", port=8000, mtp_modules=3)


def made(vllm: VllmSettings | None = None, **settings: Any) -> Any:
    """Return the command for these settings."""
    return command(TARGET, ServeSettings(**settings), vllm or VllmSettings())


def value(argv: list[str], flag: str) -> str:
    """Return what follows a flag, which must be there once."""
    assert argv.count(flag) == 1
    return argv[argv.index(flag) + 1]


def test_the_model_is_served_with_its_parsers_and_our_settings() -> None:
    argv = made(max_concurrent=9, max_context=1000, drain_timeout_s=2.5).argv
    assert argv[:3] == ["vllm", "serve", "/models/flash"]
    flags = {
        "--served-model-name": "flash",
        "--host": "0.0.0.0",
        "--port": "8000",
        "--dtype": "auto",
        "--reasoning-parser": "step3p5",
        "--tool-call-parser": "step3p5",
        "--max-num-seqs": "9",
        "--max-model-len": "1000",
        "--shutdown-timeout": "3",
    }
    assert {flag: value(argv, flag) for flag in flags} == flags
    assert "--enable-auto-tool-choice" in argv
    plain = made().argv
    assert not {"--max-model-len", "--tensor-parallel-size", "--enable-expert-parallel"} & set(plain)


def test_drafts_are_asked_for_by_number() -> None:
    assert json.loads(value(made(speculate=2).argv, "--speculative-config")) == {
        "method": "mtp",
        "num_speculative_tokens": 2,
    }
    for settings in ({}, {"speculate": 0}):
        assert "--speculative-config" not in made(**settings).argv
    assert "--speculate 3" in " ".join(made().notes)
    assert "--speculate" not in " ".join(made(speculate=0).notes)
    with pytest.raises(ConfigError, match="speculate=4, but the model has 3"):
        made(speculate=4)


def test_the_key_goes_by_the_environment() -> None:
    found = made(api_key="secret")
    assert found.environment == {"VLLM_API_KEY": "secret"}
    assert "secret" not in " ".join([*found.argv, *found.notes])
    assert made().environment == {}


def test_parallel_sizes_and_more_arguments() -> None:
    vllm = VllmSettings(tensor_parallel=8, pipeline_parallel=2, data_parallel=4, expert_parallel=True, args="--a 'b c'")
    argv = made(vllm).argv
    assert argv[-3:] == ["--enable-expert-parallel", "--a", "b c"]
    assert value(argv, "--tensor-parallel-size") == "8"
    assert value(argv, "--pipeline-parallel-size") == "2"
    assert value(argv, "--data-parallel-size") == "4"
    with pytest.raises(ConfigError, match="No closing quotation"):
        made(VllmSettings(args="'"))


@pytest.mark.parametrize("name", NO_EQUAL)
def test_what_vllm_cannot_keep_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=7"):
        made(**{name: 7})


def test_no_setting_is_dropped() -> None:
    """Each is refused, or changes what is run."""
    changed = {"api_key": "k", "max_concurrent": 2, "drain_timeout_s": 1, "max_context": 10, "speculate": 1}
    never_adapts = {"adaptive_depth"}  # its text says so
    assert set(changed) | set(NO_EQUAL) | never_adapts == set(ServeSettings.model_fields)
    for name, other in changed.items():
        found = made(**{name: other})
        assert (found.argv, found.environment) != (made().argv, made().environment)


def test_a_port_is_named() -> None:
    with pytest.raises(ConfigError, match="name a port"):
        command(Target(path="x", model_name="x", host="localhost", port=0), ServeSettings(), VllmSettings())


def test_vllm_takes_the_place_of_this_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    called: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *arguments: called.append(arguments))
    assert main(["serve", "--backend", "vllm", "--api-key", "secret", "--vllm.args=--enforce-eager"]) == 0
    [(path, argv, environment)] = called
    assert path == str(program)
    assert argv[0] == "vllm"
    assert argv[-1] == "--enforce-eager"
    assert value(argv, "--served-model-name") == "tiny"
    assert environment["VLLM_API_KEY"] == "secret"
    shown = capsys.readouterr()
    assert "secret" not in shown.out + shown.err
    assert "note: vLLM has no equal of" in shown.err


def test_without_vllm_the_error_says_so() -> None:
    with pytest.raises(ConfigError, match="no program 'no-such-program'; install vLLM"):
        run(made(VllmSettings(executable="no-such-program")))


def test_vllms_settings_need_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--vllm.tensor-parallel", "8"]) == 2
    assert "vllm.tensor_parallel=8 has no effect without --backend vllm" in capsys.readouterr().err
