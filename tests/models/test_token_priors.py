"""Priors over grids of codes that price every code given those before it: a table of kinds x laws."""

# Attributes of Modules have no types.
# mypy: disable-error-code="arg-type, attr-defined, index, operator, union-attr"

import copy
import math
import warnings
from typing import Any

import pyro
import pytest
import scipy.stats
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pvae.component import Shape
from pvae.distributions.codes import conditional_logits
from pvae.errors import DeclarationError
from pvae.graph.site import Link, Site, Space, one_hot
from pvae.models.priors.autoregressive import DRAW_ROWS, Autoregressive, TokenModule, TransformerPrior
from pvae.models.priors.base import Prior
from pvae.models.priors.pixelcnn import PixelCNNPrior, ResizedMap
from tests.laws import require_gradients, shake

KINDS: dict[str, dict[str, Any]] = {
    "pixelcnn": {"channels": 16, "layers": 2, "kernel": 3},
    "transformer": {"width": 16, "layers": 2, "heads": 2},
}
PARENTS: dict[str, dict[str, Shape]] = {
    "none": {},
    "vector": {"label": (4,)},
    "sequence": {"words": (5, 3)},
    "grid": {"top": (3, 4, 2)},
    "all": {"label": (4,), "words": (5, 3), "top": (3, 4, 2)},
}
GRIDS: dict[Shape, int] = {(2, 3): 3, (4,): 3, (3, 1): 3, (): 5}
"""Tiny grids, and K."""

every_kind = pytest.mark.parametrize("kind", KINDS)
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
every_parent = pytest.mark.parametrize("parents", PARENTS)


def built(kind: str, grid: Shape, codes: int, parents: str = "none", moved: float = 0.3, **fields: Any) -> TokenModule:
    """A module off its start, so that every code and parent matters."""
    prior = Prior.members[kind].model_validate({**KINDS[kind], **fields})
    given = PARENTS[parents]
    site = Site("z", Space.codes(codes, grid), given=tuple(given))
    module = prior.build(site, given, Link())
    shake(module, moved)
    return module.eval()


def parents_of(module: TokenModule, *lead: int) -> dict[str, Tensor]:
    return {name: torch.randn(*lead, *shape) for name, shape in module.parents.items()}


def table_of(p: Autoregressive) -> tuple[Tensor, Tensor]:
    """All joint states `(S, *grid)` and their log-probabilities `(S, *batch_shape)`, in double precision."""
    states = p.enumerate_support(expand=False)
    with torch.no_grad():
        return states.flatten(1, len(p.batch_shape)) if p.batch_shape else states, p.log_prob(states).double()


# ---------------------------------------------------------------------- density


@every_kind
@every_grid
@every_parent
def test_probabilities_of_all_states_sum_to_one(kind, grid, parents):
    module = built(kind, grid, GRIDS[grid], parents)
    p = module(parents_of(module, 2))
    assert p.batch_shape == ((2,) if parents != "none" else ())
    states, log_p = table_of(p)
    assert len(states.flatten(1).unique(dim=0) if grid else states.unique()) == GRIDS[grid] ** math.prod(grid)
    total = log_p.exp().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)
    assert float(log_p.std(0).min()) > 0.1  # not even


@every_kind
@every_parent
def test_a_code_is_priced_by_all_before_it_and_none_after(kind, parents):
    # kernel 3: five layers reach four columns and four rows.
    module = built(kind, (5, 5), 3, parents, **({"layers": 5} if kind == "pixelcnn" else {})).double()
    p = module({name: value.double() for name, value in parents_of(module).items()})
    relaxed = torch.randn(5, 5, 3, dtype=torch.float64).log_softmax(-1)
    jacobian = torch.autograd.functional.jacobian(p.conditional_logits, relaxed).reshape(25, 3, 25, 3)
    reads = jacobian.abs().sum((1, 3)) != 0
    assert torch.equal(reads, torch.ones(25, 25, dtype=torch.bool).tril(-1))


def test_one_gated_layer_reads_its_window_and_nothing_else():
    # Kernel 5 at row 4, column 3 of a 6 x 6 grid: three rows above (columns 1 .. 5), three columns before.
    module = built("pixelcnn", (6, 6), 2, layers=1, kernel=5).double()
    relaxed = torch.randn(6, 6, 2, dtype=torch.float64).log_softmax(-1)
    jacobian = torch.autograd.functional.jacobian(lambda v: module({}).conditional_logits(v)[4, 3], relaxed)
    want = torch.zeros(6, 6, dtype=torch.bool)
    want[1:4, 1:6] = True
    want[4, 0:3] = True
    assert torch.equal(jacobian.abs().sum((0, 3)) != 0, want)


