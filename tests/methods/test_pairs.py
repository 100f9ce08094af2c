"""Pairs: their identity draws are Equation 1, they commute with an averaging autoencoder, and all processes agree."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch

from eqvae.equivariance import decode_pair
from eqvae.errors import UserError
from eqvae.images.sizes import ImageSize
from eqvae.losses.reconstruction import l1_distance
from eqvae.methods import METHODS, Batch, Drawn, Pair, parse_method
from eqvae.methods.colours import fit_colours
from eqvae.methods.uae import zigzag
from eqvae.runtime.processes import Processes

PAIRS = [name for name, kind in METHODS.items() if issubclass(kind, Pair)]


@pytest.fixture
def x():
    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def batch_of(x, autoencoder, pair=None, seed: int = 0, **changes) -> Batch:
    part = pair.build(autoencoder, image_size_px=x.shape[-1]) if pair is not None else None
    return Batch(
        x=x, stride=autoencoder.stride, latent_channels=autoencoder.latent_channels, part=part,
        generator=torch.Generator().manual_seed(seed), **changes,
    )  # fmt: skip


def read(text: str) -> Pair:
    (part,) = parse_method(text)
    assert isinstance(part.method, Pair)
    return part.method


def draw(text: str, x, autoencoder, seed: int = 0) -> Drawn:
    pair = read(text)
    return pair.draw(batch_of(x, autoencoder, pair, seed))


def loss(autoencoder, x, drawn: Drawn) -> torch.Tensor:
    """`weight L(a(x), D(b(z))) + plain_weight L(x, D(z))` with L1 where the mask counts."""
    posterior = autoencoder.encode(drawn.before(x))
    z = posterior.sample(torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(7)))
    total = torch.zeros(len(x))
    for weight, each in drawn.comparisons():
        pair = decode_pair(autoencoder, drawn.before(x), posterior, z, each)
        counts = 1.0 if each.mask is None else each.mask
        total = total + weight * l1_distance(counts * pair.target, counts * pair.decoded)
    return total


def test_one_factor_must_leave_whole_cells_of_both_sides(small_autoencoder):
    stride = small_autoencoder.stride
    read("se").check(small_autoencoder, image_size=ImageSize(8 * stride, 12 * stride), num_images=1)
    with pytest.raises(UserError, match="leaves no whole cells of a latent of 9 x 16"):
        read("se").check(small_autoencoder, image_size=ImageSize(9 * stride, 16 * stride), num_images=1)


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_take_rectangles(name, small_autoencoder):
    x = torch.rand(4, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for seed in range(3):
        assert bool(loss(small_autoencoder, x, draw(name, x, small_autoencoder, seed)).isfinite().all())


# Identity draws -----------------------------------------------------------------------------------------------------

EXACTLY = [
    "eq(equivariance_probability=0)", "se(weight=0)", "dsm(k=0)", "blend(low=0, high=0)", "detok(max_t=0)",
    "rae-noise(tau=0)", "lmr(ratios=0)", "uae(low=1000000, high=1000000)", "channel-drop(smallest=4)", "plain",
]  # fmt: skip
UP_TO_ROUNDING = [
    "photometric(strength=0)", "affine(kinds=affine, strength=0)", "affine(kinds=perspective, strength=0)",
    "elastic(amplitude=0)", "viewpoint(strength=0)",
]  # fmt: skip


@pytest.mark.parametrize("text", [*EXACTLY, *(f"{name}(p=0)" for name in PAIRS if name not in ("eq", "plain"))])
def test_the_identity_draw_is_equation_1_bit_for_bit(small_autoencoder, x, text):
    always = text if "p=0" in text or "(" not in text or text.startswith("eq") else text.replace("(", "(p=1, ")
    drawn = draw(always, x, small_autoencoder)
    assert torch.equal(loss(small_autoencoder, x, drawn), loss(small_autoencoder, x, Drawn()))


@pytest.mark.parametrize("text", UP_TO_ROUNDING)
def test_no_strength_is_equation_1_up_to_rounding(small_autoencoder, x, text):
    drawn = draw(text.replace("(", "(p=1, "), x, small_autoencoder)
    torch.testing.assert_close(
        loss(small_autoencoder, x, drawn), loss(small_autoencoder, x, Drawn()), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name", PAIRS)
def test_what_is_drawn_fits_together_and_is_no_identity(small_autoencoder, x, name):
    names = set()
    for seed in range(12):
        drawn = draw(name if name in ("eq", "plain") else f"{name}(p=1)", x, small_autoencoder, seed)
        names.add(drawn.name)
        z = small_autoencoder.encode(drawn.before(x)).mean
        target, latent = drawn.image(drawn.before(x)), drawn.latent(z)
        assert [4 * side for side in latent.shape[-2:]] == list(target.shape[-2:])
        assert drawn.mask is None or drawn.mask.shape[-2:] == target.shape[-2:]
        assert latent.isfinite().all()
    assert len(names) > (0 if name in ("plain", "detok", "rae-noise", "gae", "blend") else 1) or name in (
        "photometric", "elastic", "viewpoint"
    )  # fmt: skip
    smallest = read(name).smallest_side(16)
    assert 1 <= smallest <= 16
    assert (smallest < 16) == (name in ("eq", "se", "affine"))


# Equivariance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["eq(transforms=rotation, equivariance_probability=1)", "se(k=2)", "blend(p=1, low=0.1, high=0.9)",
     "affine(p=1, kinds=crop)", "affine(p=1, kinds=flip)", "photometric(p=1)"],
)  # fmt: skip
@pytest.mark.parametrize("seed", range(3))
def test_pairs_commute_with_an_averaging_autoencoder(averaging_autoencoder, x, text, seed):
    encode, drawn = averaging_autoencoder.encode, draw(text, x, averaging_autoencoder, seed)
    torch.testing.assert_close(drawn.latent(encode(x).mean), encode(drawn.image(x)).mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", ["elastic(p=1)", "viewpoint(p=1)", "affine(p=1, kinds=[affine, perspective])"])
def test_warps_move_a_smooth_image_and_its_latent_alike(averaging_autoencoder, text):
    side = torch.arange(128.0) / 128 - 0.5
    ramp = torch.stack([side.expand(128, 128), side[:, None].expand(128, 128), torch.zeros(128, 128)])[None]
    encode = averaging_autoencoder.encode
    for seed in range(3):
        drawn = draw(text, ramp, averaging_autoencoder, seed)
        apart = (drawn.latent(encode(ramp).mean) - encode(drawn.image(ramp)).mean).abs()
        counted = torch.nn.functional.avg_pool2d(drawn.mask, 8) if drawn.mask is not None else torch.ones_like(apart)
        inner = (counted * apart)[..., 4:-4, 4:-4]
        assert inner.max() < 0.02  # a cell is 0.06
        assert (encode(drawn.image(ramp)).mean - encode(ramp).mean).abs().mean() > 0.005


def test_spectrum_masking_is_scipys(small_autoencoder, x):
    drawn = draw("dsm(k=10)", x, small_autoencoder)
    z = small_autoencoder.encode(x).mean.detach()
    u = np.arange(8)
    kept = u[:, None] + u < 5
    for values, ours in ((x, drawn.image(x)), (z, drawn.latent(z))):
        block = values[0, 1, 8:16, 8:16].double().numpy()
        expected = scipy.fft.idctn(kept * scipy.fft.dctn(block, norm="ortho"), norm="ortho")
        np.testing.assert_allclose(ours[0, 1, 8:16, 8:16].numpy(), expected, atol=1e-5)


def test_band_dropping_keeps_the_first_coefficients(small_autoencoder, x):
    assert zigzag(3, 4).tolist() == [[0, 1, 5, 6], [2, 4, 7, 10], [3, 8, 9, 11]]
    z = small_autoencoder.encode(x).mean.detach()
    kept = scipy.fft.dctn(draw("uae(p=1, low=5, high=5)", x, small_autoencoder).latent(z)[0, 0].numpy(), norm="ortho")
    expected = np.where(zigzag(16, 16).numpy() < 5, scipy.fft.dctn(z[0, 0].double().numpy(), norm="ortho"), 0.0)
    np.testing.assert_allclose(kept, expected, atol=1e-5)


def test_the_colour_map_of_latents_is_least_squares(small_autoencoder, x):
    z = small_autoencoder.encode(x).mean.detach()
    w, c0 = fit_colours(batch_of(x, small_autoencoder), z)
    cells = torch.nn.functional.avg_pool2d(x, 4).permute(0, 2, 3, 1).reshape(-1, 3).double().numpy()
    latents = z.permute(0, 2, 3, 1).reshape(-1, 4).double().numpy()
    design = np.concatenate([latents, np.ones((len(latents), 1))], axis=1)
    expected = np.linalg.lstsq(design, cells, rcond=None)[0]
    np.testing.assert_allclose(w.numpy(), expected[:4].T, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(c0.numpy(), expected[4], rtol=1e-6, atol=1e-8)


def test_noise_is_what_the_sources_add(small_autoencoder, x):
    z = small_autoencoder.encode(x).mean.detach()
    sigma = z.double().std(correction=0).float()
    generator = torch.Generator().manual_seed(0)
    t = torch.rand((4, 1, 1, 1), generator=generator)
    noise = torch.randn(z.shape, generator=generator)
    torch.testing.assert_close(draw("detok", x, small_autoencoder).latent(z), (1 - t) * z + t * 3.0 * sigma * noise)
    expected = z + 0.8 * sigma * t * noise
    torch.testing.assert_close(draw("rae-noise", x, small_autoencoder).latent(z), expected)
    generator.manual_seed(0)
    s = 0.25 * torch.randn((4, 1, 1, 1), generator=generator)
    noise = torch.randn(z.shape, generator=generator)
    expected = z / (z.square().mean(1, keepdim=True) + 1e-6).sqrt() + s * noise
    torch.testing.assert_close(draw("gae(p=1)", x, small_autoencoder).latent(z), expected)


def test_masked_cells_hold_the_learned_vector(small_autoencoder, x):
    pair = read("lmr(p=1, ratios=0.25)")
    batch = batch_of(x, small_autoencoder, pair)
    z = pair.draw(batch).latent(small_autoencoder.encode(x).mean)
    vector = batch.part.vector
    is_masked = (z == vector).all(1)
    assert is_masked.sum((1, 2)).tolist() == [64] * 4
    assert (is_masked == is_masked[0]).all()
    z.sum().backward()
    assert vector.grad.flatten().tolist() == [256.0] * 4


# Two views ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def views(tmp_path: Path) -> Path:
    """A scene of two planes, seen from two places: the nearer one, a square, moves two cells, the farther one."""
    side, folder = 64, tmp_path / "views"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(3):
        near, far = (random.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(2))
        row, column = np.mgrid[:side, :side]
        first = np.where(((row >= 24) & (row < 40) & (column >= 24) & (column < 40))[..., None], near, far)
        is_near = (row >= 24) & (row < 40) & (column >= 40) & (column < 56)  # 16 px to the right
        flow = np.where(is_near, -16.0, -8.0)
        source = column + flow
        behind = ~is_near & (row >= 24) & (row < 40) & (source >= 24) & (source < 40)
        flow = np.where(behind | (source < 0), np.nan, flow)
        second = first[row, np.clip(np.nan_to_num(source).astype(int), 0, side - 1)]
        second[behind | (source < 0)] = 77
        np.savez(
            folder / f"{number}.npz", first=first, second=second,
            flow=np.stack([flow, np.where(np.isnan(flow), np.nan, 0.0)], axis=-1).astype(np.float32),
        )  # fmt: skip
    return folder


def test_views_of_whole_cells_commute_where_both_see_the_scene(averaging_autoencoder, x, views):
    drawn = draw(f"viewpoint(p=1, views={views})", x, averaging_autoencoder)
    first = drawn.before(x)
    z, expected = averaging_autoencoder.encode(first).mean, averaging_autoencoder.encode(drawn.image(first)).mean
    mask = torch.nn.functional.avg_pool2d(drawn.mask, 8)
    assert set(mask.flatten().tolist()) == {0.0, 1.0}
    assert 0.7 < mask.mean() < 0.9
    torch.testing.assert_close(mask * drawn.latent(z), mask * expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(drawn.latent(z), expected, atol=1e-2)


def test_views_that_cant_be_used_are_one_line(averaging_autoencoder, x, tmp_path):
    with pytest.raises(UserError, match="holds no view pairs"):
        draw(f"viewpoint(p=1, views={tmp_path})", x, averaging_autoencoder)
    whole = io.BytesIO()
    np.savez(whole, first=np.zeros((64, 64, 3), np.uint8), second=np.zeros((64, 64, 3), np.uint8), flow=["a"])
    for content in (b"nothing", b"", whole.getvalue()[:-40], b"PK" + bytes(100)):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(UserError, match="is no pair of views"):
            draw(f"viewpoint(p=1, views={tmp_path})", x, averaging_autoencoder)
    (tmp_path / "a.npz").write_bytes(whole.getvalue())
    with pytest.raises(UserError, match=r"a flow of \(1,\)"):
        draw(f"viewpoint(p=1, views={tmp_path})", x, averaging_autoencoder)
    with pytest.raises(UserError, match="square views, not of 32x64"):
        read(f"viewpoint(p=1, views={tmp_path})").check(
            averaging_autoencoder, image_size=ImageSize(32, 64), num_images=1
        )
    np.savez(tmp_path / "a.npz", first=np.zeros((8, 8, 3)), second=np.zeros((8, 8, 3)), flow=np.zeros((8, 8, 2)))
    with pytest.raises(UserError, match="Give uint8 views and a float32 flow of --image-size 64"):
        draw(f"viewpoint(p=1, views={tmp_path})", x, averaging_autoencoder)


# Randomness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PAIRS if name not in ("photometric", "viewpoint")])
def test_any_number_of_processes_draws_the_same(small_autoencoder, x, name, monkeypatch):
    monkeypatch.setattr(Batch, "deviation", lambda self, z: torch.tensor(1.5))  # otherwise a sum over processes
    pair = read(name if name in ("eq", "plain") else f"{name}(p=1)")
    part = pair.build(small_autoencoder, image_size_px=64)
    z = small_autoencoder.encode(x).mean.detach()
    whole = replace(batch_of(x, small_autoencoder, seed=3), part=part)
    drawn = pair.draw(whole)
    for rank in (0, 1):
        rows = slice(2 * rank, 2 * rank + 2)
        processes = Processes(rank=rank, count=2, device=torch.device("cpu"))
        batch = replace(batch_of(x[rows], small_autoencoder, seed=3, processes=processes), part=part)
        own = pair.draw(batch)
        assert own.name == drawn.name
        torch.testing.assert_close(own.latent(z[rows]), drawn.latent(z)[rows])
        torch.testing.assert_close(own.image(x[rows]), drawn.image(x)[rows])
        assert torch.equal(torch.randn(3, generator=batch.generator), torch.randn(3, generator=whole.generator)) or rank
