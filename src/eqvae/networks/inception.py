"""Inception-v3 as FID knows it: TensorFlow's network of 2015-12-05, ported by torch-fidelity.

What is read from it is what ADM's evaluator reads (openai/guided-diffusion, evaluations/evaluator.py):

    ADM's graph                             here
    pool_3:0                                the 2048 pooled numbers
    mixed_6/conv:0, channels 0 ... 6        output of `Mixed_6d.branch1x1` after its ReLU; TensorFlow counts the mixed
                                            blocks from 0, so that mixed_6 is torchvision's Mixed_6d
    pool_3 times softmax/logits/MatMul's w  logits without the bias: ADM multiplies by the weight and adds nothing
"""

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from eqvae.artifacts import read_tensors, write_atomically
from eqvae.errors import UserError

WEIGHTS_FILE = URL_INCEPTION_V3.rsplit("/", 1)[1]
"""torch-fidelity's name of the weights, in PyTorch's cache of checkpoints."""

NUM_SPATIAL_CHANNELS = 7
"""Of `mixed_6/conv`; with 17 x 17 positions that makes 2023 numbers, about as many as there are pooled ones."""


@dataclass(frozen=True, kw_only=True)
class InceptionOutputs:
    """What is read from the network."""

    pooled: Float[Tensor, "n 2048"]

    spatial: Float[Tensor, "n 2023"]
    """Position by position, the seven channels of each together, as ADM's arrays have them."""

    logits: Float[Tensor, "n 1008"]
    """Without bias."""


@final
class InceptionV3(nn.Module):
    """The network, frozen, in evaluation mode; images are resized to 299 px as TensorFlow 1 did it."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """Build it."""
        super().__init__()
        # torch-fidelity unpickles whatever file it is given: it gets tensors that were read without, written again.
        file = io.BytesIO()
        torch.save(dict(weights), file)
        file.seek(0)
        self.network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=file
        )
        self._spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        del module, inputs
        self._spatial = output[:, :NUM_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def forward(self, images: UInt8[Tensor, "n 3 h w"]) -> InceptionOutputs:
        """Read the network."""
        pooled, logits = self.network(images)
        spatial, self._spatial = self._spatial, None
        assert spatial is not None
        return InceptionOutputs(pooled=pooled.float(), spatial=spatial.float(), logits=logits.float())


def read_inception_weights(path: Path | None) -> dict[str, Tensor]:
    """Read the weights: from a file, else from PyTorch's cache, else from the network into that cache."""
    if path is not None and not path.is_file():
        raise UserError(f"--weights '{path}' does not exist", f"Give torch-fidelity's {WEIGHTS_FILE}")
    path = (find_inception_weights() or _fetch()) if path is None else path
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        what = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"'{path}' is truncated, holds code or no weights ({what})",
            f"Fetch torch-fidelity's {WEIGHTS_FILE} again",
        ) from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"'{path}' holds no state dict", f"Give torch-fidelity's {WEIGHTS_FILE}")
    return content


def find_inception_weights() -> Path | None:
    """Look into PyTorch's cache."""
    path = _cached_path()
    return path if path.is_file() else None


def _cached_path() -> Path:
    return Path(torch.hub.get_dir(), "checkpoints", WEIGHTS_FILE)


def _fetch() -> Path:
    """Fetch the weights into PyTorch's cache."""
    path = _cached_path()
    checksum = path.stem.rsplit("-", 1)[1]
    try:
        write_atomically(
            path, lambda temporary: torch.hub.download_url_to_file(URL_INCEPTION_V3, str(temporary), checksum, False)
        )
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong checksum is a RuntimeError
        raise UserError(
            f"--features inception needs Inception-v3's TensorFlow weights, which the network does not give ({error})",
            f"Put {WEIGHTS_FILE} of torch-fidelity into '{path.parent}' or name it with --weights, or use "
            "--features efficientnet-lite0, which works offline",
        ) from None
    return path
