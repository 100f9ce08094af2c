"""The backbone: published names, parity with a plainly written forward pass, and what it must survive."""

import math
import subprocess
import sys

import pytest
import torch
from jaxtyping import TypeCheckError
from torch.utils.flop_counter import FlopCounterMode

from eqvae.artifacts.files import to_plain
from eqvae.artifacts.typed import to_record
from eqvae.errors import UserError
from eqvae.generators.protocol import LatentSpecification
from eqvae.generators.transformer import (
    Transformer,
    TransformerConfig,
    WithHidden,
    position_embedding,
    time_frequencies,
)

UNCONDITIONAL = LatentSpecification(channels=3, height=4, width=6, num_classes=0)


def _inputs(num: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(num, 3, 4, 6, generator=generator)
    return z, 1000 * torch.rand(num, generator=generator), torch.randint(0, 6, (num,), generator=generator)


def _plain_forward(state: dict, config: TransformerConfig, z, t, labels):
    """DiT in loops and einsums, from the state dict alone; also the tokens after each block."""

    def linear(x, name):
        return torch.einsum("...i,oi->...o", x, state[f"{name}.weight"]) + state[f"{name}.bias"]

    def normalize(x, eps):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()

    def silu(x):
        return x / (1 + (-x).exp())

    side, (rows, columns), num_heads = config.patch_size, config.grid, config.num_heads
    kernel, tokens = state["x_embedder.proj.weight"], []
    for row in range(rows):
        for column in range(columns):
            patch = z[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
            tokens.append(torch.einsum("ncpq,dcpq->nd", patch, kernel) + state["x_embedder.proj.bias"])
    x = torch.stack(tokens, 1) + state["pos_embed"]

    frequencies = [math.exp(-math.log(10000) * index / 128) for index in range(128)]
    angles = t[:, None] * torch.tensor(frequencies, dtype=t.dtype)
    embedded = linear(torch.cat([angles.cos(), angles.sin()], 1), "t_embedder.mlp.0")
    c = linear(silu(embedded), "t_embedder.mlp.2")
    if "y_embedder.embedding_table.weight" in state:
        c = c + state["y_embedder.embedding_table.weight"][labels]

    after = []
    for index in range(config.depth):
        name = f"blocks.{index}"
        six = linear(silu(c), f"{name}.adaLN_modulation.1")[:, None].chunk(6, -1)
        qkv = linear(normalize(x, 1e-6) * (1 + six[1]) + six[0], f"{name}.attn.qkv")
        query, key, value = (part.unflatten(-1, (num_heads, -1)) for part in qkv.chunk(3, -1))
        if config.qk_norm:
            query, key = (
                normalize(part, 1e-5) * state[f"{name}.attn.{norm}.weight"] + state[f"{name}.attn.{norm}.bias"]
                for part, norm in ((query, "q_norm"), (key, "k_norm"))
            )
        weights = (torch.einsum("nihd,njhd->nhij", query, key) / math.sqrt(query.shape[-1])).softmax(-1)
        attended = torch.einsum("nhij,njhd->nihd", weights, value).flatten(2)
        x = x + six[2] * linear(attended, f"{name}.attn.proj")
        y = linear(normalize(x, 1e-6) * (1 + six[4]) + six[3], f"{name}.mlp.fc1")
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + six[5] * linear(y, f"{name}.mlp.fc2")
        after.append(x)

    shift, scale = linear(silu(c), "final_layer.adaLN_modulation.1")[:, None].chunk(2, -1)
    patches = linear(normalize(x, 1e-6) * (1 + scale) + shift, "final_layer.linear")
    output = z.new_empty(len(z), config.out_channels, rows * side, columns * side)
    for row in range(rows):
        for column in range(columns):
            values = patches[:, row * columns + column].reshape(len(z), side, side, config.out_channels)
            output[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side] = values.movedim(-1, 1)
    return output, after


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"patch_size": 1}, {"mlp_ratio": 2, "out_channels": 3}])
def test_the_output_is_that_of_a_plain_forward_pass(build_transformer, changes):
    transformer = build_transformer(**changes).double()
    z, t, labels = _inputs()
    z, t = z.double(), t.double() / 1000  # angles are fp32: those of late times would differ by some 1e-4
    expected, after = _plain_forward(transformer.state_dict(), transformer.config, z, t, labels)
    assert torch.allclose(transformer(z, t, labels), expected, rtol=1e-5, atol=1e-5)
    for depth, tokens in enumerate(after, start=1):
        answer = transformer(z, t, labels, depth)
        assert isinstance(answer, WithHidden)
        assert torch.allclose(answer.hidden, tokens, rtol=1e-5, atol=1e-5)
        assert torch.equal(answer.output, transformer(z, t, labels))
        assert answer.projected is None