@every_kind
def test_an_exact_one_hot_is_its_index(kind):
    module = built(kind, (3, 4), 5, "all")
    p = module(parents_of(module, 6))
    index = torch.randint(5, (6, 3, 4))
    want = p.conditional_logits(index)
    assert want.shape == (6, 3, 4, 5)
    for nothing in (-1e30, -torch.inf):
        relaxed = torch.where(one_hot(index, 5, want) > 0, 0.0, nothing).requires_grad_()
        torch.testing.assert_close(p.conditional_logits(relaxed), want, rtol=0, atol=1e-5)
        p.conditional_logits(relaxed)[..., 0].sum().backward(retain_graph=True)
        assert relaxed.grad.isfinite().all()
        assert float(relaxed.grad.abs().sum()) > 0
    picked = want.gather(-1, index[..., None]).sum((1, 2, 3))
    torch.testing.assert_close(p.log_prob(index), picked)
    torch.testing.assert_close(conditional_logits(p.expand((2, 6)), index), want.expand(2, 6, 3, 4, 5))


@every_kind
@every_grid
def test_leading_dimensions_broadcast(kind, grid):
    module = built(kind, grid, GRIDS[grid], "all")
    given = parents_of(module, 3)
    value = torch.randint(GRIDS[grid], (2, 3, *grid))
    alone = [module({name: v[i] for name, v in given.items()}) for i in range(3)]
    one_by_one = torch.stack([torch.stack([p.log_prob(value[s, i]) for i, p in enumerate(alone)]) for s in range(2)])
    p = module(given)
    assert (p.batch_shape, p.event_shape) == ((3,), grid)
    torch.testing.assert_close(p.log_prob(value), one_by_one)
    torch.testing.assert_close(p.expand((2, 3)).log_prob(value), one_by_one)
    torch.testing.assert_close(p.log_prob(value[:, :1])[:, 0], alone[0].log_prob(value[:, 0]))
    particles = {name: v.expand(2, *v.shape) if name == "top" else v for name, v in given.items()}
    assert module(particles).batch_shape == (2, 3)  # parents of different leading dimensions
    torch.testing.assert_close(module(particles).log_prob(value), one_by_one)
    torch.testing.assert_close(module(particles).log_prob(value[0]), one_by_one[:1].expand(2, 3))
    single = module(given).log_prob(value[0, 0])
    torch.testing.assert_close(single, module(given).log_prob(value[0, 0].expand(3, *grid)))
    assert single.shape == (3,)


@every_kind
def test_without_parents_there_is_no_batch(kind):
    p = built(kind, (2, 3), 3)({"unasked": torch.randn(7, 2)})
    assert p.batch_shape == ()
    value = torch.randint(3, (2, 3))
    assert p.log_prob(value).shape == ()
    assert p.expand(()) is p
    wide = p.expand((4,))
    assert wide.log_prob(value).shape == (4,)
    assert wide.sample().shape == (4, 2, 3)
    assert wide.sample((5,)).shape == (5, 4, 2, 3)
    assert wide.sample((0,)).shape == (0, 4, 2, 3)
    assert wide.enumerate_support().shape == (729, 4, 2, 3)
    assert wide.enumerate_support(expand=False).shape == (729, 1, 2, 3)
    assert (wide.has_enumerate_support, wide.has_rsample, p.support.event_dim) == (True, False, 2)
    assert bool(p.support.check(value))
    assert not bool(p.support.check(value.new_full((2, 3), 3)))
    large = built(kind, (3, 3), 3)({})
    assert not large.has_enumerate_support
    with pytest.raises(NotImplementedError, match=r"3\^9 joint states are more than 4096"):
        large.enumerate_support()


@every_kind
def test_low_precision_of_the_network_leaves_a_density(kind):
    module = built(kind, (2, 3), 3, "all").bfloat16()
    states, log_p = table_of(module(parents_of(module)))
    assert module(parents_of(module)).log_prob(states).dtype == torch.float32
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-5)
    assert module.double()(parents_of(module)).log_prob(states).dtype == torch.float64


