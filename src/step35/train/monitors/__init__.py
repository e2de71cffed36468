"""Numbers about training health, each with its formula."""
