"""One training step against formulas written out here: Equations 1, 4, 5 and 7, AdamW, schedules, averaging."""

import math
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from eqvae.autoencoders import load_autoencoder
from eqvae.autoencoders.protocol import Posterior
from eqvae.equivariance import equivariance_loss
from eqvae.errors import UserError
from eqvae.losses.reconstruction import ReconstructionLoss
from eqvae.methods import Batch, Drawn, Pair
from eqvae.runtime.run_folder import from_flat
from eqvae.runtime.seeds import generator_for
from eqvae.training.autoencoder_config import AutoencoderTraining
from eqvae.training.autoencoder_state import TrainState, build_state
from eqvae.training.autoencoder_step import NotFiniteError, StepRecord, learning_rate_at, train_step
from eqvae.transforms import Compose, Draw, Rotate, Scale, TransformSampler

CPU = torch.device("cpu")
L1 = ReconstructionLoss("none", 1.0)


def configure(**changes) -> AutoencoderTraining:
    """A small run without adversary, perceptual network and clipping, unless told otherwise."""
    defaults = {
        "max_steps": 20, "batch_size": 2, "adversarial_weight": 0.0, "perceptual": "none", "precision": "fp32",
        "max_grad_norm": 0.0, "lr_warmup_steps": 0, "lr_scheduler": "constant", "transforms": "plain",
        "learning_rate": 1e-3,
    }  # fmt: skip
    return from_flat(AutoencoderTraining, **defaults | changes).resolved()


def step(state: TrainState, x, config: AutoencoderTraining, sampler: TransformSampler | None = None) -> StepRecord:
    mixture = config.mixture()
    if sampler is not None:
        mixture = replace(mixture, pairs=((1.0, Given(sampler)),))
    return train_step(state, x, config, L1, mixture)


class Given(Pair):
    """EQ-VAE's pair by a sampler of any kind."""

    name = "given"

    def __init__(self, sampler: TransformSampler) -> None:
        object.__setattr__(self, "sampler", sampler)

    def act(self, batch: Batch) -> Drawn:
        return Drawn.of(self.sampler.draw(batch.latent_size, batch.generator))


def noise_of(config: AutoencoderTraining, step: int, shape) -> torch.Tensor:
    """The posterior noise of a step's first micro-batch: the five numbers of tau are drawn before it."""
    generator = generator_for(config.seed, step, 0)
    torch.rand(5, generator=generator)
    return torch.randn(shape, generator=generator)


