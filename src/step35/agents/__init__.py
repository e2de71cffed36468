"""Agents: tools to call, environments that judge, synthetic demonstrations to learn from."""
