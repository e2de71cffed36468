"""Inference: requests, caches, sampling and speculative decoding behind `api.Sampler`."""
