"""The training recipe: Muon, balance, schedules, losses, monitors, and the loop that survives interruption."""