def test_without_classes_labels_are_ignored(build_transformer):
    transformer = build_transformer(latents=UNCONDITIONAL).double()
    z, t, labels = _inputs()
    z, t = z.double(), t.double() / 1000
    expected, _ = _plain_forward(transformer.state_dict(), transformer.config, z, t, labels)
    assert torch.allclose(transformer(z, t, labels), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(transformer(z, t, labels), transformer(z, t, torch.zeros_like(labels)))
    assert not any(name.startswith("y_embedder") for name in transformer.state_dict())


def test_parameters_have_the_published_names(build_transformer):
    block = [
        f"{name}.{kind}"
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
        for kind in ("weight", "bias")
    ]
    outside = [
        "x_embedder.proj.weight", "x_embedder.proj.bias", "pos_embed", "y_embedder.embedding_table.weight",
        "t_embedder.mlp.0.weight", "t_embedder.mlp.0.bias", "t_embedder.mlp.2.weight", "t_embedder.mlp.2.bias",
        "final_layer.linear.weight", "final_layer.linear.bias",
        "final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias",
    ]  # fmt: skip
    expected = {*outside, *(f"blocks.{index}.{name}" for index in range(3) for name in block)}
    assert set(build_transformer().state_dict()) == expected
    extra = set(build_transformer(qk_norm=True, teacher_channels=7, projector_width=16).state_dict()) - expected
    norms = {f"blocks.{i}.attn.{n}.{k}" for i in range(3) for n in ("q_norm", "k_norm") for k in ("weight", "bias")}
    assert extra == norms | {f"projectors.0.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")}


def test_shapes_are_the_published_ones(build_transformer):
    shapes = {name: tuple(tensor.shape) for name, tensor in build_transformer().state_dict().items()}
    assert shapes["x_embedder.proj.weight"] == (24, 3, 2, 2)
    assert shapes["pos_embed"] == (1, 6, 24)
    assert shapes["y_embedder.embedding_table.weight"] == (6, 24)
    assert shapes["t_embedder.mlp.0.weight"] == (24, 256)
    assert shapes["blocks.0.attn.qkv.weight"] == (72, 24)
    assert shapes["blocks.0.adaLN_modulation.1.weight"] == (144, 24)
    assert shapes["final_layer.linear.weight"] == (24, 24)
    without = build_transformer(null_label=False).state_dict()["y_embedder.embedding_table.weight"]
    assert tuple(without.shape) == (5, 24)


def test_first_weights_make_blocks_the_identity_and_the_output_zero():
    config = TransformerConfig(
        latents=LatentSpecification(channels=4, height=8, width=8, num_classes=10),
        depth=2, hidden_size=64, num_heads=4, patch_size=2, out_channels=8,
    )  # fmt: skip
    transformer = Transformer(config, generator=torch.Generator().manual_seed(0))
    z, t, labels = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 500.0]), torch.tensor([0, 10])
    answer = transformer(z, t, labels, 2)
    assert answer.output.abs().max() == 0
    assert torch.equal(answer.hidden, transformer.x_embedder(z) + transformer.pos_embed)
    state = transformer.state_dict()
    bound = math.sqrt(6 / (64 + 3 * 64))
    assert state["blocks.0.attn.qkv.weight"].abs().max() <= bound
    assert state["blocks.0.attn.qkv.weight"].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert state["x_embedder.proj.weight"].abs().max() <= math.sqrt(6 / (64 + 16))
    for name in ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight"):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.1)
    assert all(value.abs().max() == 0 for name, value in state.items() if name.endswith("bias"))


def test_first_weights_follow_from_the_generator(build_transformer):
    config = build_transformer().config
    a, b, c = (Transformer(config, generator=torch.Generator().manual_seed(seed)).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["blocks.0.attn.qkv.weight"], c["blocks.0.attn.qkv.weight"])


def test_positions_tell_column_then_row():
    positions = position_embedding(3, 5, 8).reshape(3, 5, 8)
    for row in range(3):
        for column in range(5):
            expected = [
                function(position * frequency)
                for position in (column, row)
                for function in (math.sin, math.cos)
                for frequency in (1.0, 0.01)
            ]
            assert positions[row, column].tolist() == pytest.approx(expected, abs=1e-6)


def test_late_times_are_embedded_exactly_enough():
    t = torch.tensor([3, 250, 999])
    angles = t.double()[:, None] * 10_000.0 ** (-torch.arange(128).double() / 128)
    assert torch.allclose(time_frequencies(t).double(), torch.cat([angles.cos(), angles.sin()], 1), atol=2e-4)


def test_integer_and_fractional_times_are_embedded_alike():
    assert torch.equal(time_frequencies(torch.tensor([0, 999])), time_frequencies(torch.tensor([0.0, 999.0])))
    assert time_frequencies(torch.tensor([0]))[0].tolist() == [1.0] * 128 + [0.0] * 128


