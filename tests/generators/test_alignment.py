"""A trained transformer's ends on other latents: exact where these are turned, else best in least squares."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eqvae.generators.alignment import Alignment, PatchMoments, align, fold
from eqvae.generators.diffusion import DiffusionObjective, GaussianDiffusion
from eqvae.generators.interpolant import Interpolant, InterpolantObjective
from eqvae.generators.protocol import Coupling, LatentSpecification
from eqvae.generators.repa import RepaObjective
from eqvae.generators.transformer import TransformerConfig

VELOCITY = InterpolantObjective(num_classes=5, interpolant=Interpolant(), doubled_output=True)
NOISE = DiffusionObjective(num_classes=5, diffusion=GaussianDiffusion())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(z: Tensor, w: Tensor) -> PatchMoments:
    """Of rows of patches."""
    joint = torch.cov(torch.cat([z, w], dim=1).T, correction=0)
    size = z.shape[1]
    return PatchMoments(
        mean_z=z.mean(0), mean_w=w.mean(0), zz=joint[:size, :size], wz=joint[size:, :size], ww=joint[size:, size:]
    )


def patches(z: Tensor, side: int) -> Tensor:
    return F.unfold(z, side, stride=side).transpose(1, 2)


def unpatch(rows: Tensor, side: int, size: tuple[int, int]) -> Tensor:
    return F.fold(rows.transpose(1, 2), size, side, stride=side)


@pytest.fixture
def turn() -> Tensor:
    """An orthogonal matrix that mixes all 12 values of a patch."""
    return torch.linalg.qr(random(12, 12, seed=3))[0]


def aligned_pair(build_transformer, objective, matrix: Tensor, **changes):
    """A transformer, and the same with its ends aligned with latents `matrix @ z`, patch by patch."""
    old = build_transformer(**changes)
    z = random(400, 12) @ torch.diag(torch.linspace(0.5, 1.5, 12).double())
    z -= z.mean(0)
    alignment = align(moments(z, z @ matrix.T), objective.coupling())
    new = build_transformer(**changes)
    new.load_state_dict(fold(old.state_dict(), alignment, old.config, old.config))
    return old, new, alignment


@pytest.mark.parametrize("objective", [VELOCITY, NOISE, RepaObjective(objective=VELOCITY)])
def test_turned_latents_are_answered_by_the_turned_answer(build_transformer, turn, objective):
    old, new, alignment = aligned_pair(build_transformer, objective, turn)
    torch.testing.assert_close(alignment.noise, turn)
    z, t, labels = random(2, 3, 4, 6, seed=5).float(), torch.tensor([0.2, 0.7]), torch.tensor([0, 5])
    w = unpatch(patches(z, 2) @ turn.T.float(), 2, (4, 6))
    with torch.no_grad():
        before, after = old(z, t, labels), new(w, t, labels)
    expected = unpatch(patches(before[:, :3], 2) @ turn.T.float(), 2, (4, 6))
    torch.testing.assert_close(after[:, :3], expected, rtol=1e-4, atol=1e-4)


def test_swapped_and_negated_channels_keep_their_variances(build_transformer):
    swap = torch.zeros(3, 3).double()
    swap[0, 2], swap[1, 0], swap[2, 1] = 1.0, -1.0, 1.0
    old, new, _ = aligned_pair(build_transformer, NOISE, torch.kron(swap, torch.eye(4).double()))
    z, t, labels = random(2, 3, 4, 6, seed=5).float(), torch.tensor([3, 700]), torch.tensor([0, 5])
    with torch.no_grad():
        before, after = old(z, t, labels), new(torch.einsum("ij,njhw->nihw", swap.float(), z), t, labels)
    torch.testing.assert_close(after[:, 3:], before[:, [5, 3, 4]], rtol=1e-4, atol=1e-4)


def test_the_maps_are_those_of_least_squares(turn):
    """Against a regression on drawn latents, noises and times."""
    z = random(60_000, 12) + 0.5
    w = z @ turn.T @ torch.diag(torch.linspace(0.3, 2.0, 12).double()) + 0.3 * random(60_000, 12, seed=1) - 1.0
    alignment = align(moments(z, w), VELOCITY.coupling())
    t, epsilon = torch.rand(60_000, 1, generator=torch.Generator().manual_seed(2)).double(), random(60_000, 12, seed=4)
    turned = epsilon @ alignment.noise.T
    for found, given, wanted in (
        (alignment.of_input, (1 - t) * w + t * turned, (1 - t) * z + t * epsilon),
        (alignment.of_output, epsilon - z, turned - w),
    ):
        solved = torch.linalg.lstsq(torch.cat([given, torch.ones_like(t)], dim=1), wanted).solution
        torch.testing.assert_close(found.matrix, solved[:-1].T, rtol=0.02, atol=0.02)
        torch.testing.assert_close(found.offset, solved[-1], rtol=0.02, atol=0.02)


def test_noise_is_answered_by_noise(turn):
    z = random(500, 12)
    alignment = align(moments(z, z @ turn.T + random(500, 12, seed=1)), NOISE.coupling())
    torch.testing.assert_close(alignment.of_output.matrix, alignment.noise)
    torch.testing.assert_close(alignment.noise @ alignment.noise.T, torch.eye(12).double())
    assert alignment.of_output.offset.abs().max() == 0.0


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
def test_every_process_has_a_finite_coupling(path, prediction):
    interpolant = Interpolant(path=path, prediction=prediction, time_of_data=1)
    found = InterpolantObjective(num_classes=0, interpolant=interpolant).coupling()
    assert torch.tensor(found).isfinite().all()
    if path == "linear":
        expected = (0.5, 1 / 3, 1 / 3) + ((1.0, 1.0, 1.0) if prediction == "velocity" else (0.0, 0.0, 1.0))
        assert found == pytest.approx(expected, rel=1e-2)


def test_other_channels_and_patches_with_as_many_tokens():
    """4 x 6 cells of 3 channels in patches of 2, to 2 x 3 cells of 16 channels in patches of 1."""
    from eqvae.generators.transformer import Transformer

    config = TransformerConfig(
        latents=LatentSpecification(channels=3, height=4, width=6, num_classes=5), depth=1, hidden_size=24, num_heads=3,
        patch_size=2, out_channels=6,
    )  # fmt: skip
    wide = replace(
        config,
        latents=LatentSpecification(channels=16, height=2, width=3, num_classes=5),
        patch_size=1,
        out_channels=32,
    )
    lift = torch.linalg.qr(random(16, 12, seed=3))[0]
    z = random(500, 12)
    z -= z.mean(0)
    alignment = align(moments(z, z @ lift.T), NOISE.coupling())
    old, new = (Transformer(each, generator=torch.Generator().manual_seed(0)) for each in (config, wide))
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(1))
        new.load_state_dict(fold(old.state_dict(), alignment, config, wide))
        x, t, labels = random(2, 3, 4, 6, seed=5).float(), torch.tensor([3, 700]), torch.tensor([0, 5])
        lifted = (patches(x, 2) @ lift.T.float()).transpose(1, 2).unflatten(2, (2, 3))
        before, after = old(x, t, labels), new(lifted, t, labels)
    expected = (patches(before[:, :3], 2) @ lift.T.float()).transpose(1, 2).unflatten(2, (2, 3))
    torch.testing.assert_close(after[:, :16], expected, rtol=1e-3, atol=1e-3)


def test_what_is_explained(turn):
    z, noise = random(4000, 12), random(4000, 12, seed=1)
    assert moments(z, z @ turn.T).explained() == pytest.approx((1.0, 1.0))
    assert moments(z, z + noise).explained() == pytest.approx((0.5, 0.5), abs=0.03)
    assert moments(z, noise).explained() == pytest.approx((0.0, 0.0), abs=0.01)


def test_nothing_else_is_touched(build_transformer, turn):
    old, new, alignment = aligned_pair(build_transformer, VELOCITY, turn)
    assert isinstance(alignment, Alignment)
    assert isinstance(VELOCITY.coupling(), Coupling)
    changed = {name for name, value in new.state_dict().items() if not value.equal(old.state_dict()[name])}
    ends = {f"{end}.{part}" for end in ("x_embedder.proj", "final_layer.linear") for part in ("weight", "bias")}
    assert changed <= ends
