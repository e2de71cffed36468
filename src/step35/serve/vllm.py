"""`--backend vllm`: the server's settings as a vLLM command line. vLLM then takes this process's place.

Written against vLLM 0.32, which knows the architecture by itself: no remote code. Settings that it has no equal for
are refused when they are set. The API key goes by the environment, so that the process table does not show it.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from step35.config.serve import ServeSettings, VllmSettings
from step35.errors import ConfigError

PARSER = "step3p5"
"""vLLM's name of the parsers for both the thinking and the calls of this chat format."""
NO_EQUAL = {
    "max_body_bytes": "limit bodies in a proxy in front of it",
    "request_timeout_s": "limit times in a proxy in front of it",
    "default_max_tokens": "send max_tokens with the request",
    "thinking_budget": "send thinking_token_budget with the request",
    "effort_low_tokens": "send thinking_token_budget with the request",
    "effort_medium_tokens": "send thinking_token_budget with the request",
    "effort_high_tokens": "send thinking_token_budget with the request",
    "draft_vocabulary": "let vLLM draft among all tokens",
}
"""Settings that vLLM cannot be started with, and what to do instead."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is served, and where."""

    path: str
    model_name: str
    host: str
    port: int
    dtype: str = "auto"
    mtp_modules: int = 0
    """MTP modules of the checkpoint: the most drafts a step."""


@dataclass(frozen=True)
class Command:
    """What to run."""

    argv: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    """Variables besides those of this process."""
    notes: list[str] = field(default_factory=list)
    """What differs from our own server, for the user to read."""


def command(target: Target, settings: ServeSettings, vllm: VllmSettings) -> Command:
    """Return vLLM's command line; raise `ConfigError` for settings that it cannot be started with."""
    _refuse(target, settings)
    argv = [vllm.executable, "serve", target.path, "--served-model-name", target.model_name]
    argv += ["--host", target.host, "--port", str(target.port), "--dtype", target.dtype]
    argv += ["--reasoning-parser", PARSER, "--enable-auto-tool-choice", "--tool-call-parser", PARSER]
    argv += ["--enable-prompt-tokens-details"]  # cached tokens in the usage
    argv += ["--max-num-seqs", str(settings.max_concurrent)]
    argv += ["--shutdown-timeout", str(math.ceil(settings.drain_timeout_s))]
    if settings.max_context is not None:
        argv += ["--max-model-len", str(settings.max_context)]
    if settings.speculate:
        drafts = {"method": "mtp", "num_speculative_tokens": settings.speculate}
        argv += ["--speculative-config", json.dumps(drafts)]
    environment = {"VLLM_API_KEY": settings.api_key} if settings.api_key else {}
    return Command([*argv, *_parallel(vllm), *_more(vllm.args)], environment, _notes(target, settings))


def run(command: Command) -> None:
    """Become vLLM; raise `ConfigError` when there is none."""
    program = shutil.which(command.argv[0])
    if program is None:
        raise ConfigError(
            f"--backend vllm found no program '{command.argv[0]}'; install vLLM (pip install vllm), or say where it "
            "is with --vllm.executable."
        )
    for note in command.notes:
        print(f"note: {note}", file=sys.stderr)
    print(shlex.join(command.argv), flush=True)
    sys.stderr.flush()
    os.execve(program, command.argv, _variables(command.environment))


def check_unused(vllm: VllmSettings) -> None:
    """Raise `ConfigError` for settings of vLLM where it does not serve."""
    if changed := _changed(vllm):
        name, value = next(iter(changed.items()))
        raise ConfigError(f"vllm.{name}={value!r} has no effect without --backend vllm; add it, or leave this out.")


def _variables(more: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, **more}


def _changed(settings: ServeSettings | VllmSettings) -> dict[str, object]:
    """Return the fields that are not at their default."""
    values = {name: getattr(settings, name) for name in type(settings).model_fields}
    return {name: value for name, value in values.items() if value != type(settings).model_fields[name].default}


def _refuse(target: Target, settings: ServeSettings) -> None:
    for name, value in _changed(settings).items():
        if name in NO_EQUAL:
            raise ConfigError(f"{name}={value!r} cannot be kept by vLLM; leave it out and {NO_EQUAL[name]}.")
    if target.port == 0:
        raise ConfigError("port=0 does not work with --backend vllm, which does not say what it got; name a port.")
    if (settings.speculate or 0) > target.mtp_modules:
        raise ConfigError(
            f"speculate={settings.speculate}, but the model has {target.mtp_modules} MTP modules; give at most that."
        )


def _parallel(vllm: VllmSettings) -> list[str]:
    sizes = {
        "--tensor-parallel-size": vllm.tensor_parallel,
        "--pipeline-parallel-size": vllm.pipeline_parallel,
        "--data-parallel-size": vllm.data_parallel,
    }
    found = [word for name, size in sizes.items() if size > 1 for word in (name, str(size))]
    return found + (["--enable-expert-parallel"] if vllm.expert_parallel else [])


def _more(args: str) -> list[str]:
    try:
        return shlex.split(args)
    except ValueError as error:
        raise ConfigError(f"vllm.args={args!r} cannot be read ({error}); quote it as on a command line.") from None


def _notes(target: Target, settings: ServeSettings) -> list[str]:
    notes = [
        f"vLLM has no equal of {', '.join(NO_EQUAL)}: their defaults do not hold. Above max_concurrent, requests "
        "wait; none is refused."
    ]
    if settings.api_key:
        notes.append("vLLM asks for the key under /v1, as a bearer token; /metrics and /tokenize are open.")
    if settings.speculate is None and target.mtp_modules:
        notes.append(
            f"no drafts. --speculate {target.mtp_modules} asks for them; vLLM 0.19 to 0.32 fail to start with this "
            "model's MTP unless repaired (vllm-project/vllm issue 40000)."
        )
    return notes
