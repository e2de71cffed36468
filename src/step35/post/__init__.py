"""Post-training: supervised fine-tuning and reinforcement learning, over the same trainer and protocols."""
