"""Reinforcement learning: rollouts through `Sampler`, judged by `Environment`, learned from by MIS-PO."""
