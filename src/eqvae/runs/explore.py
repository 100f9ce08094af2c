"""`eqvae explore`: a local page that shows what autoencoders make of transformed images."""

import webbrowser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Annotated

import tyro

from eqvae.autoencoders import Autoencoder, load_autoencoder
from eqvae.errors import UserError
from eqvae.images import ImageSource, Pixels, RangeConfig, open_images
from eqvae.images.sources import announce_channels
from eqvae.methods import METHODS, Pair, parse_method
from eqvae.metrics.autoencoder import check_image_size
from eqvae.runs.explore_page import serve
from eqvae.runs.explore_views import Views
from eqvae.runtime.device import choose_device, place
from eqvae.runtime.journal import say
from eqvae.runtime.run_folder import AT_LEAST_1, check_ranges
from eqvae.runtime.signals import stop_on_signals

_PORTS = (("a port, 0 to 65535", lambda value: 0 <= value <= 65535), ("port",))


@dataclass(frozen=True, kw_only=True)
class ExploreConfig:
    """Look into latents: a page on this machine alone, with sliders for tau, autoencoders below each other."""

    autoencoders: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="AUTOENCODER ...")]
    """Presets, hub ids or paths, the base first; a fine-tuning run's folder stands for the model it exported."""

    data: str = "photos"
    """Pictures to choose from: `photos`, an image folder, `*.parquet`, tar shards or `hf:NAME[:SPLIT]`. Others can be
    dropped into the page; they stay on this machine."""

    num_pictures: int = 12
    """The first images of the data, at most."""

    value_range: Annotated[RangeConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=RangeConfig)

    image_size: int = 128
    """Side of the centre crops, in px."""

    method: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="METHOD")] = ()
    """Offer this pair too, as `finetune --method` has it: `eq(transforms=anisotropic)`; may be given repeatedly."""

    port: int = 7860
    """Of 127.0.0.1, which no other machine can reach; 0: any free one."""

    open_browser: bool = True
    """Open the page in the standard browser."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""


def command(config: ExploreConfig) -> None:
    """Serve the page until Ctrl-C."""
    explore(config)


def explore(config: ExploreConfig) -> None:
    """Serve a page to look into autoencoders' latents until a signal comes; nothing is written.

    Args:
        config: The autoencoders and the pictures to choose from.

    Raises:
        UserError: If the input is wrong, the port is taken, or the page's library is not installed.
    """
    views = make_views(config)
    with stop_on_signals() as asked, serve(views, port=config.port) as page:
        say(f"{page.address} shows {', '.join(views.names)}; Ctrl-C ends it")
        if config.open_browser:
            webbrowser.open(page.address)
        while not asked and page.is_up():
            page.wait(sec=0.2)


def make_views(config: ExploreConfig) -> Views:
    """Load the autoencoders, list the pictures and the pairs."""
    check_ranges(config, ((AT_LEAST_1, ("num_pictures",)), _PORTS))
    if not config.autoencoders:
        raise UserError("eqvae explore has no autoencoder to show", "Name one or more: eqvae explore tiny-kl")
    device, pairs = choose_device(config.device), list_pairs(config)
    sources = [open_images(config.data, split="evaluation")]
    # Of the built-in photographs those that no packaged autoencoder was trained on come first.
    sources += [open_images("photos", split="train")] if config.data == "photos" else []
    loaded = {name: load_autoencoder(name) for name in config.autoencoders}
    for autoencoder in loaded.values():
        check_image_size(config.image_size, autoencoder.stride)
    pixels = Pixels(channels=_common_channels(loaded), range=config.value_range)
    pictures = list_pictures([source.read_as(pixels) for source in sources], config.num_pictures)
    announce_channels(pixels.channels)
    return Views(
        {name: place(autoencoder, device) for name, autoencoder in loaded.items()},
        pictures,
        pairs,
        pixels=pixels,
        image_size_px=config.image_size,
        device=device,
    )


def _common_channels(autoencoders: Mapping[str, Autoencoder]) -> int:
    """Find the channels of the pictures that all can be shown."""
    found = {autoencoder.image_channels: name for name, autoencoder in autoencoders.items()}
    if len(found) > 1:
        said = " and ".join(f"'{name}' pictures of {channels}" for channels, name in found.items())
        raise UserError(f"One page can't show both: {said} channels", "Open a page for each")
    return next(iter(found))


def list_pictures(sources: Sequence[ImageSource], num_pictures: int) -> dict[str, tuple[ImageSource, int]]:
    """Name the first pictures: by their files' names where these differ."""
    found = [(source, index) for source in sources for index in range(len(source))][:num_pictures]
    paths = [PurePath(source.label(index)) for source, index in found]
    is_told_by_name = len({path.name for path in paths}) == len(paths)
    return {path.name if is_told_by_name else str(path): chosen for path, chosen in zip(paths, found, strict=True)}


def list_pairs(config: ExploreConfig) -> dict[str, Pair]:
    """Name the registered pairs, and those of the command line."""
    found: dict[str, Pair] = {name: kind() for name, kind in METHODS.items() if issubclass(kind, Pair)}
    for text in config.method:
        part, *others = parse_method(text)
        if others or not isinstance(part.method, Pair):
            raise UserError(f"--method '{text}' is no single pair", "The page shows one pair at a time, and no terms")
        found[text] = part.method
    return found