def weights(module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def gradients(module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


def assert_close(ours, theirs, *, rtol: float = 1e-4, atol: float = 1e-7):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(
            ours[name], tensor, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.fixture
def x():
    return torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def another_autoencoder(small_autoencoder):
    """A factory of autoencoders with the same weights."""
    import copy

    base = copy.deepcopy(small_autoencoder)
    return lambda: copy.deepcopy(base)


# Equation 1 and AdamW -----------------------------------------------------------------------------------------------


def test_plain_steps_are_adamw_on_equation_1(small_autoencoder, another_autoencoder, x):
    config = configure(kl_weight=1e-2, weight_decay=0.1, max_grad_norm=0.02, lr_warmup_steps=1)
    state = build_state(small_autoencoder, config, CPU)
    reference = another_autoencoder()
    m = {name: torch.zeros_like(value) for name, value in reference.named_parameters()}
    v = {name: torch.zeros_like(value) for name, value in reference.named_parameters()}
    for index in range(3):
        record = step(state, x, config)
        assert (record.branch, record.transform) == ("plain", "identity")

        reference.zero_grad()
        posterior = reference.encode(x)
        reconstruction = reference.decode(posterior.sample(noise_of(config, index, (2, 4, 24, 24))))
        l1 = (x - reconstruction).abs().flatten(1).sum(1).mean()
        kl = posterior.kl().mean()
        ((l1 + 1e-2 * kl) / x[0].numel()).backward()
        norm = torch.stack([value.grad.norm() for value in reference.parameters()]).norm().item()
        assert record.gradient_norm == pytest.approx(norm, rel=1e-4)
        assert norm > 0.02  # the clipping is part of this test
        assert record.kl == pytest.approx(kl.item(), rel=1e-5)
        assert record.l1 == pytest.approx((x - reconstruction).abs().mean().item(), rel=1e-5)
        assert record.reconstruction == pytest.approx(l1.item() / x[0].numel(), rel=1e-5)

        rate = 1e-3 * (0.5 if index == 0 else 1.0)
        assert record.learning_rate == pytest.approx(rate)
        with torch.no_grad():
            for name, value in reference.named_parameters():
                gradient = value.grad * (0.02 / norm)
                m[name] = 0.5 * m[name] + 0.5 * gradient
                v[name] = 0.9 * v[name] + 0.1 * gradient.square()
                corrected = (m[name] / (1 - 0.5 ** (index + 1))) / ((v[name] / (1 - 0.9 ** (index + 1))).sqrt() + 1e-8)
                value -= rate * 0.1 * value + rate * corrected
    assert state.step == 3
    assert_close(weights(state.autoencoder), weights(reference), atol=2e-6)


def test_equivariance_steps_have_the_gradient_of_equation_5(small_autoencoder, another_autoencoder, x):
    config = configure(transforms="paper", equivariance_probability=1.0, kl_weight=1e-2)
    state = build_state(small_autoencoder, config, CPU)
    reference = another_autoencoder()
    tau = config.transform.sampler().draw((24, 24), generator_for(0, 0, 0)).tau
    record = step(state, x, config)
    assert (record.branch, record.transform) == ("equivariance", str(tau))

    posterior = reference.encode(x)
    decoded = reference.decode(tau(posterior.sample(noise_of(config, 0, (2, 4, 24, 24)))))
    loss = (tau(x) - decoded).abs().flatten(1).sum(1) + 1e-2 * posterior.kl()
    (loss.mean() / x[0].numel()).backward()
    assert_close(gradients(state.autoencoder), gradients(reference), rtol=1e-3, atol=1e-7)


def test_a_deterministic_encoder_pays_no_divergence(averaging_autoencoder, x):
    config = configure(kl_weight=1e6, ema_decay=0.0)
    record = step(build_state(averaging_autoencoder, config, CPU), x, config)
    assert record.kl == 0.0
    assert record.gradient_norm < 10.0


def test_the_divergence_pulls_as_hard_as_its_weight(small_autoencoder, another_autoencoder, x):
    found = {}
    for kl_weight in (0.0, 1.0, 2.0):
        config = configure(kl_weight=kl_weight)
        state = build_state(another_autoencoder(), config, CPU)
        step(state, x, config)
        found[kl_weight] = gradients(state.autoencoder)
    kl = small_autoencoder.encode(x).kl().mean() / x[0].numel()
    kl.backward()
    for name, parameter in small_autoencoder.encoder.named_parameters():
        pull = found[1.0][f"encoder.{name}"] - found[0.0][f"encoder.{name}"]
        torch.testing.assert_close(pull, parameter.grad, rtol=1e-3, atol=1e-5)
        twice = found[2.0][f"encoder.{name}"] - found[0.0][f"encoder.{name}"]
        torch.testing.assert_close(twice, 2 * pull, rtol=1e-3, atol=1e-5)


# The discriminator --------------------------------------------------------------------------------------------------


def test_the_discriminators_warm_up_leaves_the_autoencoder_bit_for_bit(small_autoencoder, x):
    config = configure(transforms="paper", adversarial_weight=0.5, discriminator_warmup_steps=2, weight_decay=0.1)
    state = build_state(small_autoencoder, config, CPU)
    assert state.discriminator is not None
    assert state.average is not None
    for _ in range(2):
        before, discriminator, average = (
            weights(state.autoencoder),
            weights(state.discriminator),
            weights(state.exported()),
        )
        record = step(state, x, config)
        assert_same(weights(state.autoencoder), before)
        assert_same(weights(state.exported()), average)
        after = weights(state.discriminator)
        assert all(not torch.equal(after[name], value) for name, value in discriminator.items())
        assert (record.learning_rate, record.adaptive_weight, record.gradient_norm) == (0.0, 0.0, 0.0)
        assert record.discriminator > 0.0
    before, discriminator = weights(state.autoencoder), weights(state.discriminator)
    record = step(state, x, config)
    assert record.learning_rate == 1e-3
    assert record.adaptive_weight > 0.0
    for module, former in ((state.autoencoder, before), (state.discriminator, discriminator)):
        after = weights(module)
        assert all(not torch.equal(after[name], value) for name, value in former.items())


def test_autoencoder_and_discriminator_see_the_same_transformed_images(small_autoencoder, x, monkeypatch):
    config = configure(transforms="paper", equivariance_probability=1.0, adversarial_weight=0.5, ema_decay=0.0)
    state = build_state(small_autoencoder, config, CPU)
    assert state.discriminator is not None
    seen, forward = [], state.discriminator.forward
    monkeypatch.setattr(state.discriminator, "forward", lambda images: seen.append(images.detach()) or forward(images))
    step(state, x, config)
    tau = config.transform.sampler().draw((24, 24), generator_for(0, 0, 0)).tau
    fake, real = seen
    assert torch.equal(real, tau(x))
    assert fake.shape == real.shape


def test_without_weight_there_is_no_discriminator(small_autoencoder):
    state = build_state(small_autoencoder, configure(), CPU)
    assert state.discriminator is None
    assert state.discriminator_optimizer is None


# Gradient accumulation ----------------------------------------------------------------------------------------------


def test_two_parts_add_up_to_the_gradient_of_one(another_autoencoder, monkeypatch):
    # The parts draw their own posterior noise, so only an encoder without noise can give the same gradient.
    x = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found, records = [], []
    for num_parts in (1, 2, 4):
        config = configure(batch_size=4, gradient_accumulation_steps=num_parts, ema_decay=0.0)
        autoencoder = another_autoencoder()
        encode = autoencoder.encode
        monkeypatch.setattr(autoencoder, "encode", lambda x, encode=encode: Posterior(mean=encode(x).mean))
        state = build_state(autoencoder, config, CPU)
        # The channels of the log variance get no gradient but zeros.
        records.append(step(state, x, config))
        found.append(gradients(state.autoencoder))
    for more_parts, record in zip(found[1:], records[1:], strict=True):
        assert_close(more_parts, found[0])
        assert record.reconstruction == pytest.approx(records[0].reconstruction, rel=1e-5)
        assert record.gradient_norm == pytest.approx(records[0].gradient_norm, rel=1e-4)


def test_each_part_draws_its_own_tau(small_autoencoder, monkeypatch):
    config = configure(batch_size=4, gradient_accumulation_steps=4, transforms="paper", equivariance_probability=1.0)
    x = torch.rand(4, 3, 96, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    drawn, draw = [], TransformSampler.draw

    def note(self, latent_size, generator):
        drawn.append(draw(self, latent_size, generator))
        return drawn[-1]

    monkeypatch.setattr(TransformSampler, "draw", note)
    record = step(build_state(small_autoencoder, config, CPU), x, config)
    assert len({str(each.tau) for each in drawn}) == len(drawn) == 4
    assert record.transform == str(drawn[0].tau)


# Schedules ----------------------------------------------------------------------------------------------------------


def test_the_rate_warms_up_linearly_then_falls_along_half_a_cosine():
    config = configure(max_steps=110, lr_warmup_steps=10, lr_scheduler="cosine", learning_rate=1.0)
    assert [learning_rate_at(step, config, first_step=0) for step in range(10)] == pytest.approx(
        [(step + 1) / 11 for step in range(10)]
    )
    assert learning_rate_at(10, config, first_step=0) == pytest.approx(1.0)
    assert learning_rate_at(35, config, first_step=0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert learning_rate_at(60, config, first_step=0) == pytest.approx(0.5)
    assert 0.0 < learning_rate_at(109, config, first_step=0) < 0.001
    assert learning_rate_at(110, config, first_step=0) == pytest.approx(0.0, abs=1e-12)


def test_the_rate_may_stay_constant():
    config = configure(max_steps=110, lr_warmup_steps=10, lr_scheduler="constant", learning_rate=3e-4)
    assert {learning_rate_at(step, config, first_step=0) for step in range(10, 110)} == {3e-4}


def test_the_autoencoders_schedule_begins_after_the_discriminators_warm_up():
    changes = {"lr_warmup_steps": 10, "lr_scheduler": "cosine", "learning_rate": 1.0}
    alone = configure(max_steps=100, **changes)
    delayed = configure(max_steps=150, adversarial_weight=0.5, discriminator_warmup_steps=50, **changes)
    rates = [learning_rate_at(step, alone, first_step=0) for step in range(100)]
    assert [learning_rate_at(step, delayed, first_step=50) for step in range(50, 150)] == pytest.approx(rates)


# Averaging ----------------------------------------------------------------------------------------------------------


def test_the_average_follows_the_closed_form(small_autoencoder, x):
    decay = 0.2
    config = configure(ema_decay=decay)
    state = build_state(small_autoencoder, config, CPU)
    expected: dict[str, torch.Tensor] = {}
    for num_averaged in range(5):
        step(state, x, config)
        # The first update copies; the decays are then 2/11 and, where (1 + n) / (10 + n) would pass it, 0.2.
        weight = 1.0 if num_averaged == 0 else 1.0 - min(decay, (1 + num_averaged) / (10 + num_averaged))
        for name, value in weights(state.autoencoder).items():
            former = expected.get(name, value.double())
            expected[name] = (1.0 - weight) * former + weight * value.double()
    assert_close(weights(state.exported()), {name: value.float() for name, value in expected.items()}, atol=1e-7)
    now = weights(state.autoencoder)
    assert any(not torch.equal(now[name], value) for name, value in weights(state.exported()).items())


def test_without_decay_the_last_weights_are_exported(small_autoencoder):
    state = build_state(small_autoencoder, configure(ema_decay=0.0), CPU)
    assert state.average is None
    assert state.exported() is small_autoencoder


# Explicit regularization (Equation 4) -------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["explicit", "explicit-stop-gradient"])
def test_explicit_objectives_add_equation_4_to_equation_1(another_autoencoder, x, objective):
    config = configure(
        objective=objective, transforms="paper", equivariance_probability=1.0, explicit_weight=0.3, kl_weight=1e-2
    )
    state = build_state(another_autoencoder(), config, CPU)
    record = step(state, x, config)
    tau = config.transform.sampler().draw((24, 24), generator_for(0, 0, 0)).tau

    reference = another_autoencoder()
    posterior = reference.encode(x)
    decoded = reference.decode(posterior.sample(noise_of(config, 0, (2, 4, 24, 24))))
    transformed = reference.encode(tau(x)).mean
    if objective == "explicit-stop-gradient":
        transformed = transformed.detach()
    explicit = (tau(posterior.mean) - transformed).square().flatten(1).sum(1).mean()
    plain = (x - decoded).abs().flatten(1).sum(1).mean() + 1e-2 * posterior.kl().mean()
    ((plain + 0.3 * explicit) / x[0].numel()).backward()
    assert record.explicit == pytest.approx(explicit.item(), rel=1e-4)
    assert_close(gradients(state.autoencoder), gradients(reference), rtol=1e-3, atol=1e-7)


def test_the_stop_gradient_changes_the_gradient_not_the_loss(another_autoencoder, x):
    records, found = [], []
    for objective in ("explicit", "explicit-stop-gradient"):
        config = configure(objective=objective, transforms="paper", equivariance_probability=1.0, explicit_weight=1.0)
        state = build_state(another_autoencoder(), config, CPU)
        records.append(step(state, x, config))
        found.append(gradients(state.autoencoder))
    assert records[0].explicit == records[1].explicit > 0.0
    assert not torch.allclose(found[0]["encoder.0.weight"], found[1]["encoder.0.weight"], rtol=1e-2)
    assert torch.equal(found[0]["layer.weight"], found[1]["layer.weight"])  # Equation 4 does not reach the decoder


def test_equation_4_is_silent_in_the_plain_branch(small_autoencoder, x):
    config = configure(objective="explicit", transforms="paper", equivariance_probability=0.0)
    assert step(build_state(small_autoencoder, config, CPU), x, config).explicit == 0.0


# Resolution ---------------------------------------------------------------------------------------------------------


def test_equal_weighting_differs_from_area_by_the_square_of_the_scale(another_autoencoder, x):
    figures = {}
    for weighting in ("area", "equal"):
        config = configure(transforms="scale", equivariance_probability=1.0, resolution_weighting=weighting)
        record = step(build_state(another_autoencoder(), config, CPU), x, config)
        figures[weighting] = record.reconstruction
    tau = config.transform.sampler().draw((24, 24), generator_for(0, 0, 0)).tau
    assert isinstance(tau, Compose)
    (scale,) = tau.parts
    assert isinstance(scale, Scale)
    assert scale.vertical < 1
    assert figures["equal"] / figures["area"] == pytest.approx(float(1 / scale.vertical**2), rel=1e-6)


def test_the_released_codes_low_resolution_branch_trains_on_a_small_plain_image(small_autoencoder, x, monkeypatch):
    config = configure(transforms="released-code", equivariance_probability=0.0, ema_decay=0.0)
    sampler = replace(config.transform.sampler(), low_resolution_probability=1.0)
    draw = sampler.draw((24, 24), generator_for(0, 0, 0))
    seen, encode = [], small_autoencoder.encode
    monkeypatch.setattr(small_autoencoder, "encode", lambda x: seen.append(x) or encode(x))
    record = step(build_state(small_autoencoder, config, CPU), x, config, sampler)
    assert (record.branch, record.transform) == ("low-resolution plain", "identity")
    (small,) = seen
    assert small.shape[-1] < 96
    assert torch.equal(small, draw.before(x))


def test_the_released_codes_preset_reaches_its_low_resolution_branch():
    sampler = configure(transforms="released-code").transform.sampler()
    branches = [sampler.draw((24, 24), generator_for(0, step, 0)).branch for step in range(400)]
    shares = {name: branches.count(name) / 400 for name in ("equivariance", "plain", "low-resolution plain")}
    assert shares == pytest.approx({"equivariance": 0.5, "plain": 0.375, "low-resolution plain": 0.125}, abs=0.06)


@pytest.mark.parametrize("weighting", ["area", "equal"])
def test_a_small_plain_image_weighs_as_a_scaled_one_does(another_autoencoder, x, weighting):
    # The same image at the same scale s: as `before` in the plain branch, as tau in the equivariance branch.
    config = configure(transforms="released-code", kl_weight=0.0, resolution_weighting=weighting)
    found = {}
    for name, changes in {
        "before": {"equivariance_probability": 0.0, "low_resolution_probability": 1.0},
        "tau": {"equivariance_probability": 1.0, "rotation_probability": 0.0},
    }.items():
        state = build_state(another_autoencoder(), config, CPU)
        record = step(state, x, config, replace(config.transform.sampler(), **changes))
        found[name] = record.reconstruction / record.l1
    assert found["before"] == pytest.approx(found["tau"], rel=1e-5)


@pytest.mark.parametrize("weighting", ["area", "equal"])
def test_codes_of_a_small_plain_image_weigh_as_those_of_a_scaled_one(weighting):
    # The codebook's gradient is that of `equivariance_loss` on the same pictures, in the parts that a step makes of it.
    half, x = Scale(Fraction(1, 2), Fraction(1, 2)), torch.rand(2, 3, 64, 64) * 2 - 1
    config = configure(transforms="released-code", resolution_weighting=weighting)
    for drawn in (Draw(before=half, branch="low-resolution plain"), Draw(tau=half, branch="equivariance")):
        state = build_state(load_autoencoder("tiny-vq"), config, CPU)
        sampler = SimpleNamespace(draw=lambda size, generator, drawn=drawn: drawn)
        state.optimizer.step = lambda: None
        step(state, x, config, sampler)
        expected = load_autoencoder("tiny-vq")
        images = drawn.before(x)
        noise = torch.zeros(2, expected.latent_channels, *(side // expected.stride for side in images.shape[-2:]))
        loss = equivariance_loss(expected, images, drawn.tau, noise).mean()
        (loss * (4.0 if weighting == "equal" else 1.0) / x[0].numel()).backward()
        assert_close({"codebook": state.autoencoder.codebook.grad}, {"codebook": expected.codebook.grad})


# Randomness and failure ---------------------------------------------------------------------------------------------


def test_the_probability_of_the_equivariance_branch_can_be_overridden(small_autoencoder):
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    branches = {}
    for probability in (0.0, 0.25, 1.0, None):
        config = configure(transforms="paper", equivariance_probability=probability, ema_decay=0.0)
        expected = 0.5 if probability is None else probability
        assert (
            config.transform.equivariance_probability == config.transform.sampler().equivariance_probability == expected
        )
        state = build_state(small_autoencoder, config, CPU)
        branches[probability] = [step(state, x, config).branch for _ in range(40)]
    assert set(branches[0.0]) == {"plain"}
    assert set(branches[1.0]) == {"equivariance"}
    assert 2 <= branches[0.25].count("equivariance") <= 19
    assert branches[0.25].count("equivariance") < branches[None].count("equivariance")


def test_a_probability_outside_its_range_is_named():
    with pytest.raises(UserError, match=r"equivariance_probability is 2"):
        configure(transforms="paper", equivariance_probability=2.0)


def test_a_step_depends_on_seed_and_step_alone(another_autoencoder, x):
    config = configure(transforms="paper")
    first, second = (build_state(another_autoencoder(), config, CPU) for _ in range(2))
    torch.manual_seed(0)
    records = [step(first, x, config) for _ in range(3)]
    torch.manual_seed(1)
    assert [step(second, x, config) for _ in range(3)] == records
    assert_same(weights(first.autoencoder), weights(second.autoencoder))


@pytest.mark.parametrize("adversarial_weight", [0.0, 0.5])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_stop_the_step_before_any_weight_changes(
    small_autoencoder, x, bad, adversarial_weight
):
    config = configure(transforms="paper", adversarial_weight=adversarial_weight)
    state = build_state(small_autoencoder, config, CPU)
    for _ in range(2):
        step(state, x, config)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    damaged = x.clone()
    damaged[0, 0, 5, 5] = bad
    with pytest.raises(NotFiniteError, match=r"reconstruction (nan|inf)"):
        step(state, damaged, config)
    assert state.step == 2
    assert_same(state.tensors(), before)
    assert step(state, x, config).reconstruction > 0.0  # and it can go on


def test_a_reconstruction_loss_that_is_not_finite_stops_the_step(small_autoencoder, x):
    config = configure()
    state = build_state(small_autoencoder, config, CPU)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}

    class Broken(ReconstructionLoss):
        def forward(self, target, reconstruction):
            return super().forward(target, reconstruction) * math.nan

    with pytest.raises(NotFiniteError):
        train_step(state, x, config, Broken("none", 1.0), config.mixture())
    assert_same(state.tensors(), before)


def test_the_drawn_transform_is_the_one_on_record(small_autoencoder, x):
    config = configure(transforms="rotation", equivariance_probability=1.0)
    record = step(build_state(small_autoencoder, config, CPU), x, config)
    assert record.transform in {str(Compose(Rotate(turns))) for turns in (1, 2, 3)}


# Phases ---------------------------------------------------------------------------------------------------------------


def test_both_networks_start_their_rates_again_where_polishing_begins(small_autoencoder):
    config = configure(
        max_steps=40, polish_steps=20, adversarial_weight=0.5, discriminator_warmup_steps=1, lr_warmup_steps=10,
        lr_scheduler="cosine",
    )  # fmt: skip
    polishing = config.at(40)
    assert (config.began_at(39), config.began_at(40), config.began_at(59)) == (0, 40, 40)
    assert polishing.optimizer.lr_warmup_steps == 1  # a twentieth of it
    rates = [learning_rate_at(step, polishing, first_step=config.began_at(step)) for step in range(40, 60)]
    assert max(rates) == pytest.approx(config.optimizer.learning_rate, rel=0.05)
    assert rates[-1] < 0.05 * max(rates)
    state = build_state(small_autoencoder, config, CPU)
    state.step = 45
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    train_step(state, x, polishing, L1, polishing.mixture(), began=config.began_at(45))
    own, other = (each.param_groups[0]["lr"] for each in (state.optimizer, state.discriminator_optimizer))
    assert own == other == pytest.approx(learning_rate_at(45, polishing, first_step=40))


# Adaptive terms that have nothing to say in a step --------------------------------------------------------------------


@pytest.mark.parametrize("kl_weight", [0.0, 1e-6])
def test_an_adaptive_term_without_a_gradient_weighs_nothing(small_autoencoder, kl_weight: float):
    config = configure(
        method="explicit(adaptive=true, equivariance_probability=0.0)", transforms=None, kl_weight=kl_weight
    )
    state = build_state(small_autoencoder, config, CPU)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    record = train_step(state, x, config, L1, config.mixture())
    assert record.terms["explicit_weight"] == 0.0
    assert record.gradient_norm > 0


def test_an_adaptive_kl_is_kept():
    config = configure(method="eq + kl(adaptive=true):0.5", transforms=None)
    assert str(config.mixture()).endswith("+ kl(adaptive=true):0.5")
    assert config.mixture().is_adaptive
