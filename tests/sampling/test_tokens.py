"""Samplers of tokens: each is filled once, by the right rule, and an image is the same in any batch."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from scipy.stats import kstest
from scipy.stats.qmc import Halton

from eqvae.errors import UserError
from eqvae.generators.maskgit import tokens_per_step
from eqvae.generators.maskgit_transformer import MaskTransformer, MaskTransformerConfig
from eqvae.generators.protocol import LatentSpecification
from eqvae.paper.settings import PAPER, TINY
from eqvae.sampling.noise import TokenNoise
from eqvae.sampling.tokens import TokenDecoding, classifier_free_token_guidance, confidence, halton, halton_order

TOKENS = LatentSpecification(channels=7, height=4, width=5, num_classes=3)
MASK = 7

samplers = pytest.mark.parametrize("sampler", [confidence, halton])


def _small_network(*, num_classes: int = 3) -> MaskTransformer:
    latents = LatentSpecification(channels=7, height=4, width=5, num_classes=num_classes)
    config = MaskTransformerConfig(latents=latents, depth=2, hidden_size=16, num_heads=2, mlp_size=32)
    transformer = MaskTransformer(config).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return transformer


def _even(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*tokens.shape, 7)


def _draw(sampler, predict, indices, labels=None, *, seed: int = 0, callback=None, options=None, **decoding):
    labels = torch.tensor([index % 3 for index in indices]) if labels is None else labels
    noise = TokenNoise(seed, indices, (4, 5))
    plan = TokenDecoding(**{"num_steps": 6} | decoding)
    return sampler(predict, noise, labels, TOKENS, plan, callback=callback, **options or {})


@samplers
@pytest.mark.parametrize("num_steps", [1, 2, 6, 20, 50])
@pytest.mark.parametrize("schedule", ["arccos", "cosine", "linear", "square"])
@pytest.mark.parametrize("rule", [None, "remaining", "increments"])
def test_every_token_is_filled_once_and_by_plan(sampler, num_steps, schedule, rule):
    steps = []
    tokens = _draw(
        sampler, _even, range(3), num_steps=num_steps, schedule=schedule, step_rule=rule, callback=steps.append
    )
    default = "increments" if sampler is confidence else "remaining"
    counts = tokens_per_step(schedule, 20, num_steps, rule=rule or default)
    assert len(steps) == len(counts)
    assert (steps[0].tokens == MASK).all()
    assert not (tokens == MASK).any()
    assert tokens.min() >= 0
    states = [step.tokens for step in steps] + [tokens]
    for count, (before, after) in zip(counts, itertools.pairwise(states), strict=True):
        was_masked = before == MASK
        assert torch.equal(after[~was_masked], before[~was_masked])  # filled for good
        assert (was_masked & (after != MASK)).flatten(1).sum(1).tolist() == [count] * 3
    for step, after in zip(steps, states[1:], strict=True):
        assert not (step.proposal == MASK).any()
        assert torch.equal(after[after != MASK], step.proposal[after != MASK])


@pytest.mark.parametrize(
    ("sampler", "options"), [(confidence, {}), (confidence, {"choice_temperature": 2.0}), (halton, {})]
)
def test_an_image_is_the_same_in_any_batch(sampler, options):
    predict = _small_network()
    settings = {"guidance_scale": 3.0, "temperature": 0.9, "options": options}
    whole = _draw(sampler, predict, range(7), **settings)
    assert torch.equal(_draw(sampler, predict, range(7), **settings), whole)
    for size in (1, 2, 4):
        for start in range(0, 7, size):
            indices = range(start, min(start + size, 7))
            assert torch.equal(_draw(sampler, predict, indices, **settings), whole[start : indices.stop])
    assert torch.equal(_draw(sampler, predict, [5, 0], **settings), whole[[5, 0]])
    assert not torch.equal(_draw(sampler, predict, range(7), seed=1, **settings), whole)
    assert len({tuple(image.flatten().tolist()) for image in whole}) == 7


@samplers
def test_a_perfect_oracle_is_believed(sampler):
    truth = torch.randint(0, 7, (3, 4, 5), generator=torch.Generator().manual_seed(0))
    logits = 1000.0 * torch.nn.functional.one_hot(truth, 7).float()

    def oracle(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return logits[labels]

    drawn = _draw(sampler, oracle, range(6), top_k=3)
    assert torch.equal(drawn, truth[[0, 1, 2, 0, 1, 2]])


def test_without_noise_the_surest_are_filled_first():
    sureness = torch.randperm(20, generator=torch.Generator().manual_seed(0)).reshape(4, 5) / 2.0

    def predict(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(tokens), 4, 5, 7)
        logits[..., 2] = 20 + sureness  # so sure that it is always drawn
        return logits.double()

    steps = []
    _draw(confidence, predict, [0, 1], num_steps=5, callback=steps.append, options={"choice_temperature": 0})
    filled = 0
    for step, count in zip(steps, tokens_per_step("arccos", 20, 5, rule="increments"), strict=True):
        expected = sureness.flatten().argsort(descending=True)[:filled]
        for image in step.tokens:
            assert set((image != MASK).flatten().nonzero().flatten().tolist()) == set(expected.tolist())
        filled += count


def test_with_much_noise_the_cells_are_chosen_at_random():
    counts = torch.zeros(4, 5)

    def predict(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(tokens), 4, 5, 7)
        logits[:, :2, :, 2] = 9.0
        return logits

    def count(step) -> None:
        if step.step == 1:
            counts.add_((step.tokens != MASK).sum(0))

    options = {"choice_temperature": 1e6}
    _draw(confidence, predict, range(600), num_steps=2, schedule="linear", step_rule="remaining", callback=count,
          options=options)  # fmt: skip
    assert counts.sum() == 600 * 10
    assert (counts / 600 - 0.5).abs().max() < 0.1


def test_the_noise_of_choice_fades_linearly():
    steps = []
    _draw(confidence, _even, [0], num_steps=5, callback=steps.append)
    assert [step.progress for step in steps] == [0.0, 0.25, 0.5, 0.75, 1.0]
    single = []
    _draw(confidence, _even, [0], num_steps=1, callback=single.append)
    assert single[0].progress == 1.0


def test_halton_fills_in_its_order():
    steps, order = [], halton_order(4, 5)
    _draw(halton, _even, [0, 1], callback=steps.append)
    filled = 0
    for step, count in zip(steps, tokens_per_step("arccos", 20, 6), strict=True):
        assert set((step.tokens[1] != MASK).flatten().nonzero().flatten().tolist()) == set(order[:filled].tolist())
        filled += count


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (9, 1), (2, 3), (8, 8), (16, 16), (12, 20), (27, 5), (32, 32)])
def test_the_halton_order_is_a_permutation(grid):
    assert sorted(halton_order(*grid).tolist()) == list(range(grid[0] * grid[1]))


def _radical_inverse(number: int, base: int) -> Fraction:
    inverse, digit_value = Fraction(0), Fraction(1, base)
    while number:
        number, digit = divmod(number, base)
        inverse, digit_value = inverse + digit * digit_value, digit_value / base
    return inverse


@pytest.mark.parametrize("grid", [(16, 16), (6, 9), (7, 11)])
def test_the_halton_order_is_that_of_fractions(grid):
    seen: list[int] = []
    for number in itertools.count(1):
        row, column = int(_radical_inverse(number, 2) * grid[0]), int(_radical_inverse(number, 3) * grid[1])
        if row * grid[1] + column not in seen:
            seen.append(row * grid[1] + column)
        if len(seen) == grid[0] * grid[1]:
            break
    assert halton_order(*grid).tolist() == seen


def test_the_halton_order_begins_as_scipys_sequence():
    points = Halton(2, scramble=False)
    points.fast_forward(1)
    cells = (points.random(12) * 32 + 1e-9).astype(int)  # 12 points, each in a cell of its own
    assert halton_order(32, 32)[:12].tolist() == [row * 32 + column for row, column in cells.tolist()]


def test_the_first_of_the_order_are_spread_out():
    for num in (4, 16, 64):
        cells = halton_order(16, 16)[:num]
        quadrants = (cells // 16 // 8) * 2 + (cells % 16) // 8
        assert (quadrants.bincount(minlength=4) - num / 4).abs().max() <= 2


@samplers
def test_guidance_of_one_is_none_in_one_call(sampler):
    sizes, network = [], _small_network()

    def predict(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        sizes.append(len(tokens))
        return network(tokens, labels)

    plain = _draw(sampler, predict, range(3))
    assert sizes == [3] * 6
    for schedule in ("constant", "linear"):
        assert torch.equal(_draw(sampler, predict, range(3), guidance_schedule=schedule), plain)
    assert classifier_free_token_guidance(predict, 1.0, 3) is predict
    sizes.clear()
    _draw(sampler, predict, range(3), guidance_scale=2.0, guidance_schedule="constant")
    assert sizes == [6] * 6
    sizes.clear()
    _draw(sampler, predict, range(3), guidance_scale=2.0)
    assert sizes == [3] + [6] * 5  # linear: nothing to mix at first


def test_guidance_is_that_of_the_published_formula():
    network, tokens, labels = _small_network(), torch.full((2, 4, 5), MASK), torch.tensor([0, 2])
    conditional, null = network(tokens, labels), network(tokens, torch.tensor([3, 3]))
    published_weight = 3.0
    expected = (1 + published_weight) * conditional - published_weight * null
    guided = classifier_free_token_guidance(network, 1 + published_weight, 3)(tokens, labels)
    assert torch.allclose(guided, expected, rtol=1e-9, atol=1e-9)
    nothing_of_it = classifier_free_token_guidance(network, 0.0, 3)(tokens, labels)
    assert torch.allclose(nothing_of_it, null, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("setting", [PAPER, TINY], ids=["paper", "tiny"])
def test_the_recipes_guide_by_the_published_formula_at_3(setting):
    """`_w = w * step / (steps - 1); logit = (1 + _w) * logit_c - _w * logit_u` with w = 3, arXiv:2310.14400."""
    network, tokens, labels = _small_network(), torch.full((2, 4, 5), MASK), torch.tensor([0, 2])
    conditional, null = network(tokens, labels), network(tokens, torch.tensor([3, 3]))
    for config in (setting.sampling["maskgit"], setting.guided_sampling["maskgit"]):
        decoding = TokenDecoding(num_steps=config.num_steps, guidance_scale=config.guidance_scale)
        for step in range(config.num_steps):
            w = 3.0 * step / (config.num_steps - 1)
            scale = decoding.scale_at(step / (config.num_steps - 1))
            guided = classifier_free_token_guidance(network, scale, 3)(tokens, labels)
            assert torch.allclose(guided, (1 + w) * conditional - w * null, rtol=1e-9, atol=1e-9)


def test_the_scale_grows_linearly_or_not():
    linear, constant = (
        TokenDecoding(num_steps=5, guidance_scale=4.0, guidance_schedule=schedule)
        for schedule in ("linear", "constant")
    )
    assert [linear.scale_at(step / 4) for step in range(5)] == [1.0, 1.75, 2.5, 3.25, 4.0]
    assert [constant.scale_at(step / 4) for step in range(5)] == [4.0] * 5


def _frequencies(*, num_images: int = 500, **decoding) -> torch.Tensor:
    def predict(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.arange(7).double().div(2).expand(*tokens.shape, 7)

    drawn = _draw(halton, predict, range(num_images), num_steps=2, **decoding)
    return drawn.flatten().bincount(minlength=7) / drawn.numel()


def test_codes_are_drawn_from_the_softmax():
    logits = torch.arange(7).double() / 2
    assert torch.allclose(_frequencies().double(), logits.softmax(0), atol=0.012)
    assert torch.allclose(_frequencies(temperature=2.0).double(), (logits / 2).softmax(0), atol=0.015)
    assert torch.allclose(_frequencies(temperature=0.25).double(), (logits * 4).softmax(0), atol=0.012)


def test_only_the_likeliest_codes_are_drawn():
    frequencies = _frequencies(top_k=2).double()
    assert frequencies[:5].sum() == 0
    assert torch.allclose(frequencies[5:], torch.tensor([5 / 2, 6 / 2]).double().softmax(0), atol=0.012)
    assert _frequencies(top_k=1, num_images=3).tolist() == [0, 0, 0, 0, 0, 0, 1]
    assert torch.equal(_frequencies(top_k=99, num_images=20), _frequencies(num_images=20))


def test_a_code_of_probability_zero_is_never_drawn():
    def predict(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = torch.full((*tokens.shape, 7), -math.inf)
        logits[..., 1], logits[..., 4] = 0.0, 0.1
        return logits

    class Extreme(TokenNoise):
        def uniform(self) -> torch.Tensor:
            drawn = super().uniform()
            return torch.where(drawn < 0.5, 0.0, 1 - 2.0**-24)

    drawn = halton(predict, Extreme(0, range(4), (4, 5)), torch.zeros(4).long(), TOKENS, TokenDecoding(num_steps=3))
    assert set(drawn.flatten().tolist()) == {1, 4}


def test_the_noise_is_uniform_and_gumbel():
    noise = TokenNoise(0, range(100), (8, 8))
    uniform, gumbel = noise.uniform().flatten(), noise.gumbel().flatten()
    assert kstest(uniform.numpy(), "uniform").pvalue > 0.01
    assert kstest(gumbel.numpy(), "gumbel_r").pvalue > 0.01
    assert gumbel.isfinite().all()
    assert torch.corrcoef(torch.stack([uniform, gumbel]))[0, 1].abs() < 0.05
    assert len(noise) == 100


def test_previews_are_kept_as_they_were():
    steps = []
    tokens = _draw(confidence, _small_network(), range(2), callback=steps.append)
    assert [int((step.tokens == MASK).sum()) for step in steps] == sorted(
        (int((step.tokens == MASK).sum()) for step in steps), reverse=True
    )
    assert torch.equal(steps[-1].proposal, tokens)


@samplers
def test_not_finite_logits_are_the_users_to_know(sampler):
    def predict(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.full((*tokens.shape, 7), math.nan if (tokens != MASK).any() else 0.0)

    with pytest.raises(UserError, match="logits became NaN or infinite"):
        _draw(sampler, predict, [0])


def test_noise_of_another_grid_is_refused():
    with pytest.raises(UserError, match=r"the noise is of \(5, 4\) tokens, the generator of \(4, 5\)"):
        halton(_even, TokenNoise(0, [0], (5, 4)), torch.tensor([0]), TOKENS, TokenDecoding(num_steps=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "drawn in 0 steps"),
        ({"temperature": 0.0}, "temperature of tokens is 0.0"),
        ({"temperature": math.nan}, "temperature of tokens is nan"),
        ({"top_k": 0}, "from the 0 likeliest codes"),
    ],
)
def test_numbers_without_sense_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        TokenDecoding(**{"num_steps": 4} | changes)


@samplers
def test_without_classes_it_samples_too(sampler):
    latents = LatentSpecification(channels=7, height=4, width=5, num_classes=0)
    noise, labels = TokenNoise(0, range(2), (4, 5)), torch.tensor([0, 0])
    tokens = sampler(_small_network(num_classes=0), noise, labels, latents, TokenDecoding(num_steps=3))
    assert tokens.shape == (2, 4, 5)
    assert tokens.max() < MASK
