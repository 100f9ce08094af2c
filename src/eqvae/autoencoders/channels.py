"""An autoencoder for images of other channels than its own: a start for fine-tuning, made of what it has learnt."""

from typing import Any

from torch import Tensor

from eqvae.artifacts.files import load_strictly
from eqvae.autoencoders.loading import build_architecture, load_autoencoder
from eqvae.autoencoders.presets import PRESETS, UNTRAINED
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import UserError


def load_with_channels(name: str, num_channels: int) -> Autoencoder:
    """Load an autoencoder and give its first and its last convolution another number of channels.

    Each new channel begins as the mean of the old ones: the encoder's weights times old / new, so that an image all of
    whose channels are alike is encoded as it was, and the decoder's as they are, so that each channel is decoded to
    what was the mean. `untrained:NAME` gets its random weights anew.
    """
    if num_channels < 1:
        raise UserError(f"--channels {num_channels} is no number of channels", "Give 1 for grey, 5 for five bands")
    changed = {"in_channels": num_channels, "out_channels": num_channels}
    if name.startswith(UNTRAINED) and name.removeprefix(UNTRAINED) in PRESETS:
        architecture = PRESETS[name.removeprefix(UNTRAINED)].architecture
        return build_architecture(architecture.class_name, {**architecture.config, **changed}, name=name, seed=0)
    autoencoder = load_autoencoder(name)
    if autoencoder.image_channels == num_channels:
        raise UserError(f"'{name}' has images of {num_channels} channels already", "Leave --channels out")
    model: Any = autoencoder.model
    # Without diffusers' notes: it would take fields that `_use_default_values` lists for its own defaults.
    config = {key: value for key, value in dict(model.config).items() if not key.startswith("_")} | changed
    wider = build_architecture(type(model).__name__, config, name=autoencoder.name, seed=0)
    expected, old = wider.model.state_dict(), autoencoder.image_channels
    state = {name: _spread(each, expected[name], old, num_channels) for name, each in model.state_dict().items()}
    load_strictly(wider.model, state, source=name)
    return wider


def _spread(tensor: Tensor, expected: Tensor, old: int, new: int) -> Tensor:
    """Give a tensor as many channels as are expected, where its shape differs."""
    if tensor.shape == expected.shape:
        return tensor
    if tensor.shape[0] == expected.shape[0]:  # the first convolution
        return (tensor.mean(1, keepdim=True) * (old / new)).expand(expected.shape).clone()
    # The last one; several numbers of a channel stand together where pixels are shuffled.
    return tensor.unflatten(0, (old, -1)).mean(0).repeat(new, *[1] * (tensor.ndim - 1))
