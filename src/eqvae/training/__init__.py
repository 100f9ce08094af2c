"""How a run goes: steps, checkpoints, averages of weights."""
