"""Evaluation through `Sampler` and `Environment`: accuracy with intervals, acceptance, speed."""
