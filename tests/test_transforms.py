"""tau: exact grids, composition, the distribution of draws."""

from collections import Counter
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError

from eqvae.transforms import IDENTITY, PRESETS, ROTATIONS, Compose, Rotate, Scale, TransformSampler, evaluation_scales


def half(**options) -> Scale:
    return Scale(Fraction(1, 2), Fraction(1, 2), **options)


def draws(sampler: TransformSampler, size=(16, 16), count=2000):
    generator = torch.Generator().manual_seed(0)
    return [sampler.draw(size, generator) for _ in range(count)]


def test_rotation_is_exact_and_counter_clockwise():
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    assert torch.equal(Rotate(1)(x), torch.tensor([[[[2.0, 4.0], [1.0, 3.0]]]]))
    assert torch.equal(Rotate(1)(Rotate(3)(x)), x)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("antialias", [False, True])
def test_scale_resizes_as_pytorch_does(interpolation, antialias):
    x = torch.randn(2, 3, 12, 16)
    expected = F.interpolate(x, size=(6, 8), mode=interpolation, antialias=antialias, align_corners=False)
    assert torch.equal(half(interpolation=interpolation, antialias=antialias)(x), expected)


def test_scale_keeps_the_type_and_computes_in_float32():
    x = torch.randn(1, 4, 16, 16)
    assert half()(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(half()(x.bfloat16()), half()(x.bfloat16().float()).bfloat16())


def test_scale_to_the_same_size_is_the_identity():
    x = torch.randn(1, 3, 8, 8)
    assert Scale(Fraction(1), Fraction(1))(x) is x


def test_a_grid_that_would_not_be_whole_is_refused():
    with pytest.raises(ValueError, match="whole grid"):
        half()(torch.zeros(1, 3, 7, 8))


def test_composition_applies_the_last_part_first():
    x = torch.randn(1, 3, 8, 16)
    squeeze = Scale(Fraction(1, 2), Fraction(1))
    assert torch.equal(Compose(squeeze, Rotate(1))(x), squeeze(Rotate(1)(x)))
    assert Compose(squeeze, Rotate(1))(x).shape == (1, 3, 8, 8)
    assert IDENTITY(x) is x


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [(32, 32), (16, 24), (7, 5)])
@pytest.mark.parametrize("stride", [8, 16])
def test_latent_and_image_always_meet_exactly(preset, size, stride):
    generator = torch.Generator().manual_seed(1)
    z, x = torch.zeros(1, 4, *size), torch.zeros(1, 3, size[0] * stride, size[1] * stride)
    for _ in range(60):
        draw = PRESETS[preset].draw(size, generator)
        small = draw.before(x).shape[-2:]
        assert small[0] % stride == 0 and small[1] % stride == 0
        latent, image = draw.tau(z).shape[-2:], draw.tau(x).shape[-2:]
        assert (latent[0] * stride, latent[1] * stride) == tuple(image)


def test_scales_are_uniform_over_the_whole_cells_from_a_quarter_to_one():
    counts = Counter(
        draw.tau.parts[0].vertical for draw in draws(TransformSampler(equivariance_probability=1.0), (32, 32), 3000)
    )
    assert set(counts) == {Fraction(k, 32) for k in range(8, 32)}  # the released code's k/32, k = 8 ... 31
    assert all(85 <= count <= 170 for count in counts.values())  # 125 expected, standard deviation 11


def test_rotations_are_uniform_over_three_angles():
    counts = Counter(draw.tau.parts[-1].quarter_turns for draw in draws(TransformSampler(equivariance_probability=1.0)))
    assert set(counts) == {1, 2, 3}
    assert all(abs(count / 2000 - 1 / 3) < 0.04 for count in counts.values())


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_equivariance_probability_is_the_probability_of_the_equivariance_branch(probability):
    some = draws(TransformSampler(equivariance_probability=probability))
    share = sum(draw.branch == "equivariance" for draw in some) / len(some)
    assert abs(share - probability) < 0.04
    assert all(draw.tau == IDENTITY for draw in some if draw.branch == "plain")


