"""Synthetic demonstrations whose tool outputs are really executed."""