# ---------------------------------------------------------------------- draws


@pytest.mark.fast(
    "all-(3, 1)-pixelcnn",
    "none-(2, 3)-transformer",
    "all-(4,)-pixelcnn",
    "all-()-transformer",
    "none-(4,)-pixelcnn",
    "none-(3, 1)-transformer",
    "all-()-pixelcnn",
)
@every_kind
@every_grid
@pytest.mark.parametrize("parents", ["none", "all"])
def test_what_is_sampled_is_what_is_scored(kind, grid, parents):
    # Chi-square of 20 000 draws against all states, those expected less than five times taken as one; and the mean of
    # log p against minus the entropy (4 standard errors). One new seed in 900 fails for a case.
    module = built(kind, grid, GRIDS[grid], parents, moved=0.15)
    given = {name: torch.stack([torch.randn_like(v), v]) for name, v in parents_of(module).items()}
    p = module(given).expand((2,))
    states, log_p = table_of(p)
    log_p = log_p.expand(-1, 2)[:, 1]
    draws = p.sample((20_000,))[:, 1]
    assert draws.dtype == torch.int64
    assert 20_000 > 10 * DRAW_ROWS  # several blocks
    with torch.no_grad():
        scored = p.log_prob(draws[:, None])[:, 1]
    entropy = -float((log_p.exp() * log_p).sum())
    assert abs(float(scored.double().mean()) + entropy) < 4 * float(scored.std()) / 20_000**0.5
    codes, places = GRIDS[grid], max(1, math.prod(grid))
    powers = codes ** torch.arange(places - 1, -1, -1)
    found = torch.bincount((draws.reshape(-1, places) * powers).sum(1), minlength=len(states)).double()
    expected = 20_000 * log_p.exp()
    often = expected >= 5
    found, expected = (torch.cat([t[often], t[~often].sum().reshape(1)]) for t in (found, expected))
    keep = expected > 0
    statistic = float(((found - expected) ** 2 / expected)[keep].sum())
    assert scipy.stats.chi2.sf(statistic, int(keep.sum()) - 1) > 1e-3


@every_kind
@pytest.mark.parametrize("grid", [*GRIDS, (3, 4)], ids=str)
@every_parent
def test_drawing_step_by_step_sees_the_logits_of_one_pass(kind, grid, parents):
    module = built(kind, grid, 5, parents)
    p = module(parents_of(module, 6)).expand((6,))
    value = torch.randint(5, (6, *grid))
    seen: list[Tensor] = []

    def follow(logits: Tensor) -> Tensor:
        seen.append(logits.log_softmax(-1))
        return value.reshape(6, -1)[:, len(seen) - 1]

    with torch.no_grad():
        drawn = module.draw(6, p._context(torch.Size((6,))), follow)
        want = p.conditional_logits(value).reshape(6, -1, 5)
    assert torch.equal(drawn, value.reshape(6, -1))
    torch.testing.assert_close(torch.stack(seen, 1), want, rtol=0, atol=1e-5)


@every_kind
def test_same_seed_same_draws_and_nothing_moves(kind):
    module = built(kind, (3, 4), 5, "all")
    p = module(parents_of(module, 2))
    before = copy.deepcopy(module.state_dict())
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(p.sample((9,)))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not draws[0].requires_grad
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


# ---------------------------------------------------------------------- modules


@every_kind
@every_grid
@every_parent
def test_gradient_reaches_every_parameter(kind, grid, parents):
    module = built(kind, grid, GRIDS[grid], parents)
    module(parents_of(module, 8)).log_prob(torch.randint(GRIDS[grid], (8, *grid))).sum().backward()
    require_gradients(module)


@every_kind
def test_gradient_reaches_the_parents_and_each_matters(kind):
    module = built(kind, (3, 4), 5, "all")
    given = {name: value.requires_grad_() for name, value in parents_of(module, 2).items()}
    value = torch.randint(5, (2, 3, 4))
    score = module(given).log_prob(value)
    score.sum().backward()
    for name, parent in given.items():
        assert (parent.grad.flatten(1).abs().sum(1) > 0).all()
        other = module({**given, name: torch.randn_like(parent)}).log_prob(value)
        assert float((other - score).detach().abs().min()) > 1e-3


