"""From a generator to images: the same image however it is drawn, guidance, classes, and what does not fit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from eqvae.errors import UserError
from eqvae.generators.checkpoints import Generator, GeneratorCard
from eqvae.generators.interpolant import Interpolant
from eqvae.generators.maskgit_transformer import MaskTransformer, MaskTransformerConfig
from eqvae.generators.protocol import LatentSpecification
from eqvae.generators.transformer import Transformer, TransformerConfig
from eqvae.images.sizes import ImageSize
from eqvae.runs.memory import sampling_memory
from eqvae.runs.sample import SampleConfig
from eqvae.sampling.draw import Drawer, contact_sheet, sheet_indices

SIT = Interpolant(time_of_data=1)


def build_generator(interpolant: Interpolant | None = SIT, *, num_classes: int = 3, seed: int = 0) -> Generator:
    """A small generator whose weights are all alive: DiT's first weights predict zero."""
    config = TransformerConfig(
        latents=LatentSpecification(channels=3, height=4, width=4, num_classes=num_classes), depth=2, hidden_size=24,
        num_heads=3, patch_size=2, out_channels=6,
    )  # fmt: skip
    transformer, generator = Transformer(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.15, generator=generator)
    card = GeneratorCard(
        family="dit" if interpolant is None else "sit", recipe="dit-ti-2" if interpolant is None else "sit-ti-2",
        transformer=config, interpolant=interpolant,
        shift=(0.1, 0.0, -0.1), scale=(0.5, 0.5, 0.5), autoencoder="averaging", autoencoder_fingerprint="0",
        image_size_px=32, class_names=None, num_steps=1, eqvae_version="0",
    )  # fmt: skip
    return Generator(card=card, transformer=transformer.eval())


@pytest.fixture
def drawer(averaging_autoencoder) -> Callable[..., Drawer]:
    """Makes drawers; fp32 and five steps unless told otherwise."""

    def make(generator: Generator | None = None, weak: Generator | None = None, **options) -> Drawer:
        few = {} if options.get("sampler") == "dopri5" else {"num_steps": 5}
        config = SampleConfig(run="run", out=Path("out"), **few | {"precision": "fp32"} | options)
        config.check()
        return Drawer(
            generator=generator or build_generator(), autoencoder=averaging_autoencoder, config=config,
            device=torch.device("cpu"), weak=weak,
        )  # fmt: skip

    return make


