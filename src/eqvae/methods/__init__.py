"""First-stage methods: what can be done to an autoencoder so that a generator learns its latents better.

Each is one file: a pair, `L(a(x), D(b(z)))`, or a term added to the objective.
"""

import importlib

from eqvae.methods.mixture import Chosen, Mixture, Part, normal_form, parse_method
from eqvae.methods.protocol import Action, Batch, Drawn, Encoded, Method, Pair, Term
from eqvae.methods.registry import METHODS, method, names_of, table

for _file in (
    "eq", "se", "dsm", "photometric", "blend", "affine", "elastic", "viewpoint", "detok", "rae_noise", "gae", "lmr",
    "uae", "channel_drop", "plain", "kl", "explicit", "vf", "esm", "lcr", "af", "tv", "lowpass",
):  # fmt: skip
    importlib.import_module(f"eqvae.methods.{_file}")  # in the order in which they are listed

__all__ = [
    "METHODS", "Action", "Batch", "Chosen", "Drawn", "Encoded", "Method", "Mixture", "Pair", "Part", "Term", "method",
    "names_of", "normal_form", "parse_method", "table",
]  # fmt: skip
