"""Learning SAM: losses, interactive prompts, MAE pre-training, and the trainer."""
