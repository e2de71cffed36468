"""From text to batches: sources, tokenizer, token shards, packing and loaders. No torch in this folder."""
