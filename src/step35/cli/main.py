"""The `step35` command: picks the verb, reads its settings, turns errors into messages and exit codes.

A verb's module loads when it is called, so that `step35 --help` answers at once. Settings come from the defaults,
then from `--config FILE`, then from flags.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from contextlib import suppress
from typing import Any

from step35 import __version__
from step35.config.base import suggest
from step35.errors import ConfigError, Step35Error
from step35.runtime.signals import Terminated

VERBS = {
    "demo": "train, post-train, evaluate and export a small model, end to end",
    "doctor": "say what this machine can do",
    "prepare": "build a tokenizer and token shards from local text",
    "train": "pre-train a model",
    "curriculum": "train through the stages of a recipe: longer contexts, other data, other rates",
    "sft": "fine-tune on conversations",
    "rl": "reinforcement learning with MIS-PO",
    "eval": "measure held-out accuracy, MTP acceptance and speed",
    "inspect": "say what a model costs: parameters, cache, FLOPs",
    "clip": "clip the weights of a checkpoint's experts",
    "convert": "rewrite a model: another dtype, FP8 blocks, GGUF for llama.cpp, and back",
    "generate": "continue a text",
    "chat": "talk to a model that can use tools",
    "serve": "serve a model over HTTP, in the dialects of OpenAI and Anthropic",
    "runs": "list, show, plot and watch runs",
}

CONFIG_HELP = """

`--config FILE` reads settings from TOML, or from JSON such as a run's own config.json; flags win over it."""
RESUMABLE = ("demo", "prepare", "train", "curriculum", "sft", "rl", "eval")
INTERRUPTED = 130
TERMINATED = 143
BROKEN_PIPE = 141


def main(arguments: list[str] | None = None) -> int:
    """Run one verb and return the process's exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a byte that is no text is no reason to stop
    try:
        if not given or given[0] in ("-h", "--help", "help"):
            print(usage(), flush=True)
            return 0
        if given[0] == "--version":
            print(f"step35 {__version__}")
            return 0
        return run(given[0], given[1:])
    except KeyboardInterrupt as stop:
        again = "; run the same command again to continue" if given[0] in RESUMABLE else ""
        print(f"{'terminated' if isinstance(stop, Terminated) else 'interrupted'}{again}", file=sys.stderr)
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
    except BrokenPipeError:
        with suppress(OSError):  # the flush at exit would complain again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Step35Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def run(verb: str, rest: list[str]) -> int:
    """Parse the verb's settings and call it."""
    if verb not in VERBS:
        raise ConfigError(f"unknown verb '{verb}'.{suggest(verb, VERBS)} Verbs: {', '.join(VERBS)}.")
    import tyro

    module = importlib.import_module(f"step35.cli.{verb}")
    default = getattr(module, "DEFAULT", None)
    rest, default = _from_file(module.Args, default, rest)
    options: dict[str, Any] = {} if default is None else {"default": default}
    description = f"{module.__doc__}{CONFIG_HELP if hasattr(module.Args, 'model_fields') else ''}"
    args = tyro.cli(module.Args, prog=f"step35 {verb}", description=description, args=rest, **options)
    return int(module.main(args))


def _from_file(args: Any, default: Any, rest: list[str]) -> tuple[list[str], Any]:
    """Take `--config FILE` out of the arguments and lay its settings over the defaults."""
    rest = [part for word in rest for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in rest:
        return rest, default
    place = rest.index("--config")
    if place + 1 >= len(rest):
        raise ConfigError("--config needs a file: TOML, or JSON such as a run's config.json.")
    from step35.config.load import load_file

    return rest[:place] + rest[place + 2 :], load_file(rest[place + 1], args, default)


def usage() -> str:
    """Return the text of `step35 --help`."""
    verbs = "\n".join(f"  {name:<11} {text}" for name, text in VERBS.items())
    return (
        "usage: step35 VERB [--config FILE] [options]\n\n"
        f"The open Step 3.5 Flash stack: train, post-train, speculate and evaluate.\n\n{verbs}\n\n"
        "`step35 VERB --help` lists the options of a verb. Long verbs resume when they are run again."
    )


if __name__ == "__main__":
    sys.exit(main())