def test_both_stacks_of_every_layer_hear_the_parents():
    module = built("pixelcnn", (3, 4), 5, "all")
    module(parents_of(module, 2)).log_prob(torch.randint(5, (2, 3, 4))).sum().backward()
    for layer in module.layers:
        assert layer.condition.weight.shape[0] == 4 * 16
        assert (layer.condition.weight.grad.flatten(1).abs().sum(1) > 0).all()


@every_kind
def test_copies_are_independent_and_states_round_trip(kind):
    module = built(kind, (3, 4), 5, "all")
    given, value = parents_of(module, 2), torch.randint(5, (2, 3, 4))
    module(given).log_prob(value).sum().backward()
    before = module(given).log_prob(value)
    copied = copy.deepcopy(module)
    shake(module, 0.5)
    assert torch.equal(copied(given).log_prob(value), before)
    assert not torch.allclose(module(given).log_prob(value), before)
    again = built(kind, (3, 4), 5, "all")
    again.load_state_dict(copied.state_dict())
    assert torch.equal(again(given).log_prob(value), before)


@every_kind
def test_features_are_dropped_in_training_alone(kind):
    module, value = built(kind, (3, 4), 5, dropout=0.5), torch.randint(5, (2, 3, 4))
    assert torch.equal(module({}).log_prob(value), module({}).log_prob(value))
    module.train()
    assert not torch.equal(module({}).log_prob(value), module({}).log_prob(value))
    whole = built(kind, (3, 4), 5)
    before = whole({}).log_prob(value)
    assert torch.equal(whole.train()({}).log_prob(value), before)


class Score(nn.Module):
    """Mean log p of codes given parents, for export."""

    def __init__(self, module: TokenModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, value: Tensor, given: dict[str, Tensor]) -> Tensor:
        """Nats."""
        return self.module(given).log_prob(value).mean()


