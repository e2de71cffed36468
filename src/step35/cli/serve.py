"""Serve a model over HTTP in the dialects of OpenAI and Anthropic: chat, tools, structured answers, metrics.

SIGTERM and Ctrl-C let running answers end first; a second one ends them too. `--backend vllm` starts vLLM instead,
with the flags that this model needs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import tyro
from pydantic import Field

from step35.cli.shipped import SHIPPED
from step35.config.serve import ServeSettings, VllmSettings
from step35.errors import ConfigError


class Args(ServeSettings):
    """What to serve, and where."""

    path: tyro.conf.Positional[Path] = SHIPPED
    """Checkpoint folder in the released layout, .gguf file, training run (its newest checkpoint), or hf://ORG/NAME
    on the hub; by default, the small model that comes with the package."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of this machine's."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 picks a free one."""
    model_name: str = ""
    """Name that clients ask for; by default, that of the folder."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of weights and computation; auto is float32 with step35, and with vllm the checkpoint's own."""
    quantization: Literal["none", "int8"] = "none"
    """int8 rounds the matrices to 8 bits once they are loaded: a quarter of the memory of float32, and answers that may
    differ a little. For vllm, name its own in vllm.args."""
    mtp: int | None = Field(default=None, ge=0)
    """Load only the first so many MTP modules; 0 for a checkpoint without their tensors. All, if not given."""
    backend: Literal["step35", "vllm"] = "step35"
    """What serves: our own engine, or vLLM, for many GPUs; it needs a vLLM installation."""
    vllm: VllmSettings = VllmSettings()
    """Only with --backend vllm."""


def main(args: Args) -> int:
    """Serve the model until a signal ends it."""
    from step35.serve.vllm import check_unused

    args = args.model_copy(update={"api_key": args.api_key or os.environ.get("STEP35_API_KEY", "")})
    if args.backend == "vllm":
        return become_vllm(args)
    check_unused(args.vllm)
    return serve_here(args)


def become_vllm(args: Args) -> int:
    """Hand this process over to vLLM."""
    from step35.config.model import ModelConfig
    from step35.runtime.hub import fetched
    from step35.serve.vllm import Target, command, run

    if args.quantization != "none":
        raise ConfigError(
            f"quantization={args.quantization} is not vLLM's; leave it out, or name one of vLLM's, for example "
            '--vllm.args="--quantization fp8".'
        )
    path = fetched(args.path)
    modules = ModelConfig.read(path).num_nextn_predict_layers
    target = Target(
        path=str(path.resolve()),
        model_name=served_name(args),
        host=args.host,
        port=args.port,
        dtype=args.dtype,
        mtp_modules=modules if args.mtp is None else min(args.mtp, modules),
    )
    run(command(target, settings(args), args.vllm))
    return 0


def serve_here(args: Args) -> int:
    """Load the model and serve it."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"`step35 serve` needs {error.name}; install it: pip install 'step35[serve]'.") from None
    from step35.engine.async_llm import AsyncLLM
    from step35.runtime.device import set_threads

    set_threads()
    dtype = "float32" if args.dtype == "auto" else args.dtype
    llm = AsyncLLM(
        args.path,
        dtype=dtype,
        quantization=args.quantization,
        mtp=args.mtp,
        max_batch=args.max_concurrent,
        max_context=args.max_context,
        adaptive_depth=args.adaptive_depth,
        draft_vocabulary=args.draft_vocabulary,
    )
    try:
        return serve(args, llm)
    finally:
        llm.close()


def served_name(args: Args) -> str:
    """Return the name that clients ask for."""
    return args.model_name or args.path.resolve().name


def settings(args: Args, **known: Any) -> ServeSettings:
    """Return the server's settings among the arguments; `known` ones win."""
    return ServeSettings(**{field: getattr(args, field) for field in ServeSettings.model_fields} | known)


def drafts(args: Args, llm: Any) -> int:
    """Return the MTP drafts a step: those asked for, or one for each module."""
    return len(llm.model.mtp) if args.speculate is None else args.speculate


def serve(args: Args, llm: Any) -> int:
    """Listen, say where, and answer."""
    from step35.serve.app import create_app
    from step35.serve.server import DrainingServer, listen, log_to_stderr

    name, known = served_name(args), {"speculate": drafts(args, llm), "max_context": llm.max_context}
    app = create_app(llm, llm.tokenizer, model_name=name, settings=settings(args, **known))
    try:
        listener = listen(args.host, args.port)  # before we say where: from then on clients may come
    except OSError as error:
        raise ConfigError(f"cannot listen on {args.host}:{args.port} ({error}); choose another --port.") from None
    log_to_stderr()
    print(welcome(args, name, listener.getsockname()[1]), flush=True)
    DrainingServer(app, host=args.host, port=args.port).run(sockets=[listener])
    return 0


def welcome(args: Args, name: str, port: int) -> str:
    """Return the addresses and an example call."""
    address = f"http://{args.host}:{port}"
    key = " -H 'Authorization: Bearer KEY'" if args.api_key else ""
    question = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "What is 4821 * 77?"}}]}}'
    return (
        f"serving {name} at {address}/v1\n"
        f"chat page: {address}/\n\n"
        f"  curl {address}/v1/chat/completions{key} -H 'Content-Type: application/json' \\\n    -d '{question}'\n"
    )
