"""Build a tokenizer and memory-mapped token shards from the text on this machine, and from files of your own."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from step35.config.data import PrepareConfig


class Args(PrepareConfig):
    """Settings of the corpus."""

    out: Path = Path("runs/data")
    """Folder for tokenizer/, train/ (or sources/NAME/), val/ and prepare.json."""
    context: int = Field(default=256, ge=8)
    """Row length on which the unigram and bigram baselines are computed."""
    dry_run: bool = False
    """Print the resolved settings, and stop."""


def main(args: Args) -> int:
    """Prepare the data and print what it holds."""
    from step35.cli.dry_run import show_settings
    from step35.cli.stages import prepare_data
    from step35.runtime.console import Console

    console = Console()
    if args.dry_run:
        show_settings(args, console)
        return 0
    settings = PrepareConfig.model_validate(args.model_dump(include=set(PrepareConfig.model_fields)))
    data = prepare_data(args.out, settings, console, context=args.context)
    rows = [
        *((f"training tokens, {name}", f"{shards.total_tokens:,}") for name, shards in data.sources.items()),
        ("validation tokens", f"{data.val.total_tokens:,}"),
        ("vocabulary", f"{data.tokenizer.vocab_size:,}"),
        ("unigram loss (nats per token)", f"{data.unigram_loss:.3f}"),
        ("bigram loss (nats per token)", f"{data.bigram_loss:.3f}"),
    ]
    console.table(f"data in {args.out}", ["figure", "value"], rows)
    return 0
