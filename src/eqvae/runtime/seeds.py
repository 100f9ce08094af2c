"""Randomness derived from a seed and indices, never from the order in which workers or processes ask for it."""

import numpy as np
import torch


def generator_for(*key: int) -> torch.Generator:
    """Make a generator that depends on its key alone."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)