def build_token_generator(*, num_classes: int = 3) -> Generator:
    """A small generator of 4 x 4 tokens of 24 codes, which `small_discrete_autoencoder` decodes."""
    config = MaskTransformerConfig(
        latents=LatentSpecification(channels=24, height=4, width=4, num_classes=num_classes), depth=2, hidden_size=24,
        num_heads=3, mlp_size=48,
    )  # fmt: skip
    transformer, generator = MaskTransformer(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    card = replace(
        build_generator(None).card,
        family="maskgit",
        recipe="maskgit-ti",
        transformer=config,
        shift=(),
        scale=(),
        schedule="cosine",
    )
    return Generator(card=card, transformer=transformer.eval())


@pytest.fixture
def token_drawer(drawer, small_discrete_autoencoder) -> Callable[..., Drawer]:
    """Makes drawers of tokens."""

    def make(generator: Generator | None = None, **options) -> Drawer:
        one = drawer(generator or build_token_generator(), **options)
        return replace(one, autoencoder=small_discrete_autoencoder)

    return make


ALL_SAMPLERS = pytest.mark.parametrize(
    ("interpolant", "sampler"),
    [(None, "ddpm"), (None, "ddim"), (SIT, "euler"), (SIT, "heun"), (SIT, "dopri5"), (SIT, "sde")],
)


@ALL_SAMPLERS
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(drawer, interpolant, sampler):
    one = drawer(build_generator(interpolant), sampler=sampler, guidance_scale=2.0)
    together = one.images(range(7))
    assert together.shape == (7, 3, 32, 32)
    apart = torch.cat([one.images([index]) for index in range(7)])
    pairs = torch.cat([one.images([5, 2]), one.images([6])])
    # Matrix products of other sizes round otherwise: at most one grey level apart in fp32.
    assert (together.int() - apart.int()).abs().max() <= 1
    assert (together[[5, 2, 6]].int() - pairs.int()).abs().max() <= 1
    assert len({image.numpy().tobytes() for image in together}) == 7


@torch.no_grad()
def test_bf16_keeps_images_recognisable(drawer):
    full, half = drawer(), drawer(precision="bf16")
    difference = (full.images(range(4)).float() - half.images(range(4)).float()).abs()
    assert 0 < difference.mean() < 4.0


@torch.no_grad()
@pytest.mark.parametrize(("interpolant", "published"), [(None, "ddpm"), (SIT, "sde")])
def test_the_published_sampler_is_the_default(drawer, interpolant, published):
    generator = build_generator(interpolant)
    assert torch.equal(drawer(generator).images(range(2)), drawer(generator, sampler=published).images(range(2)))


@torch.no_grad()
@pytest.mark.parametrize("interpolant", [None, SIT])
def test_guidance(drawer, interpolant):
    generator = build_generator(interpolant)
    plain, guided = drawer(generator), drawer(generator, guidance_scale=3.0)
    z = plain.latents(range(3))
    assert not torch.allclose(z, guided.latents(range(3)))
    always = drawer(generator, guidance_scale=3.0, guidance_low=0.0, guidance_high=1.0)
    assert torch.equal(guided.latents(range(3)), always.latents(range(3)))
    few = drawer(generator, guidance_scale=3.0, guidance_channels=1)
    assert not torch.allclose(few.latents(range(3)), guided.latents(range(3)))


@torch.no_grad()
@pytest.mark.parametrize("interpolant", [None, Interpolant(time_of_data=0), Interpolant(time_of_data=1)])
def test_the_interval_counts_from_data_to_noise(drawer, interpolant):
    """A single deterministic step is at pure noise: an interval at the noise's end guides it, whatever t is called."""
    generator = build_generator(interpolant)
    options = {"sampler": "ddim" if interpolant is None else "euler", "num_steps": 1, "guidance_scale": 3.0}
    whole = drawer(generator, **options).latents(range(2))
    plain = drawer(generator, **options | {"guidance_scale": 1.0}).latents(range(2))
    assert not torch.allclose(whole, plain)
    assert torch.equal(drawer(generator, **options, guidance_low=0.9).latents(range(2)), whole)
    assert torch.equal(drawer(generator, **options, guidance_high=0.9).latents(range(2)), plain)


@torch.no_grad()
def test_autoguidance(drawer):
    strong, weak = build_generator(), build_generator(seed=1)
    guided = drawer(strong, weak, sampler="euler", guidance_scale=2.0, num_steps=1).latents(range(2))
    ends = [drawer(one, sampler="euler", num_steps=1).latents(range(2)) for one in (strong, weak)]
    torch.testing.assert_close(guided, 2 * ends[0] - ends[1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_unconditional_generator(drawer):
    generator = build_generator(num_classes=0)
    assert drawer(generator).images(range(2)).shape == (2, 3, 32, 32)
    weak = build_generator(num_classes=0, seed=1)
    assert drawer(generator, weak, guidance_scale=2.0).latents([0]).isfinite().all()


def test_classes(drawer):
    assert drawer().labels(range(5)).tolist() == [0, 1, 2, 0, 1]
    assert drawer(classes="2,0").labels(range(5)).tolist() == [2, 0, 2, 0, 2]
    drawn = drawer(classes="random").labels(range(300))
    assert drawn.unique().tolist() == [0, 1, 2]
    assert torch.equal(drawer(classes="random").labels([250]), drawn[250:251])
    assert not torch.equal(drawer(classes="random", seed=1).labels(range(300)), drawn)


def test_a_sheet_names_its_rows(drawer, tmp_path: Path):
    generator = build_generator()
    named = replace(generator, card=replace(generator.card, class_names=("cat", "dog", "owl\x1b")))
    assert drawer().row_names(range(3)) is None
    assert drawer(named).row_names(range(20)) is None  # balanced: each row has all
    assert drawer(named).row_names(sheet_indices(30, 3)) == ["cat", "dog", "owl\x1b"]
    assert drawer(named, classes="dog").row_names(range(12)) == ["dog", "dog"]
    images = torch.zeros(12, 3, 32, 32, dtype=torch.uint8)
    for path, names in ((tmp_path / "plain.png", None), (tmp_path / "named.png", ["dog", "owl\x1b"])):
        contact_sheet(images, path, row_names=names)
    plain, wide = (np.asarray(Image.open(tmp_path / name)) for name in ("plain.png", "named.png"))
    assert (wide[:, : plain.shape[1]] == plain).all()
    words = wide[:, plain.shape[1] :].min(axis=(1, 2))
    assert (words[:36] < 128).any()
    assert (words[36:] < 128).any()


@torch.no_grad()
def test_images_are_the_decoded_latents(drawer):
    one = drawer()
    z = one.latents(range(2)) * 0.5 + torch.tensor([0.1, 0.0, -0.1])[:, None, None]
    cells = one.images(range(2))[:, :, ::8, ::8]
    assert torch.equal(cells, ((z + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))


def test_what_does_not_fit(drawer):
    def fails(what: str, generator: Generator | None = None, weak: Generator | None = None, **options: object) -> None:
        with pytest.raises(UserError, match=what):
            drawer(generator, weak, **options)

    dit, unconditional = build_generator(None), build_generator(num_classes=0)
    fails("--sampler heun is not for 'dit-ti-2'. Use ddpm or ddim", dit, sampler="heun")
    fails("--sampler ddim is not for 'sit-ti-2'. Use euler or", sampler="ddim")
    fails("nothing to guide by", unconditional, guidance_scale=2.0)
    fails("unconditional", unconditional, classes="1")
    fails("Class 3 is not one", classes="0,3")
    fails("1001 steps can't be taken", dit, num_steps=1001)
    fails("DDIM's eta is 2", dit, sampler="ddim", ddim_eta=2.0)
    fails("Take at least 2", num_steps=1)
    fails("--weak-run is a 'dit-ti-2'", weak=dit, guidance_scale=2.0)
    other = build_generator()
    fails("--weak-run", weak=replace(other, card=replace(other.card, scale=(1.0, 1.0, 1.0))))
    fails("--weak-run", weak=replace(other, card=replace(other.card, autoencoder_fingerprint="1")))


def test_latents_that_are_not_finite(drawer):
    generator = build_generator()
    with torch.no_grad():
        generator.transformer.final_layer.linear.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="--precision fp32"):
        drawer(generator, sampler="euler").images([0])


@pytest.mark.parametrize("sampler", [None, "confidence", "halton"])
@torch.no_grad()
def test_tokens_do_not_depend_on_their_batch(token_drawer, sampler):
    one = token_drawer(sampler=sampler, guidance_scale=2.0)
    together = one.latents(range(7))
    assert (together.dtype, together.shape) == (torch.int64, (7, 4, 4))
    assert torch.equal(together, torch.cat([one.latents([index]) for index in range(7)]))
    assert torch.equal(together[[5, 2]], one.latents([5, 2]))
    images = one.images(range(7))
    expected = one.autoencoder.decode_tokens(together)
    assert torch.equal(images, ((expected + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
    assert len({image.numpy().tobytes() for image in images}) == 7


@torch.no_grad()
def test_every_flag_of_tokens_matters(token_drawer):
    plain = token_drawer().latents(range(6))
    assert torch.equal(plain, token_drawer(sampler="confidence", schedule="cosine").latents(range(6)))
    for options in (
        {"sampler": "halton"}, {"schedule": "linear"}, {"temperature": 0.2}, {"top_k": 1}, {"guidance_scale": 4.0},
        {"choice_temperature": 0.0}, {"num_steps": 2}, {"seed": 1}, {"classes": "2"},
    ):  # fmt: skip
        assert not torch.equal(plain, token_drawer(**options).latents(range(6))), options
    for sampler, published in (("confidence", "linear"), ("halton", "constant")):
        options = {"sampler": sampler, "guidance_scale": 30.0}
        guided = token_drawer(**options).latents(range(6))
        assert torch.equal(guided, token_drawer(**options, guidance_schedule=published).latents(range(6)))
        other = "constant" if published == "linear" else "linear"
        assert not torch.equal(guided, token_drawer(**options, guidance_schedule=other).latents(range(6)))


def test_published_numbers_of_steps(drawer, token_drawer):
    assert drawer(num_steps=None).num_steps == 250
    assert token_drawer(num_steps=None).num_steps == 8
    assert token_drawer(num_steps=None, sampler="halton").num_steps == 32
    assert token_drawer(num_steps=3).num_steps == 3


def test_what_does_not_fit_tokens(drawer, token_drawer):
    def fails(what: str, make: Callable[..., Drawer] = token_drawer, **options: object) -> None:
        with pytest.raises(UserError, match=what):
            make(**options)

    fails("--sampler ddpm is not for 'maskgit-ti'. Use confidence or halton", sampler="ddpm")
    fails("--guidance-high 0.7 is not for 'maskgit-ti'. Leave it out", guidance_high=0.7)
    fails("--weak-run other is not for 'maskgit-ti'", weak_run=Path("other"))
    fails("nothing to guide by", generator=build_token_generator(num_classes=0), guidance_scale=2.0)
    fails("--sampler halton is not for 'sit-ti-2'", drawer, sampler="halton")
    fails("--top-k 3 is not for 'sit-ti-2'", drawer, top_k=3)
    fails("--schedule cosine is not for 'sit-ti-2'", drawer, schedule="cosine")


def test_logits_that_are_not_finite(token_drawer):
    generator = build_token_generator()
    with torch.no_grad():
        generator.transformer.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="--precision fp32"):
        token_drawer(generator).images([0])


def test_nothing_is_learned(drawer):
    images: Tensor = drawer().images([0])
    assert images.dtype == torch.uint8
    assert not images.requires_grad


def test_flags_that_would_change_nothing(drawer, token_drawer, tmp_path: Path):
    dit = build_generator(None)
    for options in (
        {"ddim_eta": 0.7}, {"diffusion_norm": 3.0}, {"rtol": 0.5}, {"last_step": "tweedie"}, {"timestep_shift": 0.3},
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"is not for the sampler ddpm\. It is for"):
            drawer(dit, **options)
    with pytest.raises(UserError, match="--diffusion-norm 3.0 is not for the sampler euler. It is for sde"):
        drawer(sampler="euler", diffusion_norm=3.0)
    with pytest.raises(UserError, match="--num-steps 50 is not for the sampler dopri5. It takes as many as --rtol"):
        drawer(sampler="dopri5", num_steps=50)
    for options in ({"guidance_high": 0.5}, {"guidance_channels": 1}, {"weak_run": tmp_path}):
        with pytest.raises(UserError, match="changes nothing without guidance"):
            drawer(**options)
    with pytest.raises(UserError, match="--guidance-schedule linear changes nothing without guidance"):
        token_drawer(guidance_schedule="linear")
    with pytest.raises(UserError, match="--weights model changes nothing beside --sigma-rel"):
        drawer(weights="model", sigma_rel=0.1)
    drawer(
        build_generator(),
        build_generator(seed=1),
        weights="model",
        sigma_rel=0.1,
        weak_run=tmp_path,
        guidance_scale=2.0,
    )  # the weak run's weights


def test_only_the_latents_channels_are_guided(drawer):
    drawer(build_generator(None), guidance_scale=2.0, guidance_channels=3)
    with pytest.raises(UserError, match="--guidance-channels 4 is more than the 3 that latents have"):
        drawer(build_generator(None), guidance_scale=2.0, guidance_channels=4)  # the fourth is of the variances


def test_a_size_that_is_no_whole_number_of_patches(drawer):
    with pytest.raises(UserError, match=r"40 is not divisible by 16 .stride 8 x patches of 2.. Use 32 or 48"):
        replace(drawer(), image_size=ImageSize(40, 40))


def test_what_never_lacked_a_class_cannot_be_guided_by_lacking_one(drawer):
    sure = build_generator()
    sure = replace(sure, card=replace(sure.card, label_dropout=0.0))
    with pytest.raises(UserError, match="trained with --label-dropout 0"):
        drawer(sure, guidance_scale=2.0)
    drawer(sure)
    drawer(sure, build_generator(seed=1), guidance_scale=2.0)


@ALL_SAMPLERS
@pytest.mark.parametrize("guided", [{}, {"guidance_scale": 2.0, "guidance_low": 0.2, "guidance_channels": 2}])
def test_the_memory_of_every_sampler_is_worked_out(drawer, interpolant, sampler, guided):
    tolerances = {"rtol": 0.1, "atol": 0.01} if sampler == "dopri5" else {}
    memory = sampling_memory(drawer(build_generator(interpolant), sampler=sampler, **tolerances, **guided), 4)
    assert memory.unknown == ()
    assert memory.phases["samples"] > 4 * 3 * 32 * 32


@pytest.mark.parametrize("sampler", ["confidence", "halton"])
@pytest.mark.parametrize("guided", [{}, {"guidance_scale": 2.0, "top_k": 3, "temperature": 0.5}])
def test_the_memory_of_tokens_is_worked_out(token_drawer, sampler, guided):
    assert sampling_memory(token_drawer(sampler=sampler, **guided), 4).unknown == ()
