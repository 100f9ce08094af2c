"""All measures of an autoencoder at once: closed forms, independence of the batch size, parity on a real model."""

import pytest
import torch

from eqvae.errors import UserError
from eqvae.metrics.autoencoder import LatentMoments, check_image_size, evaluate_autoencoder
from eqvae.metrics.per_image import MAX_PSNR_DB
from eqvae.runtime.processes import Processes

ALONE = Processes(rank=0, count=1, device=torch.device("cpu"))


def images(count=5, size=64):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_an_equivariant_autoencoder_of_flat_cells_is_perfect(averaging_autoencoder):
    x = images(2, 8).repeat_interleave(8, -1).repeat_interleave(8, -2)
    figures, statistics, pictures = evaluate_autoencoder(averaging_autoencoder, [x], processes=ALONE)
    assert figures["equivariance_error_rotation"] < 1e-10
    assert figures["psnr_db"] == MAX_PSNR_DB
    assert figures["ssim"] == pytest.approx(1.0, abs=1e-5)
    assert figures["num_images"] == 2
    assert len(statistics.mean) == 3
    assert pictures.latents.shape == (2, 3, 8, 8)
    assert [tuple(tensor.shape[-2:]) for tensor in pictures.decoded_transformed] == [(32, 32), (64, 64)]


def test_a_picture_is_turned_once_around(averaging_autoencoder):
    x = images(2, 8).repeat_interleave(8, -1).repeat_interleave(8, -2)
    *_, pictures = evaluate_autoencoder(averaging_autoencoder, [x[:1], x[1:]], processes=ALONE, num_angles=8)
    assert pictures.turned.shape == (2, 8, 3, 64, 64)
    for quarter_turns in range(4):
        for row in pictures.turned:
            assert torch.equal(row[2 * quarter_turns], pictures.images[0].rot90(quarter_turns, (-2, -1)))
    assert not torch.equal(pictures.turned[0, 1], pictures.turned[0, 0])
    *_, pictures = evaluate_autoencoder(averaging_autoencoder, [x], processes=ALONE)
    assert pictures.turned is None


def test_figures_do_not_depend_on_the_batch_size(small_autoencoder):
    x = images()
    whole, _, _ = evaluate_autoencoder(small_autoencoder, [x], processes=ALONE)
    for size in (1, 2):
        parts, _, _ = evaluate_autoencoder(small_autoencoder, x.split(size), processes=ALONE)
        for name, value in whole.items():
            if name != "images_per_sec":
                assert parts[name] == pytest.approx(value, rel=1e-5), name


def test_means_over_each_kind_of_transformation(small_autoencoder):
    figures, _, _ = evaluate_autoencoder(small_autoencoder, [images()], processes=ALONE)
    for kind, parts in (("rotation", ("90", "180", "270")), ("scale", ("0.25", "0.5", "0.75"))):
        mean = sum(figures[f"equivariance_error_{kind}_{part}"] for part in parts) / 3
        assert figures[f"equivariance_error_{kind}"] == pytest.approx(mean)


def test_a_discrete_autoencoder_is_measured_in_latents_and_in_tokens(small_discrete_autoencoder):
    x, autoencoder = images(), small_discrete_autoencoder
    figures, _, _ = evaluate_autoencoder(autoencoder, x.split(2), processes=ALONE)
    tokens = autoencoder.quantize(autoencoder.encode(x).mean).tokens
    assert figures["codebook_usage"] == len(tokens.unique()) / 24
    assert 1.0 < figures["codebook_perplexity"] <= len(tokens.unique())
    for kind, parts in (("rotation", ("90", "180", "270")), ("scale", ("0.25", "0.5", "0.75"))):
        for name in (f"equivariance_error_{kind}", f"token_agreement_{kind}"):
            assert figures[name] == pytest.approx(sum(figures[f"{name}_{part}"] for part in parts) / 3)
    whole, _, _ = evaluate_autoencoder(autoencoder, [x], processes=ALONE)
    for name, value in whole.items():
        if name != "images_per_sec":
            assert figures[name] == pytest.approx(value, rel=1e-4), name


