"""The discrete half of a training step: Equation 5 with a codebook, codes as averages, codes that start again."""

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from eqvae.artifacts.files import read_journal, read_tensors
from eqvae.artifacts.names import CHECKPOINT
from eqvae.autoencoders.channels import load_with_channels
from eqvae.equivariance import decode_transformed
from eqvae.errors import UserError
from eqvae.losses.codebook import CodebookState, Codes
from eqvae.losses.reconstruction import ReconstructionLoss
from eqvae.methods import Drawn, Mixture, Pair, method
from eqvae.runs.finetune import FinetuneConfig, finetune, plan
from eqvae.runtime.run_folder import from_flat
from eqvae.runtime.seeds import generator_for
from eqvae.training.autoencoder_config import AutoencoderTraining
from eqvae.training.autoencoder_state import build_state
from eqvae.training.autoencoder_step import NotFiniteError, train_step
from eqvae.transforms import IDENTITY, Compose, Rotate, Scale

CPU = torch.device("cpu")
L1 = ReconstructionLoss("none", 1.0)


DEFAULTS = {
    "max_steps": 20, "batch_size": 2, "adversarial_weight": 0.0, "perceptual": "none", "precision": "fp32",
    "max_grad_norm": 0.0, "lr_warmup_steps": 0, "lr_scheduler": "constant", "transforms": "plain",
    "learning_rate": 1e-3,
}  # fmt: skip


def configure(**changes) -> AutoencoderTraining:
    return from_flat(AutoencoderTraining, **DEFAULTS | changes).resolved()


def step(state, x, config):
    return train_step(state, x, config, L1, config.mixture())


def l1(target, reconstruction):
    return (target - reconstruction).abs().flatten(1).sum(1)


def gradients(module):
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}


@pytest.fixture
def x():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def new_autoencoder(small_discrete_autoencoder):
    """A factory of autoencoders with the same weights."""
    return lambda: type(small_discrete_autoencoder)()


# The objective ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [IDENTITY, Rotate(1), Compose(Scale(Fraction(1, 2), Fraction(1, 2)), Rotate(2))])
def test_tau_acts_before_quantization(small_discrete_autoencoder, x, tau):
    autoencoder = small_discrete_autoencoder
    pair = decode_transformed(autoencoder, x, tau, torch.zeros(2, 4, 16, 16))
    z = tau(autoencoder.encode(x).mean)
    nearest = (z.permute(0, 2, 3, 1)[..., None, :] - autoencoder.codebook).square().sum(-1).argmin(-1)
    assert torch.equal(pair.quantized.tokens, nearest)
    assert torch.equal(pair.decoded, autoencoder.decode_tokens(nearest))
    assert torch.equal(pair.decoded, autoencoder.decode(z))
    assert torch.equal(pair.posterior.kl(), torch.zeros(2))


def test_the_identity_gives_the_plain_objective_exactly(new_autoencoder, x):
    """A step whose tau is drawn as the identity, and one of Equation 1: the same losses, gradients and weights."""

    @method("standing")
    class Standing(Pair):
        def act(self, batch):
            torch.rand(5, generator=batch.generator)  # as many numbers as EQ-VAE's pair draws
            return Drawn(image=Compose(), latent=Compose(), branch="equivariance")

    config = configure(restart_dead_codes=2)
    plain, standing = (build_state(new_autoencoder(), config, CPU) for _ in range(2))
    for _ in range(3):
        first = step(plain, x, config)
        second = train_step(standing, x, config, L1, Mixture(pairs=((1.0, Standing()),), terms=config.mixture().terms))
        assert (first.branch, second.branch) == ("plain", "equivariance")
        assert replace(second, branch="plain") == first
    ours, theirs = standing.tensors(), plain.tensors()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("transforms", ["plain", "rotation", "scale"])
@pytest.mark.parametrize("weighting", ["area", "equal"])
def test_steps_have_the_gradient_of_equation_5(new_autoencoder, x, transforms, weighting):
    config = configure(
        transforms=transforms, equivariance_probability=None if transforms == "plain" else 1.0, codebook_weight=0.7,
        commitment_weight=0.3, resolution_weighting=weighting,
    )  # fmt: skip
    state = build_state(new_autoencoder(), config, CPU)
    tau = config.transform.sampler().draw((16, 16), generator_for(0, 0, 0)).tau
    record = step(state, x, config)

    reference = new_autoencoder()
    z = tau(reference.encode(x).mean)
    tokens = (z.permute(0, 2, 3, 1)[..., None, :] - reference.codebook).square().sum(-1).argmin(-1)
    codes = reference.codebook[tokens].permute(0, 3, 1, 2)
    decoded = reference.decode_quantized(z + (codes - z).detach())
    area = tau(x)[0].numel() / x[0].numel() if weighting == "area" else 1.0
    error = (tau(x) - decoded).abs().mean()
    codebook, commitment = (codes - z.detach()).square().mean(), (z - codes.detach()).square().mean()
    (area * (error + 0.7 * codebook + 0.3 * commitment)).backward()
    assert record.l1 == pytest.approx(error.item(), rel=1e-5)
    assert record.quantization == pytest.approx(area * commitment.item(), rel=1e-5)
    expected = gradients(reference)
    for name, gradient in gradients(state.autoencoder).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-7)
    assert "codes" in expected
    counts = torch.bincount(tokens.flatten(), minlength=24)
    assert record.codebook_usage == (counts > 0).double().mean().item()
    shares = counts[counts > 0] / counts.sum()
    assert record.codebook_perplexity == pytest.approx(math.exp(-(shares * shares.log()).sum().item()), rel=1e-5)


