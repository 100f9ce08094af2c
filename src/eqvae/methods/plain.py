"""The control: more training, nothing else."""

from dataclasses import field

from eqvae.methods.protocol import Batch, Drawn, Pair
from eqvae.methods.registry import method


@method("plain")
class Plain(Pair):
    """`L(x, D(z))`, Equation 1: the control."""

    p: float = field(init=False, default=1.0)

    def act(self, batch: Batch) -> Drawn:
        """Change nothing."""
        del batch
        return Drawn()