@pytest.mark.fast("transformer")
@every_kind
def test_an_exported_and_compiled_score_is_the_eager_one(kind):
    score = Score(built(kind, (2, 3), 5, "all", layers=1))
    inputs = torch.randint(5, (4, 2, 3)), parents_of(score.module, 4)
    parameters = list(score.parameters())
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch._prims_common.check` is deprecated", category=FutureWarning)
        exported = torch.export.export(score, inputs, strict=False).module()
        compiled = torch.compile(exported, fullgraph=True)
        fresh = torch.randint(5, (4, 2, 3)), parents_of(score.module, 4)
        want = score(*fresh)
        gradients = torch.autograd.grad(want, parameters)
        for fast in (exported, compiled):
            value = fast(*fresh)
            torch.testing.assert_close(value, want)
            held = dict(fast.named_parameters())
            assert len(held) == len(parameters)
            found = torch.autograd.grad(value, parameters)
            for a, b in zip(found, gradients, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------- learning


def fitted(module: TokenModule, batch: Any, steps: int, rate: float) -> TokenModule:
    """After so many steps on batches `(codes, parents)`."""
    optimizer = torch.optim.Adam(module.train().parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        value, given = batch()
        loss = -module(given).log_prob(value).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return module.eval()


def chain(first: Tensor, move: Tensor, length: int) -> Tensor:
    """Draws `(n, length)` of Markov chains with start `(n, K)` and transitions `(n, K, K)`."""
    codes = [torch.multinomial(first, 1)]
    rows = torch.arange(len(first))
    for _ in range(length - 1):
        codes.append(torch.multinomial(move[rows, codes[-1][:, 0]], 1))
    return torch.cat(codes, 1)


def chain_log_prob(first: Tensor, move: Tensor, codes: Tensor) -> Tensor:
    """log p of draws `(n, length)` under one chain, nats."""
    return first[codes[:, 0]].log() + move[codes[:, :-1], codes[:, 1:]].log().sum(1)


@pytest.mark.fast("vector-transformer", "grid-pixelcnn")
@every_kind
@pytest.mark.parametrize("parents", ["vector", pytest.param("sequence", marks=pytest.mark.slow), "grid"])
def test_a_conditional_table_is_learned_to_its_entropy(kind, parents):
    # Two labels, each with a Markov chain of its own over a 2 x 2 grid in raster order. What is lost is the KL, summed
    # over all states: no noise but the fit's. Blind to the label it would lose 0.3 nats at least.
    first, move = (2 * torch.randn(2, 3)).softmax(-1), (2 * torch.randn(2, 3, 3)).softmax(-1)
    module = built(kind, (2, 2), 3, parents, moved=0.0)
    ((name, shape),) = module.parents.items()
    shown = torch.randn(2, *shape)

    def batch() -> tuple[Tensor, dict[str, Tensor]]:
        label = torch.randint(2, (256,))
        return chain(first[label], move[label], 4).reshape(-1, 2, 2), {name: shown[label]}

    states, log_q = table_of(fitted(module, batch, 300, 2e-2)({name: shown}))
    log_p = torch.stack([chain_log_prob(first[i], move[i], states.flatten(1)) for i in range(2)], 1).double()
    torch.testing.assert_close(log_p.exp().sum(0), torch.ones(2).double(), rtol=0, atol=1e-5)
    mixed = (log_p.exp().mean(1, keepdim=True).log() * log_p.exp()).sum(0)
    assert float(((log_p.exp() * log_p).sum(0) - mixed).mean()) > 0.3
    lost = (log_p.exp() * (log_p - log_q)).sum(0)
    assert -1e-5 < float(lost.mean()) < 0.02


@every_kind
def test_a_markov_chain_is_learned_to_its_entropy(kind):
    # The mean of log p - log q on 20 000 fresh draws is the KL; independent codes would lose 1 nat at least.
    first, move = (2 * torch.randn(4)).softmax(-1), (2 * torch.randn(4, 4)).softmax(-1)
    module = built(kind, (8,), 4, moved=0.0)
    fitted(module, lambda: (chain(first.expand(256, 4), move.expand(256, 4, 4), 8), {}), 300, 2e-2)
    fresh = chain(first.expand(20_000, 4), move.expand(20_000, 4, 4), 8)
    true = chain_log_prob(first, move, fresh)
    shares = torch.stack([(fresh == k).double().mean(0) for k in range(4)], 1).clamp(min=1e-9)
    assert float(true.mean() - (shares * shares.log()).sum()) > 1
    with torch.no_grad():
        lost = true - module({}).log_prob(fresh)
    assert -4 * float(lost.std()) / 20_000**0.5 < float(lost.mean()) < 0.02


# ---------------------------------------------------------------------- parts and errors


def test_a_map_is_resized_by_areas():
    x = torch.randn(2, 3, 7, 7)
    torch.testing.assert_close(
        ResizedMap((7, 7), (14, 14))(x), x.repeat_interleave(2, -1).repeat_interleave(2, -2), rtol=0, atol=1e-6
    )
    assert torch.equal(ResizedMap((7, 7), (7, 7))(x), x)
    y = torch.randn(2, 3, 6, 9)
    torch.testing.assert_close(ResizedMap((6, 9), (3, 3))(y), nn.functional.avg_pool2d(y, (2, 3)), rtol=0, atol=1e-6)
    # 2 to 3 cells: the middle one covers half of each.
    assert ResizedMap((1, 2), (1, 3))(torch.tensor([[1.0, 4.0]])).tolist() == [[1.0, 2.5, 4.0]]
    # areas keep the mean, whatever the sizes
    torch.testing.assert_close(ResizedMap((6, 9), (5, 4))(y).mean((2, 3)), y.mean((2, 3)))


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (lambda: PixelCNNPrior(kernel=4), "an odd kernel, which has a middle; got 4"),
        (lambda: TransformerPrior(width=30), "a width that 4 heads share evenly; got 30"),
    ],
)
def test_fields_that_do_not_fit_are_refused(prior, message):
    with pytest.raises(ValidationError, match=message):
        prior()


@every_kind
def test_shapes_that_cannot_be_read_are_refused(kind):
    prior = Prior.members[kind].model_validate(KINDS[kind])
    axes = 3 if kind == "transformer" else 2
    grid = (2,) * (axes + 1)
    with pytest.raises(
        DeclarationError, match=rf"latents.z.prior: expected a grid of at most {axes} axes for {kind}; got \[2, 2"
    ):
        prior.build(Site("z", Space.codes(3, grid)), {}, Link())
    with pytest.raises(DeclarationError, match=r"expected parents of shape .*; got a of shape \[1, 2, 3, 4\]"):
        prior.build(Site("z", Space.codes(3, (2,))), {"a": (1, 2, 3, 4)}, Link())


def test_the_table_is_complete():
    modules = ("pvae.models.priors.pixelcnn", "pvae.models.priors.autoregressive")
    shipped = {kind for kind, m in Prior.members.items() if m.__module__ in modules}
    assert shipped == set(KINDS)
