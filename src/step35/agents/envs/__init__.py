"""Environments with verifiable rewards; each follows `step35.api.environment.Environment`."""
