"""Networks: every kind x shapes, broadcasting, gradients, copies; and the published layout by hand."""

# Attributes of Modules and Pyro programs have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="attr-defined, index, operator, union-attr"

import copy
from dataclasses import dataclass

import pytest
import torch

from pvae.component import Shape
from pvae.errors import DeclarationError
from pvae.nn.conv import Conv, Pointwise, Resize, Resnet
from pvae.nn.network import MLP, GatedMLP, Network, NetworkModule, TableNetwork


@dataclass(frozen=True)
class Row:
    """A member and what it accepts."""

    network: Network
    vectors_only: bool = True
    """Whether it takes declarations without an image."""
    single: bool = False
    """Whether it takes only one input, and makes no features."""


ROWS = {
    "mlp": Row(MLP(hidden=(9, 7))),
    "mlp, one layer": Row(MLP(hidden=(9,), activation="tanh")),
    "mlp, linear": Row(MLP(hidden=())),
    "gated_mlp": Row(GatedMLP(hidden=(9, 7))),
    "gated_mlp, linear": Row(GatedMLP(hidden=())),
    "gated_mlp, he": Row(GatedMLP(hidden=(9, 7), init="he")),
    "table": Row(TableNetwork(), single=True),
    "conv": Row(Conv(channels=(3, 4), dense=11, activation="elu"), vectors_only=False),
    "conv, one level": Row(Conv(channels=(3,), dense=11, activation="elu"), vectors_only=False),
    "conv, three levels": Row(Conv(channels=(3, 4, 5), dense=11, activation="elu"), vectors_only=False),
    "resnet": Row(Resnet(channels=4, blocks=1, activation="elu"), vectors_only=False),
    "resnet, no blocks": Row(Resnet(channels=6, blocks=0, halvings=1, activation="elu"), vectors_only=False),
    "resnet, narrow": Row(Resnet(channels=6, inner=1, halvings=0, activation="tanh"), vectors_only=False),
}

Case = tuple[dict[str, Shape], Shape | None]
VECTORS: dict[str, Case] = {
    "vector to vector": ({"x": (6,)}, (4,)),
    "two vectors to vector": ({"x": (6,), "z": (3,)}, (4,)),
    "vector to features": ({"x": (6,)}, None),
    "vector to a pair of rows": ({"x": (6,)}, (2, 5)),
    "vector to a single row": ({"x": (6,)}, (1, 5)),
}
IMAGES: dict[str, Case] = {
    "28x28 to vector": ({"x": (1, 28, 28)}, (4,)),
    "7x5 to vector": ({"x": (2, 7, 5)}, (4,)),
    "9x12 to features": ({"x": (1, 9, 12)}, None),
    "1x1 to vector": ({"x": (3, 1, 1)}, (4,)),
    "9x12 to a single row": ({"x": (1, 9, 12)}, (1, 5)),
    "vector to 28x28": ({"z": (3,)}, (1, 28, 28)),
    "vector to 7x5": ({"z": (3,)}, (2, 7, 5)),
    "vector to 9x12": ({"z": (3,)}, (2, 9, 12)),
    "two vectors to 1x5": ({"z1": (3,), "z2": (2,)}, (1, 1, 5)),
    "image and vector to vector": ({"x": (2, 9, 12), "z": (3,)}, (4,)),
    "image and vector to image": ({"x": (2, 9, 12), "z": (3,)}, (1, 7, 5)),
    "two images to vector": ({"x": (1, 7, 5), "c": (2, 4, 4)}, (4,)),
    "28x28 to a grid of 8x8": ({"x": (1, 28, 28)}, (5, 8, 8)),
    "a grid of 8x8 to 28x28": ({"c": (5, 8, 8)}, (1, 28, 28)),
    "28x28 to a grid of 7x7": ({"x": (1, 28, 28)}, (5, 7, 7)),
    "a grid of 7x7 to 28x28": ({"c": (5, 7, 7)}, (1, 28, 28)),
    "8x8 to a grid of 4x4": ({"x": (1, 8, 8)}, (5, 4, 4)),
    "a grid of 4x4 to 8x8": ({"c": (5, 4, 4)}, (1, 8, 8)),
    "two grids to 28x28": ({"top": (3, 7, 7), "bottom": (5, 14, 14)}, (1, 28, 28)),
    "image and grid to a grid": ({"x": (1, 28, 28), "top": (3, 7, 7)}, (5, 14, 14)),
    "grid and vector to a grid": ({"c": (3, 7, 7), "z": (2,)}, (5, 7, 7)),
    "a row of codes and a grid to 9x12": ({"c": (3, 5), "d": (2, 4, 4)}, (1, 9, 12)),
}


