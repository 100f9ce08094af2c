"""What every stage stands on: errors, devices and precision, journals, checkpoints, EMA, progress."""
