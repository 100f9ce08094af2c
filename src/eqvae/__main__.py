"""`python -m eqvae`, for launchers that start modules: `torchrun --nproc-per-node 8 -m eqvae train ...`."""

from eqvae.cli import main

main()