def test_gradient_checkpointing_changes_nothing(build_transformer):
    z, t, labels = _inputs()
    gradients = []
    for saves_memory in (False, True):
        transformer = build_transformer()
        transformer.gradient_checkpointing = saves_memory
        transformer(z, t, labels).square().sum().backward()
        gradients.append({name: p.grad for name, p in transformer.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_positions_are_not_trained(build_transformer):
    transformer = build_transformer()
    z, t, labels = _inputs()
    transformer(z, t, labels).sum().backward()
    assert transformer.pos_embed.grad is None
    assert all(p.grad is not None for name, p in transformer.named_parameters() if name != "pos_embed")


@pytest.mark.parametrize("qk_norm", [False, True])
def test_bf16_autocast_is_close(build_transformer, qk_norm):
    transformer = build_transformer(qk_norm=qk_norm)
    z, t, labels = _inputs(4)
    exact = transformer(z, t, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = transformer(z, t, labels)
    assert ((rounded.float() - exact).norm() / exact.norm()).item() < 0.05


def test_the_whole_network_can_be_cast(build_transformer):
    transformer = build_transformer().double()
    z, t, labels = _inputs()
    exact = transformer(z.double(), t.double(), labels)
    assert exact.dtype == torch.float64
    assert torch.allclose(exact.float(), build_transformer()(z, t, labels), rtol=1e-4, atol=1e-4)


def test_one_images_output_does_not_depend_on_the_others(build_transformer):
    transformer = build_transformer()
    z, t, labels = _inputs(4)
    alone = torch.cat([transformer(z[i : i + 1], t[i : i + 1], labels[i : i + 1]) for i in range(4)])
    assert torch.allclose(alone, transformer(z, t, labels), rtol=1e-4, atol=1e-5)


def test_sizes_that_do_not_divide_are_refused(build_transformer):
    with pytest.raises(UserError, match="4 x 6 cells are no whole number of patches of 4"):
        build_transformer(patch_size=4)
    with pytest.raises(UserError, match="hidden_size 24 is not divisible"):
        build_transformer(num_heads=5)
    z, t, labels = _inputs()
    with pytest.raises(ValueError, match="there is no block 4 among 3"):
        build_transformer()(z, t, labels, 4)
    with pytest.raises(TypeCheckError):
        build_transformer()(z, t, labels.float())


def test_a_config_comes_back_from_json(build_transformer):
    config = build_transformer(qk_norm=True, teacher_channels=7).config
    assert to_record(TransformerConfig, to_plain(config)) == config


def test_attention_is_counted_on_the_meta_device(build_transformer):
    config = build_transformer().config
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        Transformer(config)(torch.zeros(1, 3, 4, 6), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    assert counter.get_total_flops() > 2 * 3 * 12 * 24**2 * 6


COMPILED = """
import torch
from eqvae.generators.protocol import LatentSpecification
from eqvae.generators.transformer import Transformer, TransformerConfig

torch.set_num_threads(1)
config = TransformerConfig(
    latents=LatentSpecification(channels=3, height=4, width=6, num_classes=5),
    depth=2, hidden_size=24, num_heads=3, patch_size=2, out_channels=3, teacher_channels=5, qk_norm=True,
)
torch.manual_seed(0)
transformer = Transformer(config)
for parameter in transformer.parameters():
    if parameter.requires_grad:
        torch.nn.init.normal_(parameter, std=0.2)
z, t, labels = torch.randn(2, 3, 4, 6), torch.rand(2), torch.tensor([0, 5])
names, values, gradients = list(transformer.state_dict()), [], []
for is_compiled in (False, True):
    if is_compiled:
        transformer.compile(fullgraph=True)
    transformer.zero_grad()
    answer = transformer(z, t, labels, 1)
    values.append(torch.cat([answer.output.flatten(), answer.projected.flatten()]))
    values[-1].square().sum().backward()
    gradients.append(torch.cat([p.grad.flatten() for p in transformer.parameters() if p.grad is not None]))
assert (values[1] - values[0]).norm() < 1e-4 * values[0].norm()
assert (gradients[1] - gradients[0]).norm() < 1e-4 * gradients[0].norm()
assert list(transformer.state_dict()) == names
"""


@pytest.mark.slow
def test_the_compiled_transformer_is_the_same():
    # In a process of its own: compilers leave warnings and types' hooks are not for them.
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("grid", [(2, 6), (6, 2), (8, 8)])
def test_another_shape_is_that_of_a_transformer_built_for_it(grid):
    specification = LatentSpecification(channels=4, height=8, width=8, num_classes=3)
    settings = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 2, "out_channels": 4}
    square = TransformerConfig(latents=specification, **settings).build(generator=torch.Generator().manual_seed(0))
    for parameter in square.parameters():
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    shape = (2 * grid[0], 2 * grid[1])
    other = TransformerConfig(latents=specification.resized(*shape), **settings).build()
    state = square.state_dict()
    positions = state["pos_embed"] if grid == (4, 4) else other.pos_embed
    other.load_state_dict(state | {"pos_embed": positions})
    z, t = torch.randn(3, 4, *shape), torch.rand(3)
    labels = torch.tensor([0, 1, 3])
    torch.testing.assert_close(square(z, t, labels), other(z, t, labels), rtol=0, atol=0)
