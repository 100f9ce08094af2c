"""What the page of `eqvae explore` asks for: an image is encoded once, and a move of a slider decodes once."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from eqvae.artifacts.records import to_uint8
from eqvae.autoencoders.padding import check_reflection, padding_mode_of
from eqvae.autoencoders.protocol import Autoencoder, Posterior
from eqvae.drawing.charts import autoencoder_colors
from eqvae.drawing.evaluation_charts import SpectrumChart, SpectrumLine, spectrum_chart
from eqvae.drawing.exploration import Row, Seen, draw_rows, error_map, framed, framed_map
from eqvae.drawing.folders import Spectrum
from eqvae.drawing.latent_maps import LatentPainter, latent_painters
from eqvae.drawing.pictures import draw_grid, turned_grid
from eqvae.equivariance import Decoded, decode_pair
from eqvae.errors import UserError
from eqvae.images import ImageSource, Pixels, adm_crop, decode_image, to_images
from eqvae.images.sizes import ImageSize
from eqvae.methods import Batch, Drawn, Pair
from eqvae.methods.warping import Motion
from eqvae.metrics.per_image import equivariance_error, psnr_db
from eqvae.metrics.spectrum import SpectrumSums, high_frequency_excess_db, images_on_latent_grid
from eqvae.transforms import Compose, Rotate, Scale, Transform

NUM_REMEMBERED = 4
"""Pictures whose latents are kept."""

NUM_FRAMES = 24
"""Of an animation: every 15 degrees, so that quarter turns are among them."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the page's controls are set to."""

    picture: str | Path
    """A name from the list, or the file that was dropped in."""

    num_cells: int
    """To which a side of the coarsest latent is scaled."""

    degrees: float = 0.0
    right: float = 0.0
    down: float = 0.0

    method: str | None = None
    """The pair that acts in place of the sliders."""

    draw: int = 0
    """Which of the pair's draws."""


class EncodedPicture(NamedTuple):
    """A picture and its latents."""

    x: Float[Tensor, "2 k h w"]
    """With its mirror image, the neighbour in pairs that mix images."""

    latents: tuple[Float[Tensor, "2 _ _ _"], ...]
    """One for each autoencoder, raw."""

    painters: list[LatentPainter]


class Acted(NamedTuple):
    """What a pair draws for an autoencoder, and on what it acts."""

    drawn: Drawn
    x: Float[Tensor, "n k h w"]
    z: Float[Tensor, "n c h2 w2"]