def test_rotation_probability_leaves_scales_alone():
    some = draws(TransformSampler(equivariance_probability=1.0, rotation_probability=0.25))
    turned = [draw for draw in some if isinstance(draw.tau.parts[-1], Rotate)]
    assert abs(len(turned) / len(some) - 0.25) < 0.04
    assert {draw.tau.parts[-1].quarter_turns for draw in turned} == {1, 2, 3}
    assert all(isinstance(draw.tau.parts[0], Scale) for draw in some)


def test_released_code_trains_an_eighth_of_its_steps_on_downscaled_images():
    counts = Counter(draw.branch for draw in draws(PRESETS["released-code"]))
    assert abs(counts["equivariance"] / 2000 - 0.5) < 0.04
    assert abs(counts["low-resolution plain"] / 2000 - 0.125) < 0.02
    assert abs(counts["plain"] / 2000 - 0.375) < 0.04


def test_rows_of_table_5():
    assert all(isinstance(draw.tau, Compose) for draw in draws(PRESETS["rotation"], count=50))
    for draw in draws(PRESETS["rotation"], count=200):
        assert all(isinstance(part, Rotate) for part in draw.tau.parts)
    for draw in draws(PRESETS["scale"], count=200):
        assert all(isinstance(part, Scale) and part.vertical == part.horizontal for part in draw.tau.parts)
    anisotropic = [draw.tau.parts[0] for draw in draws(PRESETS["anisotropic"], count=200) if draw.tau != IDENTITY]
    assert any(part.vertical != part.horizontal for part in anisotropic)


def test_draws_follow_the_generator_alone():
    one, two = draws(TransformSampler(), count=50), draws(TransformSampler(), count=50)
    assert one == two


def test_the_default_type_does_not_show():
    expected = draws(TransformSampler(), count=20)
    torch.set_default_dtype(torch.float64)
    try:
        assert draws(TransformSampler(), count=20) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_float64_stays_exact():
    z = torch.rand(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Scale(Fraction(1, 2), Fraction(3, 4)), z)


def test_a_step_compiles():
    sampler, generator = TransformSampler(), torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 32, 32)

    def loss(x: torch.Tensor) -> torch.Tensor:
        tau = sampler.draw((8, 8), generator).tau
        return (tau(F.avg_pool2d(x, 4)) - F.avg_pool2d(tau(x), 4)).square().mean()

    expected = [loss(x) for _ in range(6)]
    generator.manual_seed(0)
    compiled = torch.compile(loss, backend="eager")
    torch.testing.assert_close([compiled(x) for _ in range(6)], expected)


def test_the_number_of_values_drawn_does_not_depend_on_the_branch():
    plain, always = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    TransformSampler(equivariance_probability=0.0).draw((8, 8), plain)
    TransformSampler(equivariance_probability=1.0).draw((8, 8), always)
    assert torch.equal(torch.rand(1, generator=plain), torch.rand(1, generator=always))


@pytest.mark.parametrize(
    "wrong",
    [
        {"equivariance_probability": 1.5}, {"min_scale": 0.0}, {"rotation_probability": -1.0}, {"scale": "isotropc"},
        {"scale": None}, {"interpolation": "nearest"},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises((ValueError, TypeCheckError), match=next(iter(wrong))):  # the tests check types as well
        TransformSampler(**wrong)


def test_evaluation_transforms_are_those_of_section_c3():
    assert [90 * tau.quarter_turns for tau in ROTATIONS] == [90, 180, 270]
    assert [float(tau.vertical) for tau in evaluation_scales()] == [0.25, 0.5, 0.75]
    assert all(tau.interpolation == "bicubic" and not tau.antialias for tau in evaluation_scales())


def test_names_for_figures():
    assert str(half()) == "s = 0.5"
    assert str(Compose(half(), Rotate(1))) == "s = 0.5 · 90°"
    assert str(IDENTITY) == "identity"