def build(network: Network, inputs: dict[str, Shape], output: Shape | None, seed: int = 0) -> NetworkModule:
    torch.manual_seed(seed)
    return network.build(inputs, output)


def values(inputs: dict[str, Shape], *lead: int) -> dict[str, torch.Tensor]:
    return {name: torch.randn(*lead, *shape) for name, shape in inputs.items()}


def test_table_is_complete():
    shipped = {kind for kind, member in Network.members.items() if member.__module__.startswith("pvae.")}
    assert {row.network.kind for row in ROWS.values()} == shipped - {
        "bijection"
    }  # its laws: tests/guides/test_flow_vae.py


def output_shape(network: Network, inputs: dict[str, Shape], output: Shape | None) -> None:
    module = build(network, inputs, output)
    for lead in [(), (1,), (5,), (3, 5), (4, 1)]:
        assert module(values(inputs, *lead)).shape == (*lead, *module.output)
    assert module.output == output if output is not None else len(module.output) == 1


def rows_are_computed_one_by_one(network: Network, inputs: dict[str, Shape], output: Shape | None) -> None:
    module, x = build(network, inputs, output), values(inputs, 3, 2)
    together = module(x)
    alone = torch.stack(
        [torch.stack([module({name: v[k, b] for name, v in x.items()}) for b in range(2)]) for k in range(3)]
    )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def leading_dimensions_broadcast(network: Network, inputs: dict[str, Shape], output: Shape | None) -> None:
    module, particles, batch = build(network, inputs, output), 3, 5
    x = values(inputs, batch)
    last = list(inputs)[-1]
    x[last] = torch.randn(particles, batch, *inputs[last])
    wide = {name: v.expand(particles, batch, *inputs[name]) for name, v in x.items()}
    got = module(x)
    assert got.shape == (particles, batch, *module.output)
    torch.testing.assert_close(got, module(wide), rtol=1e-4, atol=1e-5)


def gradient_reaches_every_parameter(network: Network, inputs: dict[str, Shape], output: Shape | None) -> None:
    module = build(network, inputs, output)
    x = {name: v.requires_grad_() for name, v in values(inputs, 16).items()}
    module(x).square().sum().backward()
    reached = {**dict(module.named_parameters()), **x}
    assert [name for name, t in reached.items() if t.grad is None or not t.grad.abs().sum() > 0] == []


def copy_stands_alone(network: Network, inputs: dict[str, Shape], output: Shape | None) -> None:
    module, x = build(network, inputs, output), values(inputs, 4)
    before = module(x)
    other = copy.deepcopy(module)
    torch.testing.assert_close(other(x), before, rtol=0, atol=0)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    torch.testing.assert_close(module(x), before, rtol=0, atol=0)


def state_round_trips(network: Network, inputs: dict[str, Shape], output: Shape | None) -> None:
    one, two, x = build(network, inputs, output), build(network, inputs, output, seed=1), values(inputs, 4)
    two.load_state_dict(one.state_dict())
    torch.testing.assert_close(two(x), one(x), rtol=0, atol=0)


