"""HTTP in front of any `AsyncSampler`: OpenAI's and Anthropic's dialects, limits, metrics."""