class Views:
    """Autoencoders side by side on the same picture."""

    def __init__(
        self,
        autoencoders: Mapping[str, Autoencoder],
        pictures: Mapping[str, tuple[ImageSource, int]],
        pairs: Mapping[str, Pair],
        *,
        pixels: Pixels,
        image_size_px: int,
        device: torch.device,
    ) -> None:
        """Take all by the names that the page prints; a picture is an image of a source, read as `pixels` says."""
        self.names, self._models = list(autoencoders), list(autoencoders.values())
        self.pictures, self.pairs = pictures, pairs
        self.pixels, self.image_size_px, self.device = pixels, image_size_px, device
        self.num_cells = image_size_px // max(model.stride for model in self._models)
        self.encoded = lru_cache(NUM_REMEMBERED)(self._encode)
        self._part = lru_cache(None)(self._build)

    def spectra(self, choice: Choice) -> SpectrumChart | None:
        """Compare the latents' spectra with the image's; a picture without detail has none."""
        found = self.encoded(choice.picture)
        colors, lines = autoencoder_colors(self.names), []
        for name, model, z in zip(self.names, self._models, found.latents, strict=True):
            sums = SpectrumSums(), SpectrumSums()
            try:
                for each, values in zip(sums, (z, images_on_latent_grid(found.x, model.stride)), strict=True):
                    each.add(values[:1])
                latent, image = (each.spectrum() for each in sums)
                excess_db = high_frequency_excess_db(latent, image)
            except ValueError:
                return None
            spectrum = Spectrum(
                frequency=latent.frequency.numpy(), latent_power=latent.power.numpy(), image_power=image.power.numpy()
            )
            lines.append(SpectrumLine(name=name, color=colors[name], spectrum=spectrum, excess_db=excess_db))
        return spectrum_chart(tuple(lines))

    @torch.inference_mode()
    def reconstructed(self, choice: Choice) -> list[Row]:
        """x, D(E(x)) and E(x)."""
        found = self.encoded(choice.picture)
        x, rows = found.x[:1], []
        for index, (name, autoencoder) in enumerate(zip(self.names, self._models, strict=True)):
            z = found.latents[index][:1]
            decoded = autoencoder.decode(z).float()
            seen = (self._seen("x", x), self._seen("D(E(x))", decoded), self._map("E(x)", z, found, index))
            rows.append(Row(name=name, seen=seen, figures=(_psnr(x, decoded),)))
        return rows

    @torch.inference_mode()
    def encoded_then_moved(self, choice: Choice) -> list[Row]:
        """a(x) and D(b(E(x))): one decoding for each autoencoder."""
        found, words, rows = self.encoded(choice.picture), _formulas(choice), []
        for index, name in enumerate(self.names):
            acted, pair = self._decoded(choice, found, index)
            mask, target, decoded = acted.drawn.mask, pair.target[:1].float(), pair.decoded[:1].float()
            counted = decoded if mask is None else torch.where(mask[:1] > 0, decoded, target)
            seen = (
                self._seen(words.target, target),
                self._seen(words.decoded, decoded),
                Seen(formula="difference", picture=error_map(counted, target, self.image_size_px)),
                self._map(words.latent, pair.latents[:1], found, index),
            )
            rows.append(Row(name=name, seen=seen, figures=(_psnr(target, counted), acted.drawn.name)))
        return rows

    @torch.inference_mode()
    def moved_then_encoded(self, choice: Choice) -> list[Row]:
        """E(a(x)) and D(E(a(x))), which the others should equal: an encoding and a decoding more."""
        found, words, rows = self.encoded(choice.picture), _formulas(choice), []
        for index, (name, autoencoder) in enumerate(zip(self.names, self._models, strict=True)):
            acted = self._act(choice, found, index)
            target = acted.drawn.image(acted.x)[:1]
            own = autoencoder.encode(target).mode()
            decoded = autoencoder.decode(own).float()
            error = float(equivariance_error(acted.drawn.latent(acted.z)[:1], own))
            seen = (self._map(words.own_latent, own, found, index), self._seen(words.own_decoded, decoded))
            figures = (_psnr(target.float(), decoded), f"latent error {error:.3f}")
            rows.append(Row(name=name, seen=seen, figures=figures))
        return rows

    def still(self, choice: Choice) -> Image.Image:
        """All pictures of a choice as one."""
        halves = zip(self.encoded_then_moved(choice), self.moved_then_encoded(choice), strict=True)
        return draw_rows([replace(left, seen=(*left.seen, *right.seen)) for left, right in halves])

    @torch.inference_mode()
    def rotation(self, choice: Choice) -> list[Image.Image]:
        """Turn the image and its latents once around: tau o x, and D(tau o E(x)) of each autoencoder."""
        found, frames = self.encoded(choice.picture), []
        for number in range(NUM_FRAMES):
            turned = replace(choice, method=None, degrees=choice.degrees + 360.0 * number / NUM_FRAMES)
            pairs = [self._decoded(turned, found, index)[1] for index in range(len(self._models))]
            decoded = {name: self._framed(pair.decoded) for name, pair in zip(self.names, pairs, strict=True)}
            frames.append(draw_grid(turned_grid(self._framed(pairs[0].target), decoded)))
        return frames

    @torch.inference_mode()
    def _encode(self, picture: str | Path) -> EncodedPicture:
        if isinstance(picture, Path):
            image = decode_image(picture, picture.name, self.pixels)
        else:
            source, index = self.pictures[picture]
            image = source.read(index)
        x = to_images([adm_crop(image, self.image_size_px)]).to(self.device)
        x = torch.cat([x, x.flip(-1)])
        latents = tuple(autoencoder.encode(x).mode().float() for autoencoder in self._models)
        return EncodedPicture(x=x, latents=latents, painters=latent_painters([z[:1] for z in latents]))

    def _act(self, choice: Choice, found: EncodedPicture, index: int) -> Acted:
        """Draw what happens, the same in every call; pairs that mix images have the mirror image as well."""
        autoencoder, z = self._models[index], found.latents[index]
        if choice.method is None:
            tau = self._tau(choice)
            check_reflection(padding_mode_of(autoencoder), choice.num_cells)
            return Acted(Drawn(image=tau, latent=tau, name=str(tau)), found.x[:1], z[:1])
        pair = self.pairs[choice.method]
        count = 1 if _takes(pair, autoencoder, self.image_size_px) else 2
        pair.check(autoencoder, image_size=ImageSize.of(self.image_size_px), num_images=count)
        batch = Batch(
            x=found.x[:count],
            stride=autoencoder.stride,
            latent_channels=autoencoder.latent_channels,
            generator=torch.Generator().manual_seed(choice.draw),
            part=self._part(choice.method, index),
        )
        drawn = pair.act(batch)
        x = drawn.before(batch.x)
        return Acted(drawn, x, z[:count] if x is batch.x else autoencoder.encode(x).mode())

    def _decoded(self, choice: Choice, found: EncodedPicture, index: int) -> tuple[Acted, Decoded]:
        acted, autoencoder = self._act(choice, found, index), self._models[index]
        return acted, decode_pair(autoencoder, acted.x, Posterior(mean=acted.z), acted.z, acted.drawn)

    def _tau(self, choice: Choice) -> Transform:
        """As exact as it can be: quarter turns and whole cells as in the paper, the rest by looking up places."""
        turns, degrees = divmod(choice.degrees % 360.0, 90.0)
        parts: list[Transform] = []
        if degrees or choice.right or choice.down:
            parts.append(Motion(degrees=degrees, right=choice.right, down=choice.down))
        if choice.num_cells != self.num_cells:
            share = Fraction(choice.num_cells, self.num_cells)
            parts.append(Scale(share, share))
        if turns:
            parts.append(Rotate(int(turns)))
        return Compose(*parts)

    def _build(self, method: str, index: int) -> nn.Module | None:
        """Make what a pair would learn; nothing has been learned here."""
        autoencoder = self._models[index]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            part = self.pairs[method].build(autoencoder, image_size_px=self.image_size_px)
        return None if part is None else part.to(self.device)

    def _seen(self, formula: str, x: Float[Tensor, "_ k h w"]) -> Seen:
        return Seen(formula=formula, picture=self._framed(x))

    def _framed(self, x: Float[Tensor, "_ k h w"]) -> UInt8[Tensor, "1 3 h2 w2"]:
        return framed(x[:1], self.image_size_px)

    def _map(self, formula: str, z: Float[Tensor, "1 c h w"], found: EncodedPicture, index: int) -> Seen:
        stride = self._models[index].stride
        return Seen(formula=formula, picture=framed_map(found.painters[index].paint(z), stride, self.image_size_px))


class Formulas(NamedTuple):
    """What is seen, in the paper's letters."""

    target: str
    decoded: str
    latent: str
    own_latent: str
    own_decoded: str


def _formulas(choice: Choice) -> Formulas:
    if choice.method is None:
        return Formulas("τ∘x", "D(τ∘E(x))", "τ∘E(x)", "E(τ∘x)", "D(E(τ∘x))")
    return Formulas("a(x)", "D(b(E(x)))", "b(E(x))", "E(a(x))", "D(E(a(x)))")


def _takes(pair: Pair, autoencoder: Autoencoder, image_size_px: int) -> bool:
    """Whether a single image will do."""
    try:
        pair.check(autoencoder, image_size=ImageSize.of(image_size_px), num_images=1)
    except UserError:
        return False
    return True


def _psnr(target: Float[Tensor, "1 k h w"], decoded: Float[Tensor, "1 k h w"]) -> str:
    return f"PSNR {float(psnr_db(to_uint8(target), to_uint8(decoded))):.1f} dB"