LAWS = (
    output_shape,
    rows_are_computed_one_by_one,
    leading_dimensions_broadcast,
    gradient_reaches_every_parameter,
    copy_stands_alone,
    state_round_trips,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_law(law, row, subtests):
    cases = IMAGES | (VECTORS if row.vectors_only else {})
    for label, (inputs, output) in cases.items():
        if row.single and (len(inputs) > 1 or output is None):
            continue
        with subtests.test(label):
            law(row.network, inputs, output)


# ---------------------------------------------------------------------- values


def test_mlp_without_hidden_layers_is_affine_in_all_inputs():
    module = build(MLP(hidden=()), {"x": (2, 3), "z": (4,)}, (5,)).double()
    x = {"x": torch.randn(7, 2, 3).double(), "z": torch.randn(7, 4).double()}
    joined = torch.cat([x["x"].reshape(7, 6), x["z"]], 1)
    want = joined @ module.head.weight.T + module.head.bias
    torch.testing.assert_close(module(x), want, rtol=0, atol=1e-12)
    assert sum(p.numel() for p in module.parameters()) == 10 * 5 + 5


def test_table_gives_the_row_of_a_code():
    module = build(TableNetwork(), {"c": (4,)}, (2, 3))
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    got = module({"c": torch.eye(4)[[2, 0]]})
    torch.testing.assert_close(got, module.weight[[2, 0]].reshape(2, 2, 3), rtol=0, atol=0)
    assert 0 < module.weight.abs().max() < 1


@pytest.mark.parametrize(
    ("inputs", "output", "found"), [({"a": (3,), "b": (4,)}, (2,), "a, b"), ({"a": (3,)}, None, "a and no output")]
)
def test_table_refuses_several_inputs_and_features(inputs, output, found):
    with pytest.raises(
        DeclarationError, match=rf"network table: expected one input .*; got {found}\. Use kind = 'mlp'"
    ):
        TableNetwork().build(inputs, output)


def test_gate_is_a_product_with_a_sigmoid():
    module = build(GatedMLP(hidden=(3,)), {"x": (2,)}, None).double()
    weight, bias = module.branches[0].both.weight, module.branches[0].both.bias
    x = torch.randn(6, 2).double()
    want = (x @ weight[:3].T + bias[:3]) / (1 + torch.exp(-(x @ weight[3:].T + bias[3:])))
    torch.testing.assert_close(module({"x": x}), want, rtol=0, atol=1e-12)


# By hand: a gated layer a -> b holds 2 (a b + b) numbers, a linear one a b + b.
COUNTS = {
    # 2 (784 300 + 300) + 2 (300 300 + 300) = 471 000 + 180 600
    "encoder 784-300-300": ({"x": (784,)}, None, 651_600),
    # the same and a linear layer 300 -> 80
    "encoder with heads 40 + 40": ({"x": (1, 28, 28)}, (80,), 675_680),
    # 2 (40 300 + 300) + 180 600 + 300 784 + 784 = 24 600 + 180 600 + 235 984
    "decoder 40-300-300-784": ({"z": (40,)}, (784,), 441_184),
    # two levels: 471 000 and 24 600 concatenated, then 2 (600 300 + 300) = 360 600
    "encoder of x and z2": ({"x": (784,), "z2": (40,)}, None, 856_200),
    # 24 600 twice, 360 600, and 235 984
    "decoder of z1 and z2": ({"z1": (40,), "z2": (40,)}, (784,), 645_784),
}


@pytest.mark.parametrize(("inputs", "output", "count"), COUNTS.values(), ids=list(COUNTS))
def test_published_gated_layout(inputs, output, count):
    module = GatedMLP(hidden=(300, 300)).build(inputs, output)
    assert sum(p.numel() for p in module.parameters()) == count


def test_he_initialisation():
    # 470 400 normal weights: the sample variance has a relative error of 0.2 %; 2 % fails once in 1e20.
    module = build(GatedMLP(hidden=(300, 300), init="he"), {"x": (784,)}, (784,))
    first, second = module.branches[0].both, module.trunk[0].both
    for layer, fan_in in ((first, 784), (second, 300), (module.head, 300)):
        assert layer.weight.var().item() == pytest.approx(2 / fan_in, rel=0.02)
        assert layer.weight.abs().max() > 4 * (2 / fan_in) ** 0.5
        assert not layer.bias.any()


def test_default_initialisation_is_torchs():
    # torch draws weights uniformly within 1 / sqrt(fan-in): variance 1 / (3 fan-in); 2 % as above.
    module = build(GatedMLP(hidden=(300,)), {"x": (784,)}, None)
    weight = module.branches[0].both.weight
    assert weight.abs().max() <= 1 / 784**0.5
    assert weight.var().item() == pytest.approx(1 / (3 * 784), rel=0.02)


def test_convolution_sees_where_a_pixel_is():
    module = build(Conv(channels=(4,), dense=11, activation="elu"), {"x": (1, 7, 5)}, (4,))
    x = torch.zeros(1, 7, 5)
    moved = [x.clone() for _ in range(35)]
    for i, image in enumerate(moved):
        image.view(-1)[i] = 1.0
    features = module({"x": torch.stack(moved)})
    assert torch.pdist(features).min() > 0


@pytest.mark.parametrize("network", [Conv(), Resnet()], ids=lambda network: network.kind)
@pytest.mark.parametrize(
    ("inputs", "output"), [({"x": (784,)}, (4,)), ({"z": (3,)}, None), ({"a": (3,), "b": (4, 5)}, (2, 6))]
)
def test_networks_of_images_refuse_vectors_only(network, inputs, output):
    found = ", ".join(rf"{name} \[{', '.join(map(str, shape))}\]" for name, shape in inputs.items())
    wanted = r"an image \(channels, height, width\)" + (" or a grid" if network.kind == "resnet" else "")
    with pytest.raises(DeclarationError, match=rf"network {network.kind}: expected {wanted} .*; got {found}\. Decl"):
        network.build(inputs, output)


# ---------------------------------------------------------------------- residual


@pytest.mark.parametrize("have", [1, 2, 3, 7, 8, 14, 28, 32])
@pytest.mark.parametrize("want", [1, 2, 3, 7, 8, 14, 28, 32])
def test_any_size_is_brought_to_any_other(have, want):
    resize = Resize((2, have, 9), 4, (want, 5), torch.nn.ELU)
    x = torch.randn(3, 2, have, 9).requires_grad_()
    y = resize(x)
    assert y.shape == (3, 4, want, 5)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    assert (found.abs().sum((0, 1)) > 0).all()  # no pixel is left out


@pytest.mark.parametrize("side", [3, 4, 5, 7, 8, 10, 14, 20, 25, 28])
def test_every_code_of_any_grid_is_read_by_a_decoder_and_given_by_an_encoder(side):
    # A grid of 20 that were doubled and cropped to 28 would lose its three outer rings.
    grid = {"c": torch.randn(2, 3, side, side).requires_grad_()}
    image = build(Resnet(channels=4, blocks=0, activation="elu"), {"c": (3, side, side)}, (1, 28, 28))(grid)
    (found,) = torch.autograd.grad(image.square().sum(), grid["c"])
    assert (found.abs().sum((0, 1)) > 0).all()
    x = torch.randn(2, 1, 28, 28).requires_grad_()
    codes = build(Resnet(channels=4, blocks=0, activation="elu"), {"x": (1, 28, 28)}, (3, side, side))({"x": x})
    (found,) = torch.autograd.grad(codes.square().sum(), x)
    assert (found.abs().sum((0, 1)) > 0).all()
    still = build(Resnet(channels=4, blocks=0, activation="elu"), {"x": (1, 28, 28)}, (3, side, side))({"x": 0 * x})
    assert (codes != still).any(0).any(0).all()  # no code sees padding alone


def test_sizes_that_are_no_powers_of_two_apart_are_padded_evenly():
    resize = Resize((1, 28, 28), 4, (8, 8), torch.nn.ELU)
    assert resize.padded == (32, 32)
    x = torch.randn(2, 1, 28, 28)
    want = resize.layers(torch.nn.functional.pad(x, (2, 2, 2, 2)))
    torch.testing.assert_close(resize(x), want, rtol=0, atol=0)
    assert Resize((1, 28, 28), 4, (7, 7), torch.nn.ELU).padded == (28, 28)


WORKING: dict[str, tuple[Case, Shape]] = {
    "the grid of an output": (({"x": (1, 28, 28)}, (5, 8, 8)), (8, 8)),
    "the largest grid of a decoder": (({"top": (3, 7, 7), "bottom": (3, 14, 14)}, (1, 28, 28)), (14, 14)),
    "halved twice without a grid": (({"x": (1, 28, 30)}, (4,)), (7, 8)),
    "halved twice from a vector": (({"z": (4,)}, (1, 28, 30)), (7, 8)),
}


@pytest.mark.parametrize(("case", "size"), WORKING.values(), ids=list(WORKING))
def test_where_residual_blocks_run(case, size):
    module = Resnet(channels=6, blocks=1).build(*case)
    assert module.start == (6, *size)
    seen = []
    module.blocks.register_forward_hook(lambda _m, _i, out: seen.append(out.shape))
    module(values(case[0], 3))
    assert seen == [(3, 6, *size)]
    assert module.width == 6 * size[0] * size[1]
    assert module.features(values(case[0], 3)).shape == (3, module.width)


def test_features_are_laid_out_on_a_grid_of_two_dimensions():
    network = Resnet(channels=6)
    assert network.features_on((7, 5)) == (6, 7, 5)
    assert network.features_on((20,)) is None
    assert MLP().features_on((7, 5)) is None
    assert Conv().features_on((7, 5)) is None


def test_a_residual_encoder_reads_a_code_from_its_own_place():
    # 8 x 8 to 4 x 4 without blocks: a corner pixel reaches the corner code, and never the one opposite.
    module = build(Resnet(channels=4, blocks=0), {"x": (1, 8, 8)}, (3, 4, 4))
    x = torch.randn(1, 1, 8, 8).requires_grad_()
    (found,) = torch.autograd.grad(module({"x": x})[0, :, 0, 0].sum(), x)
    assert found[0, 0, 0, 0].abs() > 0
    assert not found[0, 0, 4:, 4:].any()


def test_one_map_at_every_position():
    torch.manual_seed(0)
    module = Pointwise({"x": (3, 4, 5), "z": (2,)}, (6, 4, 5)).double()
    x = {"x": torch.randn(7, 3, 4, 5).double(), "z": torch.randn(2, 7, 2).double()}
    weight, bias = module.maps["x"].weight[:, :, 0, 0], module.maps["x"].bias
    want = torch.einsum("oc,nchw->nohw", weight, x["x"]) + bias[:, None, None]
    want = want + (x["z"] @ module.maps["z"].weight.T + module.maps["z"].bias)[..., None, None]
    torch.testing.assert_close(module(x), want, rtol=1e-12, atol=1e-12)
    assert module(x).shape == (2, 7, 6, 4, 5)
