"""Large pictures a tile at a time: networks then take the memory of a tile.

A network without attention and without norms over the whole picture sees its neighbourhood. How far is measured: one
cell of a trial is NaN, and what becomes NaN has seen it. What lies as near to a tile's edge is left to the next tile,
so that all tiles together are the whole, up to rounding. Where a network sees everything, tiles differ from the whole
(docs/shapes.md has figures); they overlap by a quarter and are blended.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder, Posterior
from eqvae.errors import UserError
from eqvae.runtime.journal import say_once

_LEAST_CELLS = 4
_OVERLAP = 4
"""Blended tiles overlap by one in so many."""


@contextmanager
def in_tiles(autoencoder: Autoencoder, tile_px: int | None) -> Iterator[None]:
    """Encode and decode pictures that are larger than a tile in tiles, as long as the context lasts.

    Args:
        autoencoder: Its `encode`, `decode` and, where it is discrete, `decode_quantized` are replaced meanwhile.
        tile_px: Side of what networks see at once, in px; None changes nothing.

    Yields:
        Nothing.

    Raises:
        UserError: If a tile is no whole number of cells, or has fewer than 4 on a side.
    """
    if tile_px is None:
        yield
        return
    stride = autoencoder.stride
    check_tile(tile_px, stride)
    decode = "decode_quantized" if isinstance(autoencoder, DiscreteAutoencoder) else "decode"
    encode_whole, decode_whole, cells = autoencoder.encode, getattr(autoencoder, decode), tile_px // stride

    def encode_stacked(x: Tensor) -> Tensor:
        posterior = encode_whole(x)
        both = (posterior.mean, posterior.log_variance)
        return torch.cat([part for part in both if part is not None], dim=1)

    encoder = _Tiled("encoder", encode_stacked, cells, px_in=stride, px_out=1)
    decoder = _Tiled("decoder", decode_whole, cells, px_in=1, px_out=stride)

    def encode(x: Float[Tensor, "n _ h w"]) -> Posterior:
        stacked = encoder(x)
        if stacked.shape[1] == autoencoder.latent_channels:
            return Posterior(mean=stacked)
        mean, log_variance = stacked.chunk(2, dim=1)
        return Posterior(mean=mean, log_variance=log_variance)

    own = autoencoder.__dict__
    former = {name: own[name] for name in ("encode", decode) if name in own}  # compiled ones, say
    own |= {"encode": encode, decode: decoder}
    try:
        yield
    finally:
        del own["encode"], own[decode]
        own |= former


def check_tile(tile_px: int | None, stride: int) -> None:
    """Refuse tiles that are no whole number of cells, or have fewer than 4 on a side."""
    if tile_px is not None and (tile_px % stride or tile_px < _LEAST_CELLS * stride):
        below = max(tile_px // stride, _LEAST_CELLS) * stride
        raise UserError(
            f"--tile {tile_px} is no multiple of the stride {stride}, or less than {_LEAST_CELLS} cells",
            f"Use {below} or {below + stride}, for example",
        )


class _Span(NamedTuple):
    """A tile along one axis, in cells."""

    first: int
    end: int
    """What the network sees."""

    kept_first: int
    kept_end: int
    """What is kept of it where tiles don't blend."""


def _spans(length: int, tile: int, reach: int) -> list[_Span]:
    """Cut an axis into tiles, each of which keeps what is farther than `reach` from its own edges."""
    spans, kept = list[_Span](), 0
    while kept < length:
        first = max(kept - reach, 0)
        end = first + tile
        if end >= length:
            spans.append(_Span(max(length - tile, 0), length, kept, length))
            break
        spans.append(_Span(first, end, kept, end - reach))
        kept = end - reach
    return spans


