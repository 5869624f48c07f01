"""The aggregated posterior of every family against its definition; leave-one-out, bounds, streaming, grids, guides."""

# Attributes of Modules and Pyro programs have no types.
# mypy: disable-error-code="arg-type, attr-defined"

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import Tensor

from pvae.analysis.aggregate.aggregated import AggregatedPosterior, all_pairs, grid_error, marginal_log_prob
from pvae.analysis.aggregate.components import Kept, Reread, members_of
from pvae.analysis.aggregate.entry import quiet
from pvae.distributions.exponential import FullRankNormals, Members, Normals
from pvae.distributions.exponential_codes import Codes, Product, product
from pvae.errors import DataError, DeclarationError
from pvae.pair.pair import Pair
from tests.decompose.pairs import leave_one_out

# ---------------------------------------------------------------------- diagonal normals


def mixture_log_prob(loc: Tensor, scale: Tensor, z: Tensor) -> Tensor:
    """The definition, in torch and float64: logsumexp over explicit differences."""
    components = [
        (-0.5 * ((point - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)).sum(1) for point in z
    ]
    return torch.stack(components).logsumexp(1) - math.log(len(loc))


@pytest.mark.parametrize("n", [1, 7, 2048, 2049, 5000])
@pytest.mark.parametrize("d", [1, 3, 20])
@pytest.mark.parametrize("smallest", [0.0, -2.0, -5.0])
def test_aggregated_posterior_is_the_mixture(n, d, smallest):
    loc = torch.randn(n, d).double()
    scale = (torch.rand(n, d).double() * smallest).exp()
    z = torch.cat([loc[:20] + scale[:20] * torch.randn(len(loc[:20]), d).double(), 2 * torch.randn(20, d).double()])
    got, want = AggregatedPosterior(Normals(loc, scale)).log_prob(z), mixture_log_prob(loc, scale, z)
    # Ten digits of the numbers in play: z^2 / (2 s^2) reaches d e^10, of which float64 keeps 1e-16.
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_aggregated_posterior_over_many_rows_and_shapes():
    loc, scale = torch.randn(50, 2).double(), torch.rand(50, 2).double() + 0.1
    q, z = AggregatedPosterior(Normals(loc, scale)), torch.randn(700, 2, 2).double()
    assert (len(q), q.batch_shape, q.event_shape) == (50, (), (2,))
    assert q.log_prob(z).shape == (700, 2)
    torch.testing.assert_close(q.log_prob(z).reshape(-1)[-3:], mixture_log_prob(loc, scale, z.reshape(-1, 2)[-3:]))
    torch.testing.assert_close(q.expand(torch.Size((4,))).log_prob(z[:4, 0]), q.log_prob(z[:4, 0]))


def test_aggregated_posterior_samples_what_it_scores():
    # Kolmogorov-Smirnov against the integral of the scored density; one new seed in 1000 fails.
    loc, scale = torch.tensor([[-3.0], [0.0], [0.5]]), torch.tensor([[0.5], [1.0], [0.05]])
    q = AggregatedPosterior(Normals(loc, scale))
    grid = torch.linspace(-9, 7, 200_001).double()
    density = q.log_prob(grid[:, None]).exp()
    integral = torch.cumulative_trapezoid(density, grid)
    assert integral[-1].item() == pytest.approx(1, abs=1e-8)
    draws = q.sample((20_000,))
    assert draws.shape == (20_000, 1)
    uniform = np.interp(draws[:, 0].numpy(), grid[1:].numpy(), integral.numpy())
    assert scipy.stats.kstest(uniform, "uniform").pvalue > 1e-3


def test_aggregated_posterior_refuses_no_components():
    with pytest.raises(DeclarationError, match="expected at least one component; got none"):
        AggregatedPosterior(Normals(torch.zeros(0, 2), torch.ones(0, 2)))


# ---------------------------------------------------------------------- every family


def lower(n: int, d: int) -> Tensor:
    factor = torch.randn(n, d, d).double().tril(-1) * 0.4
    return factor + torch.diag_embed(torch.rand(n, d).double() + 0.2)


def one_hots(n: int, positions: int, states: int) -> Tensor:
    index = torch.randint(states, (n, positions))
    return torch.nn.functional.one_hot(index, states).double().flatten(1)


@dataclass(frozen=True)
class Row:
    """Members, values to score, and the density by definition: `(m, n)` of (members, values)."""

    make: Callable[[int], Members]
    values: Callable[[int], Tensor]
    dense: Callable[[Members, Tensor], Tensor]


def dense_normal(q: Normals, z: Tensor) -> Tensor:
    return torch.stack([torch.distributions.Normal(q.loc, q.scale).log_prob(point).sum(1) for point in z])


def dense_full(q: FullRankNormals, z: Tensor) -> Tensor:
    columns = [
        scipy.stats.multivariate_normal(m.numpy(), (t @ t.T).numpy()).logpdf(z.numpy())
        for m, t in zip(q.loc, q.scale_tril, strict=True)
    ]
    return torch.tensor(np.stack(columns, 1))


def dense_codes(q: Codes, z: Tensor) -> Tensor:
    index = z.long() if q.form == "index" else z.reshape(len(z), q.positions, q.states).argmax(-1)
    probs = q.logits.exp().numpy()
    return torch.tensor(
        [[sum(math.log(probs[i, p, c]) for p, c in enumerate(row)) for i in range(len(q))] for row in index.tolist()],
        dtype=torch.float64,
    )


def dense_product(q: Product, z: Tensor) -> Tensor:
    pieces = z.split([part.dim for part in q.parts], 1)
    return dense_full(q.parts[0], pieces[0]) + dense_codes(q.parts[1], pieces[1])


FAMILIES: dict[str, Row] = {
    "normal": Row(
        lambda n: Normals(torch.randn(n, 3).double(), torch.rand(n, 3).double() + 0.1),
        lambda m: torch.randn(m, 3).double(),
        dense_normal,
    ),
    "normal, far from zero": Row(  # z^2 / (2 s^2) is 1e12: taken from the origin it would keep four digits
        lambda n: Normals(1e5 + torch.randn(n, 3).double(), torch.rand(n, 3).double() + 0.1),
        lambda m: 1e5 + torch.randn(m, 3).double(),
        dense_normal,
    ),
    "full-rank normal": Row(
        lambda n: FullRankNormals(torch.randn(n, 3).double(), lower(n, 3)),
        lambda m: torch.randn(m, 3).double(),
        dense_full,
    ),
    "grid of indices": Row(
        lambda n: Codes(torch.randn(n, 4, 5).double()), lambda m: torch.randint(5, (m, 4)).double(), dense_codes
    ),
    "grid of one-hots": Row(
        lambda n: Codes(torch.randn(n, 4, 5).double(), "one_hot"), lambda m: one_hots(m, 4, 5), dense_codes
    ),
    "full-rank normal and code": Row(
        lambda n: Product((FAMILIES["full-rank normal"].make(n), Codes(torch.randn(n, 1, 3).double()))),
        lambda m: torch.cat([torch.randn(m, 3).double(), torch.randint(3, (m, 1)).double()], 1),
        dense_product,
    ),
}
every_family = pytest.mark.parametrize("row", FAMILIES.values(), ids=list(FAMILIES))


@every_family
@pytest.mark.parametrize("n", [2, 40, 700])
def test_density_is_the_definition(row, n):
    q, z = row.make(n), row.values(30)
    dense = row.dense(q, z)
    mixture = AggregatedPosterior(q)
    torch.testing.assert_close(mixture.log_prob(z), dense.logsumexp(1) - math.log(n), rtol=1e-9, atol=1e-9)
    index = torch.arange(30) % n
    without = dense.clone()
    without[torch.arange(30), index] = -math.inf
    want = without.logsumexp(1) - math.log(n - 1)
    torch.testing.assert_close(leave_one_out(mixture, z, index), want, rtol=1e-9, atol=1e-9)


@every_family
def test_a_small_budget_gives_the_same(row):
    q, z = row.make(700), row.values(30)
    want = AggregatedPosterior(q).log_prob(z)
    tight = AggregatedPosterior(q, memory=64 * 8 * q.features * 16)
    assert isinstance(tight.components, Kept)
    assert tight.components.columns == 16 * 8
    torch.testing.assert_close(tight.log_prob(z), want, rtol=1e-12, atol=1e-12)


@every_family
def test_draws_have_the_mean_of_what_is_scored(row):
    # log q_agg at draws against the entropy by the definition on other draws; 4 standard errors, one in 8000 each.
    q = row.make(5)
    mixture = AggregatedPosterior(q)
    one = mixture.log_prob(mixture.sample((4000,)))
    again = torch.cat([q.rows(torch.full((800,), i)).sample() for i in range(5)])
    other = row.dense(q, again).logsumexp(1) - math.log(5)
    assert abs(float(one.mean() - other.mean())) < 4 * float((one.var() / 4000 + other.var() / 4000).sqrt())


@every_family
def test_rows_and_parts_in_a_row(row):
    q = row.make(9)
    again = q.rows(slice(0, 4)).joined([q.rows(torch.tensor([4, 5])), q.rows(slice(6, 9))])
    z = row.values(5)
    torch.testing.assert_close(AggregatedPosterior(again).log_prob(z), AggregatedPosterior(q).log_prob(z))
    assert q.double().dim == q.dim
    assert q.numbers > 0


def test_impossible_codes_are_minus_infinity_not_nan():
    certain = Codes(torch.tensor([[[0.0, -math.inf]], [[0.0, -math.inf]]]).double())
    mixture = AggregatedPosterior(certain)
    got = mixture.log_prob(torch.tensor([[0.0], [1.0]]))
    assert got[0] == 0
    assert got[1] < -1e29
    assert torch.equal(certain.sample(), torch.zeros(2, 1).double())


def test_gumbel_draws_follow_the_probabilities():
    # Chi-square over 10 codes; one new seed in 1000 fails.
    q = Codes(torch.randn(1, 1, 10).double()).rows(torch.zeros(50_000, dtype=torch.long))
    counts = q.sample().long().flatten().bincount(minlength=10).numpy()
    assert scipy.stats.chisquare(counts, 50_000 * q.logits[0, 0].exp().numpy()).pvalue > 1e-3


def test_products_of_one_kind_are_one():
    normals = [Normals(torch.randn(4, d), torch.rand(4, d) + 0.1) for d in (2, 3)]
    assert isinstance(product(normals), Normals)
    assert product(normals).dim == 5
    assert product([Codes(torch.randn(4, 1, 3)), Codes(torch.randn(4, 2, 3))]).dim == 3
    assert isinstance(product([Codes(torch.randn(4, 1, 3)), Codes(torch.randn(4, 2, 2))]), Product)
    assert product([normals[0]]) is not None


# ---------------------------------------------------------------------- leave-one-out and a subset of components


def test_leaving_out_the_own_component_keeps_its_digits():
    # The own component holds all but e^-200 of the mixture: a difference of logarithms would lose the rest.
    q = Normals(torch.tensor([[0.0], [20.0], [40.0]]).double(), torch.ones(3, 1).double())
    want = math.log(0.5) - 200 - 0.5 * math.log(2 * math.pi) + math.log1p(math.exp(-600))
    got = leave_one_out(AggregatedPosterior(q), torch.zeros(1, 1).double(), torch.tensor([0]))
    assert float(got) == pytest.approx(want, abs=1e-12)


def test_one_component_tells_nothing():
    q = AggregatedPosterior(Normals(torch.zeros(1, 2), torch.ones(1, 2)))
    found = q.information(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([-1.0]).double())
    assert (float(found.lower), float(found.upper), float(found.leave_one_out)) == (0, 0, math.inf)


def test_bounds_from_a_subset_hold_the_exact_information():
    # Means over 300 random subsets; each bound may miss by chance once in 30 000 (4 standard errors).
    n, chosen = 200, 20
    q = Normals(torch.randn(n, 2).double(), torch.full((n, 2), 0.4).double())
    z = q.sample()
    rows, own = torch.arange(n), q.log_prob(z)
    whole = AggregatedPosterior(q).information(z, rows, own)
    assert torch.equal(whole.lower, whole.upper)
    exact = float(whole.upper.mean())
    found = []
    for _ in range(300):
        index = torch.randperm(n)[:chosen].sort().values
        found.append(AggregatedPosterior(q.rows(index), n, index).information(z, rows, own))
    for side, sign in (("lower", 1), ("upper", -1)):
        means = np.array([float(getattr(f, side).mean()) for f in found])
        assert sign * (exact - means.mean()) > -4 * means.std() / 300**0.5
        assert sign * (exact - means.mean()) < 0.5
    assert max(float(f.upper.max()) for f in found) <= math.log(n) + 1e-12
    assert max(float(f.lower.max()) for f in found) <= math.log(chosen + 1) + 1e-12
    assert np.mean([float((f.upper - f.lower).mean()) for f in found]) > 0
    population = float(whole.leave_one_out.mean())
    assert population > exact


def test_leave_one_out_and_plug_in_hold_the_information_of_the_law():
    # z = x + noise, x normal: I = d/2 log(1 + 1/s^2) exactly. Means over 40 data sets of 60 rows, 4 standard errors.
    s, law = 0.5, math.log(1 + 1 / 0.25)
    plug_in, left_out = [], []
    for _ in range(40):
        q = Normals(torch.randn(60, 2).double(), torch.full((60, 2), s).double())
        z = q.sample()
        found = AggregatedPosterior(q).information(z, torch.arange(60), q.log_prob(z))
        plug_in.append(float(found.upper.mean()))
        left_out.append(float(found.leave_one_out.mean()))
    assert np.mean(plug_in) < law + 4 * np.std(plug_in) / 40**0.5
    assert np.mean(left_out) > law - 4 * np.std(left_out) / 40**0.5
    assert np.mean(left_out) - np.mean(plug_in) > 0.1


# ---------------------------------------------------------------------- coordinates on a grid


@pytest.mark.parametrize("smallest", [0.0, -3.0, -7.0])
def test_coordinates_on_a_grid_are_the_sum_over_all_pairs(smallest):
    loc, scale = torch.randn(2000, 3).double(), (torch.rand(2000, 3).double() * smallest).exp()
    z = loc + scale * torch.randn_like(loc)
    got = marginal_log_prob(loc, scale, z)
    want = torch.stack([all_pairs(loc[:, d], scale[:, d], z[:, d]) for d in range(3)], 1)
    assert float((got - want).abs().max()) < 2e-3  # where a single component stands alone, at five deviations
    assert abs(float((got - want).mean())) < 2e-6
    assert grid_error(loc, scale, z, got) <= float((got - want).abs().max())


def test_coordinates_with_scales_too_fine_for_a_grid_are_summed_over_all_pairs():
    loc, scale = torch.tensor([[0.0], [1e4]]).double(), torch.full((2, 1), 1e-6).double()
    z = torch.tensor([[1e-6], [1e4]]).double()
    torch.testing.assert_close(marginal_log_prob(loc, scale, z)[:, 0], all_pairs(loc[:, 0], scale[:, 0], z[:, 0]))


def test_all_pairs_is_scipy():
    loc, scale, z = torch.randn(50).double(), torch.rand(50).double() + 0.1, torch.randn(7).double()
    want = np.log(scipy.stats.norm(loc.numpy(), scale.numpy()).pdf(z.numpy()[:, None]).mean(1))
    np.testing.assert_allclose(all_pairs(loc, scale, z).numpy(), want, rtol=1e-12)


# ---------------------------------------------------------------------- built from a guide


def pair_of(posterior: Callable[[Tensor], dist.TorchDistribution], prior: dist.TorchDistribution) -> Pair:
    """A pair whose guide has the posterior given as a function of x."""

    def model(x):
        gain = pyro.param("gain", torch.tensor(1.0).double())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(gain * z.reshape(len(x), -1).sum(1, keepdim=True), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(x))

    return Pair(model=model, guide=guide)


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape).double()


