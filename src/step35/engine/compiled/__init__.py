"""Passes over few rows as one compiled call each, without Python between layers (CPU)."""