@dataclass
class _Tiled:
    """An encoder or a decoder that works on tiles."""

    name: str

    code: Callable[[Tensor], Tensor]

    tile: int
    """Side in cells."""

    px_in: int
    """Values of the input in a cell, along a side."""

    px_out: int
    """Of the output."""

    reaches: dict[torch.device, int | None] = field(default_factory=dict)
    """How many cells around its own a cell of the output has seen; None: all of a tile."""

    def __call__(self, x: Float[Tensor, "n c _ _"]) -> Float[Tensor, "n c2 _ _"]:
        """Code a picture or a latent, in tiles where it is larger than one."""
        rows, columns = (side // self.px_in for side in x.shape[-2:])
        if max(rows, columns) <= self.tile:
            return self.code(x)
        if x.device not in self.reaches:
            self.reaches[x.device] = self._measure_reach(x)
        reach = self.reaches[x.device]
        margin = max(self.tile // _OVERLAP // 2, 1) if reach is None else reach
        outputs: Tensor | None = None
        weights = torch.zeros(1, 1, rows * self.px_out, columns * self.px_out, device=x.device)
        for down in _spans(rows, self.tile, margin):
            for right in _spans(columns, self.tile, margin):
                coded = self.code(x[..., self._of(down, self.px_in), self._of(right, self.px_in)].contiguous())
                if outputs is None:
                    outputs = coded.new_zeros(*coded.shape[:2], *weights.shape[-2:])
                if reach is None:
                    weight = self._weigh(down, rows, margin, x)[:, None] * self._weigh(right, columns, margin, x)
                    place = (..., self._of(down, self.px_out), self._of(right, self.px_out))
                    outputs[place] += weight.to(coded.dtype) * coded
                    weights[place] += weight
                else:
                    target, source = zip(*(self._kept(span) for span in (down, right)), strict=True)
                    outputs[(..., *target)] = coded[(..., *source)]
        assert outputs is not None  # there is a tile at least
        return outputs if reach is not None else outputs / weights.to(outputs.dtype)

    def _of(self, span: _Span, px: int) -> slice:
        return slice(span.first * px, span.end * px)

    def _kept(self, span: _Span) -> tuple[slice, slice]:
        """Where the output's kept part lies in the whole, and where in the tile."""
        first, end = span.kept_first * self.px_out, span.kept_end * self.px_out
        offset = span.first * self.px_out
        return slice(first, end), slice(first - offset, end - offset)

    def _weigh(self, span: _Span, length: int, margin: int, x: Tensor) -> Float[Tensor, " side"]:
        """Rise from a tile's edge to 1 within the overlap, two margins wide, unless the edge is the picture's."""
        side = (span.end - span.first) * self.px_out
        from_edge = (torch.arange(side, device=x.device) + 0.5) / (2 * margin * self.px_out)
        weight = torch.ones(side, device=x.device)
        weight = weight if span.first == 0 else torch.minimum(weight, from_edge)
        return weight if span.end == length else torch.minimum(weight, from_edge.flip(0))

    @torch.no_grad()
    def _measure_reach(self, like: Tensor) -> int | None:
        """Make the middle cell of a tile NaN and see how far NaN gets; None where it gets to the edge."""
        trial, middle = like.new_zeros(1, like.shape[1], *[self.tile * self.px_in] * 2), self.tile // 2
        cell = slice(middle * self.px_in, (middle + 1) * self.px_in)
        trial[..., cell, cell] = torch.nan
        seen = self.code(trial).isnan().any(1)[0]
        cells = seen.unflatten(1, (self.tile, self.px_out)).unflatten(0, (self.tile, self.px_out)).any(3).any(1)
        places = cells.nonzero()
        tile_px = self.tile * max(self.px_in, self.px_out)
        if len(places) == 0 or int(places.min()) == 0 or int(places.max()) == self.tile - 1:
            say_once(f"the {self.name} sees all of a tile of {tile_px} px: blended tiles differ from the whole")
            return None
        reach = int((places - middle).abs().max())
        px = reach * max(self.px_in, self.px_out)
        say_once(f"the {self.name} sees {px} px around: tiles of {tile_px} px that overlap by twice that are the whole")
        return reach
