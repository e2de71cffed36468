"""Single-device mathematics: read `step35.py` from embedding to logits."""
