"""REPA: the alignment's value, its gradient, grids and the token cache."""

import pytest
import torch

from eqvae.generators.diffusion import DiffusionObjective, GaussianDiffusion
from eqvae.generators.families import find_recipe
from eqvae.generators.interpolant import InterpolantObjective
from eqvae.generators.protocol import LatentSpecification, Objective
from eqvae.generators.repa import RepaConfig, RepaObjective, resize_tokens, token_cosine

INNER = {
    "interpolant": InterpolantObjective(num_classes=5),
    "diffusion": DiffusionObjective(num_classes=5, diffusion=GaussianDiffusion()),
}


def _tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _step(objective, transformer, num: int = 3):
    draws = objective.draw(num, transformer.config.latents, torch.Generator().manual_seed(0))
    return _tokens(num, 3, 4, 6), torch.arange(num), draws


@pytest.mark.parametrize("kind", INNER)
def test_the_alignment_is_added_to_the_wrapped_objective(build_transformer, kind):
    inner = INNER[kind]
    transformer = build_transformer(out_channels=inner.out_channels(3), teacher_channels=7, projector_width=16)
    objective = RepaObjective(objective=inner, depth=2, weight=0.5)
    latents, labels, draws = _step(objective, transformer)
    assert objective.out_channels(3) == inner.out_channels(3)
    teacher = _tokens(3, 6, 7, seed=3)
    seen = []

    def predict(z, t, seen_labels, depth=None):
        seen.append((z, t, seen_labels))
        return transformer(z, t, seen_labels, depth)

    loss = objective.loss(predict, latents, labels, draws | {"teacher_tokens": teacher})
    plain = inner.loss(transformer, latents, labels, draws)
    assert len(seen) == 1
    hidden = transformer(*seen[0], 2)
    a, b = transformer.projectors[0](hidden.hidden), teacher
    cosine = ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean(1)
    assert torch.equal(hidden.projected, a)
    assert torch.allclose(loss.parts["repa"], -cosine, atol=1e-5)
    assert torch.allclose(loss.total, plain.total - 0.5 * cosine, atol=1e-5)
    assert {**loss.parts, "repa": 0}.keys() == {**plain.parts, "repa": 0}.keys()


def test_the_alignment_trains_the_projector_and_the_blocks_before_it(build_transformer):
    transformer = build_transformer(out_channels=3, teacher_channels=7, projector_width=16)
    objective = RepaObjective(objective=INNER["interpolant"], depth=2)
    latents, labels, draws = _step(objective, transformer)
    loss = objective.loss(transformer, latents, labels, draws | {"teacher_tokens": _tokens(3, 6, 7, seed=3)})
    loss.parts["repa"].sum().backward()
    moved = {name for name, parameter in transformer.named_parameters() if parameter.grad is not None}
    assert {
        "projectors.0.0.weight",
        "projectors.0.4.bias",
        "blocks.1.mlp.fc2.weight",
        "x_embedder.proj.weight",
    } <= moved
    assert not any(name.startswith(("blocks.2.", "final_layer.")) for name in moved)


def test_without_a_teacher_the_loss_is_the_wrapped_objectives(build_transformer):
    transformer = build_transformer(out_channels=3)
    objective = RepaObjective(objective=INNER["interpolant"], depth=2)
    latents, labels, draws = _step(objective, transformer)
    loss = objective.loss(transformer, latents, labels, draws)
    assert torch.equal(loss.total, INNER["interpolant"].loss(transformer, latents, labels, draws).total)


def test_cosines_of_equal_opposite_and_orthogonal_tokens():
    tokens = torch.eye(4).repeat(2, 1, 1)
    assert torch.allclose(token_cosine(tokens, 3.0 * tokens, aspect=1.0), torch.ones(2))
    assert torch.allclose(token_cosine(tokens, -tokens, aspect=1.0), -torch.ones(2))
    assert torch.allclose(token_cosine(tokens, tokens.roll(1, 2), aspect=1.0), torch.zeros(2))
    assert torch.allclose(token_cosine(tokens.bfloat16(), tokens, aspect=1.0), torch.ones(2))


def test_a_teacher_on_another_grid_is_resized():
    rows = torch.arange(8.0)[:, None].expand(8, 12)
    columns = torch.arange(12.0)[None].expand(8, 12)
    fine = torch.stack([rows, columns], -1).reshape(1, 96, 2)
    coarse = resize_tokens(fine, 24, aspect=8 / 12).reshape(4, 6, 2)
    # Away from the border, each coarse token is the mean of a symmetric neighbourhood: ramps stay ramps.
    assert coarse[1:3, 0, 0].tolist() == pytest.approx([2.5, 4.5])
    assert coarse[0, 1:5, 1].tolist() == pytest.approx([2.5, 4.5, 6.5, 8.5])
    constant = torch.ones(2, 96, 3)
    assert torch.allclose(resize_tokens(constant, 24, aspect=8 / 12), torch.ones(2, 24, 3))
    assert token_cosine(torch.ones(2, 24, 3), constant, aspect=8 / 12).tolist() == pytest.approx([1.0, 1.0])


def test_tokens_that_fill_no_grid_are_refused():
    with pytest.raises(ValueError, match="7 tokens fill no grid"):
        resize_tokens(torch.ones(1, 7, 3), 4, aspect=1.0)


def _objective(family: str) -> Objective:
    latents = LatentSpecification(channels=3, height=4, width=6, num_classes=5)
    return find_recipe(f"{family}-ti-2", RepaConfig(repa_depth=1) if family == "repa-sit" else None).objective(latents)


@pytest.mark.parametrize("family", ["dit", "sit", "repa-sit"])
def test_every_family_learns(build_transformer, family):
    """A few steps on eight fixed latents lower the loss on noise that was not trained on."""
    objective = _objective(family)
    transformer = build_transformer(
        out_channels=objective.out_channels(3), teacher_channels=7, projector_width=16, depth=2
    )
    with torch.no_grad():
        transformer.final_layer.linear.weight.zero_()
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=3e-3, weight_decay=0.0)
    latents, labels, teacher = 0.5 * _tokens(8, 3, 4, 6), torch.arange(8) % 5, _tokens(8, 6, 7, seed=1)

    def loss(seed: int) -> torch.Tensor:
        draws = objective.draw(64, transformer.config.latents, torch.Generator().manual_seed(seed))
        rows = torch.arange(64) % 8
        draws["teacher_tokens"] = teacher[rows]
        return objective.loss(transformer, latents[rows], labels[rows], draws).total.mean()

    with torch.no_grad():
        before = loss(1000).item()
    for step in range(60):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
    with torch.no_grad():
        after = loss(1000).item()
    assert after < before - 0.1