def test_a_continuous_autoencoder_has_no_figures_of_tokens(small_autoencoder):
    figures, _, _ = evaluate_autoencoder(small_autoencoder, [images(1)], processes=ALONE)
    assert not [name for name in figures if name.startswith(("token", "codebook"))]


def test_latent_statistics_are_those_of_all_values():
    z = (
        torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2
        + torch.tensor([0.0, 1.0, -5.0])[:, None, None]
    )
    moments = LatentMoments()
    for part in z.split(4):
        moments.add(part)
    statistics = moments.statistics()
    values = z.transpose(0, 1).flatten(1).double()
    assert torch.allclose(torch.tensor(statistics.mean).double(), values.mean(1), atol=1e-6)
    assert torch.allclose(torch.tensor(statistics.std).double(), values.std(1, correction=0), atol=1e-6)
    mean, std = statistics.overall()
    assert mean == pytest.approx(z.double().mean().item(), abs=1e-6)
    assert std == pytest.approx(z.double().std(correction=0).item(), abs=1e-6)


def test_no_image_is_an_error(small_autoencoder):
    with pytest.raises(UserError, match="no image"):
        evaluate_autoencoder(small_autoencoder, [], processes=ALONE)


@pytest.mark.parametrize("size", [0, 4, 100, 250])
def test_image_sizes_without_a_whole_grid_are_refused(size):
    with pytest.raises(UserError, match="not divisible") as error:
        check_image_size(size, 8, quarters=True)
    suggested = [
        int(word.strip(",")) for word in str(error.value).split("Use ")[1].split() if word.strip(",").isdigit()
    ]
    for better in suggested:
        check_image_size(better, 8, quarters=True)


@pytest.mark.slow
def test_taef2_agrees_with_an_independent_computation_on_real_photographs(shared):
    """Rotation 1.060, scale 0.668, PSNR 29.43 dB over 100 photographs; here the first 4 of them, computed apart."""
    from fractions import Fraction

    import torch.nn.functional as F

    from eqvae.autoencoders import load_autoencoder
    from eqvae.images import evaluation_batches, open_images

    autoencoder = load_autoencoder(str(shared / "models" / "taef2")).eval()
    source = open_images(str(shared / "data" / "imagenet-sample" / "val"))
    batches = [
        batch.images
        for batch in evaluation_batches(source, image_size_px=256, batch_size=2, num_images=4, num_workers=0)
    ]
    figures, _, _ = evaluate_autoencoder(autoencoder, batches, processes=ALONE)

    errors: dict[str, list[float]] = {"rotation": [], "scale": []}
    psnr = []
    with torch.inference_mode():
        for x in torch.cat(batches).split(1):
            z = autoencoder.encode(x).mode()
            for turns in (1, 2, 3):
                encoded = autoencoder.encode(torch.rot90(x, turns, (2, 3))).mode()
                errors["rotation"].append(float((torch.rot90(z, turns, (2, 3)) - encoded).norm() / encoded.norm()) ** 2)
            for scale in (Fraction(1, 4), Fraction(1, 2), Fraction(3, 4)):
                small = F.interpolate(x, scale_factor=float(scale), mode="bicubic")
                encoded = autoencoder.encode(small).mode()
                moved = F.interpolate(z, scale_factor=float(scale), mode="bicubic")
                errors["scale"].append(float((moved - encoded).norm() / encoded.norm()) ** 2)
            difference = ((autoencoder.decode(z).clamp(-1, 1) + 1) * 127.5).round() - ((x + 1) * 127.5).round()
            psnr.append(float(10 * torch.log10(255.0**2 / difference.square().mean())))
    for kind, values in errors.items():
        assert figures[f"equivariance_error_{kind}"] == pytest.approx(sum(values) / len(values), rel=1e-3)
    assert figures["psnr_db"] == pytest.approx(sum(psnr) / len(psnr), abs=1e-2)
