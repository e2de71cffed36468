"""Tools that a model may call, one a file; each follows `step35.api.tools.Tool`."""
