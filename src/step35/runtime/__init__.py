"""The machine below the mathematics: errors, run directories, checkpoints, metrics, console."""