@pytest.mark.parametrize("num_channels", [1, 3, 5])
def test_the_codebook_counts_alike_beside_images_of_any_channels(num_channels):
    autoencoder = load_with_channels("untrained:tiny-vq", num_channels)
    x = torch.rand(2, num_channels, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        z = autoencoder.encode(x).mean
        commitment = autoencoder.quantize(z).commitment_loss.mean() / z[0].numel()
    record = step(build_state(autoencoder, configure(), CPU), x, configure())
    assert record.quantization == pytest.approx(commitment.item(), rel=1e-4)


def test_micro_batches_are_counted_together(new_autoencoder):
    x = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    records = []
    for num_parts in (1, 2):
        config = configure(batch_size=4, gradient_accumulation_steps=num_parts, codebook="ema", restart_dead_codes=1)
        state = build_state(new_autoencoder(), config, CPU)
        records.append((step(state, x, config), state.autoencoder.codebook.detach().clone()))
    assert records[0][0].codebook_usage == records[1][0].codebook_usage
    assert records[0][0].quantization == pytest.approx(records[1][0].quantization, rel=1e-5)
    torch.testing.assert_close(records[0][1], records[1][1])


def test_continuous_autoencoders_have_no_figures_of_codes(small_autoencoder, x):
    config = configure()
    record = step(build_state(small_autoencoder, config, CPU), x, config)
    assert not {"quantization", "codebook_usage", "codebook_perplexity"} & set(record.figures())


def test_a_discriminator_and_the_adaptive_weight_work_through_the_codebook(small_discrete_autoencoder, x):
    config = configure(adversarial_weight=0.5, discriminator_warmup_steps=1, restart_dead_codes=1)
    state = build_state(small_discrete_autoencoder, config, CPU)
    before = state.autoencoder.codebook.detach().clone()
    assert step(state, x, config).adaptive_weight == 0.0
    assert torch.equal(state.autoencoder.codebook, before)  # not even dead codes move in the warm-up
    assert step(state, x, config).adaptive_weight > 0.0
    assert not torch.equal(state.autoencoder.codebook, before)


def test_explicit_objectives_compare_latents_before_quantization(new_autoencoder, x):
    config = configure(objective="explicit", transforms="rotation", equivariance_probability=1.0)
    record = step(build_state(new_autoencoder(), config, CPU), x, config)
    tau, reference = config.transform.sampler().draw((16, 16), generator_for(0, 0, 0)).tau, new_autoencoder()
    expected = (tau(reference.encode(x).mean) - reference.encode(tau(x)).mean).square().sum((1, 2, 3)).mean()
    assert record.explicit == pytest.approx(expected.item(), rel=1e-4)


# Codes as averages --------------------------------------------------------------------------------------------------


def given(num=12, num_codes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, num_codes - 1, (num,), generator=generator)  # the last code is never used
    return Codes(vectors=torch.randn(num, 3, generator=generator), tokens=tokens)


def test_averaged_codes_follow_the_closed_form():
    codebook = torch.randn(5, 3, generator=torch.Generator().manual_seed(9))
    state = CodebookState.begin(codebook)
    counts, sums = torch.ones(5, dtype=torch.float64), codebook.double().clone()
    for index in range(4):
        codes = given(seed=index)
        state.average(codebook, codes, decay=0.9)
        for code in range(5):
            own = codes.vectors[codes.tokens == code].double()
            counts[code] = 0.9 * counts[code] + 0.1 * len(own)
            sums[code] = 0.9 * sums[code] + 0.1 * own.sum(0)
        smoothed = (counts + 1e-5) / (counts.sum() + 5e-5) * counts.sum()
        torch.testing.assert_close(codebook.double(), sums / smoothed[:, None], rtol=1e-5, atol=1e-6)


def test_codes_are_the_means_of_their_latents_in_the_end():
    codebook, codes = torch.randn(5, 3), given()
    state = CodebookState.begin(codebook)
    for _ in range(200):
        state.average(codebook, codes, decay=0.9)
    for code in codes.tokens.unique():
        torch.testing.assert_close(codebook[code], codes.vectors[codes.tokens == code].mean(0), rtol=1e-3, atol=1e-3)
    assert codebook.isfinite().all()


def test_an_averaged_codebook_gets_no_gradient(new_autoencoder, x):
    config = configure(codebook="ema", codebook_decay=0.5, ema_decay=0.0, weight_decay=0.1, codebook_weight=1e9)
    state = build_state(new_autoencoder(), config, CPU)
    reference = new_autoencoder()
    z = reference.encode(x).mean.detach()
    quantized = reference.quantize(z)
    step(state, x, config)
    assert state.autoencoder.codebook.grad is None
    begun = CodebookState.begin(reference.codebook)
    codes = Codes(vectors=z.permute(0, 2, 3, 1).reshape(-1, 4), tokens=quantized.tokens.flatten())
    begun.average(reference.codebook.data, codes, decay=0.5)
    torch.testing.assert_close(state.autoencoder.codebook.data, reference.codebook.data)


# Codes that start again ---------------------------------------------------------------------------------------------


def test_dead_codes_start_again_at_latents_of_the_step():
    codebook = torch.randn(5, 3, generator=torch.Generator().manual_seed(9))
    before, state = codebook.clone(), CodebookState.begin(codebook)
    codes = Codes(vectors=torch.arange(12.0).view(4, 3), tokens=torch.tensor([0, 0, 1, 0]))
    for _ in range(2):
        assert not state.restart(codebook, codes, after=3, generator=generator_for(0)).any()
    assert torch.equal(codebook, before)
    assert state.steps_unused.tolist() == [0, 0, 2, 2, 2]
    restarted = state.restart(codebook, codes, after=3, generator=generator_for(0))
    assert restarted.tolist() == [False, False, True, True, True]
    assert torch.equal(codebook[:2], before[:2])
    rows = [codes.vectors.tolist().index(row) for row in codebook[2:].tolist()]
    assert len(set(rows)) == 3
    assert state.steps_unused.tolist() == [0] * 5
    assert torch.equal(state.sums[2:], codebook[2:])
    assert state.counts.tolist() == [1.0] * 5


def test_where_latents_are_few_the_longest_unused_codes_come_first():
    codebook = torch.zeros(5, 3)
    state = CodebookState.begin(codebook)
    codes = Codes(vectors=torch.ones(2, 3), tokens=torch.tensor([0, 0]))
    for expected in ([1, 2], [3, 4], [1, 2]):
        restarted = state.restart(codebook, codes, after=1, generator=generator_for(0))
        assert restarted.nonzero().flatten().tolist() == expected


def test_restarts_depend_on_seed_and_step_alone(new_autoencoder, x):
    codebooks = []
    for seed, others in ((0, 0), (0, 1), (1, 0)):
        torch.manual_seed(others)
        config = configure(seed=seed, restart_dead_codes=1, learning_rate=1e-30, codebook_weight=0.0)
        state = build_state(new_autoencoder(), config, CPU)
        for _ in range(2):
            step(state, x, config)
        codebooks.append(state.autoencoder.codebook.detach().clone())
    assert torch.equal(codebooks[0], codebooks[1])
    assert not torch.equal(codebooks[0], codebooks[2])


def test_restarted_codes_reach_the_averaged_weights_at_once(new_autoencoder, x):
    config = configure(restart_dead_codes=1, ema_decay=0.999)
    state = build_state(new_autoencoder(), config, CPU)
    for _ in range(4):
        before = state.autoencoder.codebook.detach().clone()
        step(state, x, config)
        moved = (state.autoencoder.codebook.detach() - before).norm(dim=1) > 0.05
        assert torch.equal(state.exported().codebook[moved], state.autoencoder.codebook[moved])
    assert state.exported() is not state.autoencoder


def test_restarts_raise_the_usage(new_autoencoder, x):
    usage = {}
    for after in (0, 2):
        config = configure(restart_dead_codes=after)
        autoencoder = new_autoencoder()
        autoencoder.codes.data[1:] += 100.0  # all latents fall to the first code
        state = build_state(autoencoder, config, CPU)
        usage[after] = [step(state, x, config).codebook_usage for _ in range(6)]
    assert set(usage[0]) == {1 / 24}
    assert usage[2][-1] > 0.5


# The run ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_config(photographs: Path, tmp_path: Path):
    def make(out: str = "run", **changes) -> FinetuneConfig:
        defaults = {
            "autoencoder": "small", "image_size": 64, "data": str(photographs), "validation_data": str(photographs),
            "out": tmp_path / out, "max_steps": 6,
            "log_every": 1, "num_validation_images": 2, "num_statistics_images": 2, "validate_every": 100,
            "num_workers": 0, "device": "cpu",
        }  # fmt: skip
        return from_flat(FinetuneConfig, **DEFAULTS | defaults | changes).resolved()

    return make


@pytest.mark.parametrize("codebook", ["gradient", "ema"])
def test_six_steps_are_three_a_stop_and_three(run_config, new_autoencoder, monkeypatch, codebook):
    changes = {"codebook": codebook, "restart_dead_codes": 2, "transforms": "paper", "checkpoint_every": 3}
    whole, halves = run_config("whole", **changes), run_config("halves", **changes)
    expected = finetune(whole, new_autoencoder())
    with monkeypatch.context() as patch:
        real = train_step

        def stop(state, *arguments):
            if state.step == 4:
                raise MemoryError
            return real(state, *arguments)

        patch.setattr("eqvae.runs.finetune_run.train_step", stop)
        with pytest.raises(UserError, match="memory is full"):
            finetune(halves, new_autoencoder())
    figures = finetune(halves, new_autoencoder())
    ours, theirs = (read_tensors(config.out / CHECKPOINT)[0] for config in (halves, whole))
    assert ours.keys() == theirs.keys()
    assert {"codebook.counts", "codebook.sums", "codebook.steps_unused"} <= set(ours)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    journals = [
        [{name: record[name] for name in record if name not in ("images_per_sec", "training_sec")}
         for record in read_journal(config.out) if record["kind"] == "train"] for config in (halves, whole)
    ]  # fmt: skip
    assert journals[0] == journals[1]
    assert {"quantization", "codebook_usage", "codebook_perplexity"} <= set(journals[0][-1])
    for name in ("codebook_usage", "codebook_perplexity", "token_agreement_rotation", "token_agreement_scale"):
        assert figures[name] == expected[name]
        assert f"before_{name}" in figures


def test_training_lowers_the_loss(run_config, small_discrete_autoencoder):
    config = run_config(max_steps=60, learning_rate=5e-3, codebook="ema", restart_dead_codes=5, batch_size=4)
    figures = finetune(config, small_discrete_autoencoder)
    assert figures["psnr_db"] > figures["before_psnr_db"] + 1.0


def test_a_frozen_encoder_keeps_its_codes_too(run_config, small_discrete_autoencoder):
    before = {name: value.clone() for name, value in small_discrete_autoencoder.state_dict().items()}
    figures = finetune(run_config(freeze_encoder=True, weight_decay=0.1), small_discrete_autoencoder)
    after = small_discrete_autoencoder.state_dict()
    assert {name.split(".")[0] for name, value in after.items() if not value.equal(before[name])} == {
        "decoder",
        "layer",
    }
    assert figures["token_agreement_scale"] == figures["before_token_agreement_scale"]


def test_a_step_that_fails_moves_no_code(small_discrete_autoencoder, x):
    config = configure(codebook="ema", restart_dead_codes=1)
    state = build_state(small_discrete_autoencoder, config, CPU)
    step(state, x, config)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    with pytest.raises(NotFiniteError):
        step(state, x * math.nan, config)
    assert [name for name, tensor in state.tensors().items() if not torch.equal(tensor, before[name])] == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"codebook": "ema"}, "--codebook ema is for discrete autoencoders"),
        ({"restart_dead_codes": 5}, "--restart-dead-codes is for discrete autoencoders"),
    ],
)
def test_codes_are_not_asked_of_continuous_autoencoders(run_config, small_autoencoder, changes, says):
    config = run_config(**changes)
    for work in (finetune, plan):
        with pytest.raises(UserError, match=says):
            work(config, small_autoencoder)
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"codebook": "ema", "freeze_encoder": True}, "--codebook ema moves codes"),
        ({"restart_dead_codes": 5, "freeze_encoder": True}, "--restart-dead-codes moves codes"),
        ({"codebook_decay": 1.0}, "--codebook-decay"),
        ({"commitment_weight": -1.0}, "--commitment-weight"),
        ({"restart_dead_codes": -1}, "--restart-dead-codes"),
    ],
)
def test_wrong_input_is_named(changes, says):
    with pytest.raises(UserError, match=says):
        configure(**changes)


def test_a_plan_of_a_discrete_autoencoder(run_config):
    from eqvae.autoencoders import build_autoencoder

    figures = plan(run_config(precision="bf16"), build_autoencoder("tiny-vq-f4", seed=0))
    assert figures["latent_size"] == [16, 16, 16]
    assert figures["tflops_per_step"] > 0
