"""EQ-VAE fine-tuning: the objective in `equivariance.py`, the run in `loop.py`."""