def normal(d: int) -> dist.TorchDistribution:
    return dist.Normal(0 * ones(d), 1.0).to_event(1)


READ = {
    "normal": (lambda x: dist.Normal(x * ones(3), 0.3).to_event(1), normal(3), Normals, 3),
    "full rank": (
        lambda x: dist.MultivariateNormal(x * ones(3), scale_tril=(torch.eye(3).double() * 0.3).expand(len(x), 3, 3)),
        normal(3), FullRankNormals, 3,
    ),
    "low rank": (
        lambda x: dist.LowRankMultivariateNormal(x * ones(3), ones(len(x), 3, 1), ones(len(x), 3)),
        normal(3), FullRankNormals, 3,
    ),
    "index": (lambda x: dist.Categorical(logits=x * ones(4)), dist.Categorical(logits=ones(4)), Codes, 1),
    "grid": (
        lambda x: dist.Categorical(logits=x[:, :, None] * ones(6, 4)).to_event(1),
        dist.Categorical(logits=ones(6, 4)).to_event(1), Codes, 6,
    ),
    "one-hot": (
        lambda x: dist.OneHotCategorical(logits=x[:, :, None] * ones(2, 4)).to_event(1),
        dist.OneHotCategorical(logits=ones(2, 4)).to_event(1), Codes, 8,
    ),
    "bernoulli": (
        lambda x: dist.Bernoulli(logits=x * ones(5)).to_event(1), dist.Bernoulli(0.5 * ones(5)).to_event(1), Codes, 5,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("posterior", "prior", "kind", "dim"), READ.values(), ids=list(READ))
def test_members_are_read_off_a_guide(posterior, prior, kind, dim):
    # The fast density against the guide's own log_prob on every pair.
    x = torch.randn(7, 1).double()
    pair = pair_of(posterior, prior)
    mixture = AggregatedPosterior.of(pair, x)
    assert isinstance(mixture.components.members, kind)
    assert mixture.event_shape == (dim,)
    z = mixture.sample((9,))
    fn = posterior(x)
    shaped = z.reshape(9, 1, *fn.event_shape)
    want = fn.expand((9, 7)).log_prob(shaped.expand(9, 7, *fn.event_shape)).logsumexp(1) - math.log(7)
    torch.testing.assert_close(mixture.log_prob(z), want)


GUIDED = {
    "log-normal": (
        lambda x: dist.LogNormal(x * ones(2), 0.4).to_event(1),
        dist.LogNormal(0 * ones(2), 1.0).to_event(1),
    ),
    "beta": (lambda x: dist.Beta(x.exp() * ones(2), ones(2)).to_event(1), dist.Beta(ones(2), ones(2)).to_event(1)),
    "dirichlet": (lambda x: dist.Dirichlet((x * torch.arange(3.0).double()).exp()), dist.Dirichlet(ones(3))),
    "affine flow": (
        lambda x: dist.TransformedDistribution(
            dist.Normal(x * ones(2), 0.5).to_event(1), [dist.transforms.AffineTransform(1.0, 2.0, event_dim=1)]
        ),
        normal(2),
    ),
}


@pytest.mark.parametrize(("posterior", "prior"), GUIDED.values(), ids=list(GUIDED))
def test_any_other_guide_is_run_on_every_pair(posterior, prior):
    x = torch.randn(300, 1).double()
    pair = pair_of(posterior, prior)
    mixture = AggregatedPosterior.of(pair, x)
    z = mixture.sample((40,))
    fn = posterior(x)
    dense = torch.stack([fn.log_prob(point.reshape(fn.event_shape).expand(300, *fn.event_shape)) for point in z])
    torch.testing.assert_close(mixture.log_prob(z), dense.logsumexp(1) - math.log(300))
    dense[torch.arange(40), torch.arange(40)] = -math.inf
    torch.testing.assert_close(leave_one_out(mixture, z), dense.logsumexp(1) - math.log(299))


def test_guides_that_take_no_particles_are_run_on_repeated_rows():
    easy = pair_of(*GUIDED["log-normal"])

    hard, x = Pair(model=easy.model, guide=stubborn_of(GUIDED["log-normal"][0])), torch.randn(20, 1).double()
    z = AggregatedPosterior.of(easy, x).sample((5,))
    slow, fast = AggregatedPosterior.of(hard, x), AggregatedPosterior.of(easy, x)
    assert not slow.components.stacked
    assert fast.components.stacked
    torch.testing.assert_close(slow.log_prob(z), fast.log_prob(z))
    torch.testing.assert_close(leave_one_out(slow, z), leave_one_out(fast, z))


def stubborn_of(posterior: Callable[[Tensor], dist.TorchDistribution]) -> Callable[[Tensor], Tensor]:
    """A guide whose value must have exactly the shape of a batch."""

    def guide(x):
        with pyro.plate("data", len(x)):
            return pyro.sample("z", posterior(x)).reshape(len(x), 2)

    return guide


def test_parameters_beyond_the_budget_are_read_again():
    x = torch.randn(500, 1).double()
    pair = pair_of(*READ["normal"][:2])
    kept, streamed = AggregatedPosterior.of(pair, x), AggregatedPosterior.of(pair, x, memory=20_000)
    assert isinstance(kept.components, Kept)
    assert isinstance(streamed.components, Reread)
    z = kept.sample((50,))
    torch.testing.assert_close(streamed.log_prob(z), kept.log_prob(z))
    torch.testing.assert_close(leave_one_out(streamed, z), leave_one_out(kept, z))
    assert streamed.sample((3, 4)).shape == (3, 4, 3)


def test_a_subset_of_rows():
    x = torch.randn(100, 1).double()
    pair = pair_of(*READ["normal"][:2])
    some = AggregatedPosterior.of(pair, x, components=10, seed=1)
    assert (len(some), some.total, len(some.index)) == (10, 100, 10)
    assert torch.equal(AggregatedPosterior.of(pair, x, components=10, seed=1).index, some.index)
    assert not torch.equal(AggregatedPosterior.of(pair, x, components=10, seed=2).index, some.index)
    with pytest.raises(DataError, match="expected at least 2; got 1"):
        AggregatedPosterior.of(pair, x, components=1)
    with pytest.raises(DataError, match="latents: expected some of z; got w"):
        AggregatedPosterior.of(pair, x, latents=["w"])


def test_a_latent_that_reads_another_is_no_member_of_a_family():
    def model(x):
        gain = pyro.param("gain", torch.tensor(1.0).double())
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0 * ones(1), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(a, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(gain * b, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x, 0.5).to_event(1))
            pyro.sample("b", dist.Normal(a + x, 0.5).to_event(1))

    pair, x = Pair(model=model, guide=guide), torch.randn(30, 1).double()
    pair.adopt(x)
    assert pair.dependencies(x).guide_roots == pair.dependencies(x).model_roots == {"a"}
    with quiet(pair, x, 0):
        assert isinstance(members_of(pair, x, ["a"]), Normals)
    mixture = AggregatedPosterior.of(pair, x)
    z = torch.randn(6, 2).double()
    columns = [
        scipy.stats.norm(x.numpy()[:, 0], 0.5).logpdf(a) + scipy.stats.norm(a + x.numpy()[:, 0], 0.5).logpdf(b)
        for a, b in z.tolist()
    ]
    want = scipy.special.logsumexp(np.stack(columns), axis=1) - math.log(30)
    np.testing.assert_allclose(mixture.log_prob(z).numpy(), want, rtol=1e-10)
