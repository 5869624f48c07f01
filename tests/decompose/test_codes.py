"""Every discrete latent taken apart: against sums over all joint states in NumPy, known channels, its own streams."""

# Attributes of Modules and Pyro programs have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, typeddict-item, union-attr"

import math
import resource
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pvae.analysis.bounds.evidence import evidence
from pvae.analysis.decompose import posterior_draws
from pvae.analysis.decompose.aggregated import AggregatedPosterior
from pvae.analysis.decompose.codes import duplicates
from pvae.analysis.decompose.collapse import collapse
from pvae.analysis.decompose.components import Reread, Tallied
from pvae.analysis.decompose.entry import quiet
from pvae.analysis.decompose.pairwise import GuideRuns
from pvae.analysis.decompose.posterior_draws import draw
from pvae.analysis.decompose.prior_gain import gain
from pvae.analysis.decompose.surgery import surgery
from pvae.analysis.samples.encode import encode, reconstruct
from pvae.analysis.samples.sample import sample
from pvae.analysis.samples.traversal import traverse
from pvae.distributions.codes import Certain, joint_states
from pvae.distributions.exponential import Normals
from pvae.distributions.exponential_codes import CertainCodes, Codes
from pvae.distributions.exponential_product import Product, product
from pvae.errors import DataError
from pvae.experiment.experiment import Experiment
from pvae.pair.code_usage import code_usage
from pvae.pair.layout import samples
from pvae.pair.pair import Pair

Array = NDArray[np.floating]
SHAPE = (1, 2, 3)


def declared(latents, seed: int = 0, shape=SHAPE, spread: float = 1.0, **more) -> Pair:
    """A tiny pair in float64 whose weights are far from where they begin."""
    net = {"kind": "mlp", "hidden": [8]}
    plan = {
        "data": {"source": "digits", "binarize": "dynamic"},
        "encoder": {"network": net},
        "decoder": {"network": net, "likelihood": {"kind": "bernoulli"}},
        "latents": latents,
    }
    pair = Experiment.from_dict({**plan, **more}).build(shape).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in pair.parameters():
            p.add_(spread * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return pair


def rows(n: int, shape=SHAPE, seed: int = 0) -> Tensor:
    """Binary data."""
    return (torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)) > 0.5).double()


GRID = {"codes": 3, "grid": [2], "prior": "categorical"}
MEMBERS = {
    "categorical, summed": {**GRID, "posterior": {"kind": "categorical", "estimator": "sum"}},
    "categorical, scored": {**GRID, "posterior": {"kind": "categorical", "estimator": "score"}},
    "bits": {"bits": 4},
    "exact": {**GRID, "posterior": "exact"},
    "relaxed": {**GRID, "posterior": "relaxed_onehot"},
    "relaxed, its KL categorical": {**GRID, "posterior": {"kind": "relaxed_onehot", "kl": "categorical"}},
    "straight through": {**GRID, "posterior": "straight_through", "embedding": 4},
    "straight through, noiseless": {**GRID, "posterior": {"kind": "straight_through", "noise": False}, "embedding": 4},
    "nearest code, averages": {**GRID, "posterior": "nearest_code", "embedding": 4},
    "nearest code, gradient": {**GRID, "posterior": {"kind": "nearest_code", "gradient": True}, "embedding": 4},
}
CERTAIN = {"straight through, noiseless", "nearest code, averages", "nearest code, gradient"}
RELAXED = {name for name in MEMBERS if "relaxed" in name or "straight" in name}


class Tables:
    """log q(c | x), log p(c) and log p(x | c) of every joint state, by running the programs on each."""

    def __init__(self, pair: Pair, x: Tensor, name: str = "c") -> None:
        pair.adopt(x)
        summed = name in pair.layout.enumerated
        with quiet(pair, x, 0):
            node = samples(pair.simulate(x))[name]
            fn = node["fn"]
            states = joint_states(2 if node["value"].is_floating_point() else 3, fn.event_shape, x.device)
            self.states = states.numpy()
            log_q, log_p, log_x = [], [], []
            for state in states:
                value = state.expand(len(x), *fn.event_shape).to(node["value"])
                model = samples(pair.model_trace(x, {name: value}))
                log_p.append(model[name]["fn"].log_prob(value))
                log_x.append(model["x"]["fn"].log_prob(x))
                if not summed:
                    q = samples(pair.guide_trace(x))[name]["fn"]
                    same = isinstance(q, Certain)
                    hit = (q.index == value).flatten(1).all(1) if same else None
                    log_q.append(torch.where(hit, 0.0, -math.inf) if same else q.log_prob(value))
        self.log_p, self.log_x = torch.stack(log_p, 1).numpy(), torch.stack(log_x, 1).numpy()
        joint = self.log_p + self.log_x
        self.evidence = np.logaddexp.reduce(joint, axis=1)
        self.log_q = joint - self.evidence[:, None] if summed else torch.stack(log_q, 1).double().numpy()
        self.q = np.exp(self.log_q)
        self.mean = self.q.mean(0)

    @staticmethod
    def _mean(weights: Array, terms: Array) -> float:
        return float(np.where(weights > 0, weights * np.where(weights > 0, terms, 0.0), 0.0).sum(-1).mean())

    @property
    def kl(self) -> float:
        return self._mean(self.q, self.log_q - self.log_p)

    @property
    def information(self) -> float:
        with np.errstate(divide="ignore", invalid="ignore"):
            return self._mean(self.q, self.log_q - np.log(self.mean))

    @property
    def reconstruction(self) -> float:
        return self._mean(self.q, self.log_x)

    def entropy_of_positions(self) -> tuple[Array, Array]:
        """H of q_agg at every position, and KL of it to the prior there."""
        entropies, kls = [], []
        prior = np.exp(self.log_p[0])
        for column in self.states.reshape(len(self.states), -1).T:
            share, p = (np.bincount(column, weights=w, minlength=column.max() + 1) for w in (self.mean, prior))
            entropies.append(-(share[share > 0] * np.log(share[share > 0])).sum())
            kls.append((share[share > 0] * np.log(share[share > 0] / p[share > 0])).sum())
        return np.array(entropies), np.array(kls)


@pytest.fixture(params=MEMBERS, scope="module")
def case(request):
    """Name, pair, data with repeated rows, and the tables of all states."""
    pair, x = declared({"c": MEMBERS[request.param]}), rows(30).repeat(2, 1, 1, 1)
    return request.param, pair, x, Tables(pair, x)


# ---------------------------------------------------------------------- laws of every member


def test_tables_are_distributions(case):
    _, _, _, tables = case
    np.testing.assert_allclose(tables.q.sum(1), 1, atol=1e-9)
    np.testing.assert_allclose(np.exp(tables.log_p).sum(1), 1, atol=1e-9)
    assert tables.information > 0.05  # a law that holds for no information is not looked at


def test_surgery_is_the_sum_over_all_joint_states(case):
    name, pair, x, tables = case
    found = surgery(pair, x)
    for figure, want in (
        (found.kl, tables.kl),
        (found.kl_exact, tables.kl),
        (found.mutual_information, tables.information),
        (found.marginal_kl, tables.kl - tables.information),
    ):
        assert figure.value == pytest.approx(want, abs=1e-8)
        assert figure.kind == "exact"
    entropies, kls = tables.entropy_of_positions()
    level = found.latents["c"]
    np.testing.assert_allclose(np.log(level.perplexity), entropies, atol=1e-8)
    np.testing.assert_allclose(level.dimensions.marginal_kl, kls, atol=1e-8)
    assert level.dimensions.total_correlation.value == pytest.approx(
        tables.kl - tables.information - kls.sum(), abs=1e-8
    )
    drawn = name not in CERTAIN | {"exact"}
    assert found.reconstruction.kind == ("estimate" if drawn else "exact")
    if not drawn:
        assert found.reconstruction.value == pytest.approx(tables.reconstruction, abs=1e-8)


def test_surgery_adds_up_below_the_ceiling(case):
    _, pair, x, _ = case
    found = surgery(pair, x, samples=2)
    assert found.elbo.value == pytest.approx(found.reconstruction.value - found.kl.value, abs=1e-10)
    assert found.kl.value == pytest.approx(found.mutual_information.value + found.marginal_kl.value, abs=1e-10)
    assert found.mutual_information.value <= math.log(30) + 1e-9 < found.log_n.value


def test_evidence_orders_its_bounds(case):
    # Four standard errors twice over ten members: one new seed in 800.
    name, pair, x, tables = case
    found = evidence(pair, x, samples=200)
    assert found.exact.value == pytest.approx(tables.evidence.mean(), abs=1e-8)
    elbo = tables.reconstruction - tables.kl
    assert found.elbo.value == pytest.approx(elbo, abs=4 * found.elbo.standard_error + 1e-8)
    assert found.iwae.value <= found.exact.value + 4 * found.iwae.standard_error + 1e-8
    if name in CERTAIN:
        # A point mass: more draws say nothing more, and the gap is real.
        assert found.iwae.value == pytest.approx(elbo, abs=1e-8)
        assert found.exact.value > found.iwae.value + 0.1
    elif name == "exact":
        assert found.elbo.value == pytest.approx(found.exact.value, abs=1e-8)
    else:
        assert found.iwae.value > elbo


def test_what_is_too_large_to_keep_is_read_off_again(case, monkeypatch):
    _, pair, x, _ = case
    kept = surgery(pair, x, labels=torch.arange(60) % 2)
    monkeypatch.setattr(posterior_draws, "PARAMETER_BYTES", 8)
    monkeypatch.setattr("pvae.pair.structure.PROBABILITIES_AT_ONCE", 60)
    with quiet(pair, x, 0):
        latent = next(iter(draw(pair, x).latents.values()))
    assert latent.certain or latent.q is None
    again = surgery(pair, x, labels=torch.arange(60) % 2)
    for name in ("kl_exact", "mutual_information", "marginal_kl"):
        assert getattr(again, name).value == pytest.approx(getattr(kept, name).value, abs=1e-8)
        assert getattr(again, name).kind == "exact"
    assert again.latents["c"].perplexity == pytest.approx(kept.latents["c"].perplexity, abs=1e-8)
    for label in (0, 1):
        got, want = (s.classes[label].mutual_information.value for s in (again, kept))
        assert got == pytest.approx(want, abs=1e-8)


def test_relaxed_elbo_stands_beside_the_discrete(case):
    name, pair, x, _ = case
    found = surgery(pair, x, samples=20)
    assert (found.relaxed_elbo is not None) == (name in RELAXED)
    assert (found.to_dict()["figures"]["relaxed_elbo"] is not None) == (name in RELAXED)
    if name in RELAXED:
        torch.manual_seed(3)
        with torch.no_grad():
            want = torch.stack([pair(x).mean() for _ in range(400)])
        error = math.hypot(found.relaxed_elbo.standard_error, float(want.std()) / 20)
        assert found.relaxed_elbo.value == pytest.approx(float(want.mean()), abs=4 * error + 1e-8)
    if name == "relaxed":
        assert abs(found.relaxed_elbo.value - found.elbo.value) > 0.1


def test_every_kind_is_encoded_decoded_and_sampled(case):
    name, pair, x, tables = case
    event = (4,) if name == "bits" else (2,)
    whole = name != "bits"
    for mean in (False, True):
        found = encode(pair, x, mean=mean)
        code = found.latents["c"]
        assert code.value.shape == (60, *event)
        assert code.value.is_floating_point() != whole
        assert code.log_q.shape == (60,)
        assert code.is_draw != mean
    state = {tuple(s): i for i, s in enumerate(tables.states.tolist())}
    at = np.array([state[tuple(int(v) for v in row)] for row in code.value.tolist()])
    if name in CERTAIN:
        assert code.probs is None
        np.testing.assert_array_equal(at, tables.q.argmax(1))
    elif name != "exact":
        assert code.probs.shape[:2] == (60, *event)
        np.testing.assert_array_equal(at, tables.q.argmax(1))  # the centre of independent positions is the mode
    np.testing.assert_allclose(code.log_q.numpy(), tables.log_q[np.arange(60), at], atol=1e-8)
    again = reconstruct(pair, x)
    at = np.array([state[tuple(int(v) for v in row)] for row in again.latents["c"].tolist()])
    np.testing.assert_allclose(again.log_p.numpy(), tables.log_x[np.arange(60), at], atol=1e-8)
    assert sample(pair, 5).latents["c"].shape == (5, *event)


def test_usage_is_pooled_over_positions(case):
    name, pair, x, tables = case
    use = collapse(pair, x).latents["c"].codes
    assert use.grid == ((4,) if name == "bits" else (2,))
    assert np.log(use.perplexity) == pytest.approx(tables.entropy_of_positions()[0], abs=1e-8)
    told = code_usage(pair, x)
    if name == "bits":
        assert use.pooled_perplexity is use.share is None
        assert told == {}
        return
    share = np.zeros(3)
    for column in tables.states.T:
        share += np.bincount(column, weights=tables.mean, minlength=3) / 2
    want = math.exp(-(share[share > 0] * np.log(share[share > 0])).sum())
    assert use.pooled_perplexity == pytest.approx(want, abs=1e-8)
    assert use.used == (share >= 1e-3 / 3).sum()
    np.testing.assert_allclose(use.share, np.sort(share)[::-1], atol=1e-8)
    assert told == ({} if name == "exact" else pytest.approx({"perplexity/c": want, "used/c": use.used}, abs=1e-6))
    found = surgery(pair, x)
    assert found.latents["c"].pooled_perplexity == pytest.approx(want, abs=1e-8)
    assert {term: e.value for term, e, _ in found.known()}["perplexity"] == pytest.approx(want, abs=1e-8)


# ---------------------------------------------------------------------- known channels


def channel(table: Array, certain: bool = False) -> tuple[Pair, Tensor]:
    """q(c | x = i) = table[i] `(inputs, P, K)` and an even prior; x is the input's number."""
    inputs, positions, k = table.shape
    log_q = torch.tensor(table).clamp(min=1e-300).log()

    def model(x):
        gain = pyro.param("gain", torch.tensor(1.0).double())
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=torch.zeros(positions, k).double()).to_event(1))
            pyro.sample("x", dist.Normal(gain * c.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)

    def guide(x):
        logits = log_q[x[:, 0].long()]
        with pyro.plate("data", len(x)):
            codes = dist.Categorical(logits=logits).to_event(1)
            pyro.sample("c", Certain(logits.argmax(-1), k, 1) if certain else codes)

    return Pair(model=model, guide=guide), torch.arange(inputs).double()[:, None]


def symmetric(k: int, error: float) -> Array:
    """A k-ary symmetric channel, `(k, 1, k)`."""
    return (np.full((k, k), error / (k - 1)) + np.eye(k) * (1 - error - error / (k - 1)))[:, None]


# shared/TRUTHS.md, "Exact: discrete channels".
@pytest.mark.parametrize(
    ("table", "want"),
    [(symmetric(2, 0.1), 0.3680642072), (symmetric(10, 0.1), 1.7577796619)],
    ids=["binary symmetric", "10-ary symmetric"],
)
def test_symmetric_channels(table, want):
    found = surgery(*channel(table))
    k = table.shape[2]
    entropy = -(table[0] * np.log(table[0])).sum()
    assert found.mutual_information.value == pytest.approx(want, abs=1e-9)
    assert found.kl.value == pytest.approx(math.log(k) - entropy, abs=1e-8)
    assert found.marginal_kl.value == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("positions", [1, 3, 20])
def test_a_deterministic_code_says_its_entropy(positions, certain):
    # 20 positions of 5 have more joint states than can be summed: only a certain code is exact there.
    rng = np.random.default_rng(positions)
    used = rng.integers(0, 4, (40, positions))[rng.integers(0, 12, 40)]  # 12 joint codes at most, code 4 never
    found = surgery(*channel(np.eye(5)[used], certain))
    _, counts = np.unique(used, axis=0, return_counts=True)
    joint = -(counts / 40 * np.log(counts / 40)).sum()
    singles = [np.bincount(column, minlength=5) / 40 for column in used.T]
    entropies = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in singles]
    pooled = np.mean(singles, 0)
    perplexity = math.exp(-(pooled[pooled > 0] * np.log(pooled[pooled > 0])).sum())
    assert found.mutual_information.value == pytest.approx(joint, abs=1e-8)
    assert found.kl.value == pytest.approx(positions * math.log(5), abs=1e-9)
    assert found.kl_exact.value == pytest.approx(positions * math.log(5), abs=1e-9)
    assert found.marginal_kl.value == pytest.approx(positions * math.log(5) - joint, abs=1e-8)
    assert found.latents["c"].pooled_perplexity == pytest.approx(perplexity, abs=1e-8)
    assert joint <= sum(entropies) + 1e-12 <= positions * math.log(perplexity) + 1e-9
    if certain:
        assert found.mutual_information.kind == found.elbo.kind == "exact"
    if positions > 1:
        parts = found.latents["c"].dimensions
        assert parts.mutual_information == pytest.approx(entropies, abs=1e-8)
        assert parts.coordinate_kl.value == pytest.approx(positions * math.log(5) - sum(entropies), abs=1e-8)
        assert parts.total_correlation.value == pytest.approx(sum(entropies) - joint, abs=1e-8)


def test_an_even_prior_is_log_k_less_entropies():
    table = np.random.default_rng(0).dirichlet(np.ones(6), (9, 3))
    found = surgery(*channel(table))
    entropy = -(table * np.log(table)).sum((1, 2)).mean()
    mean = table.mean(0)
    assert found.kl.value == pytest.approx(3 * math.log(6) - entropy, abs=1e-8)
    want = [math.log(6) + (p * np.log(p)).sum() for p in mean]
    assert found.latents["c"].dimensions.marginal_kl == pytest.approx(want, abs=1e-8)


# ---------------------------------------------------------------------- certain codes


def brute(index: Tensor, value: Tensor) -> Tensor:
    """log of the share of rows with each value."""
    return (value[:, None] == index).all(-1).double().mean(1).log()


def test_certain_codes_are_counted():
    index = torch.randint(2, (200, 5))
    q = AggregatedPosterior(CertainCodes(index, 2))
    assert isinstance(q.components, Tallied)
    value = torch.cat([index[:50], torch.randint(2, (20, 5)), torch.full((1, 5), 7)]).double()
    torch.testing.assert_close(q.log_prob(value), brute(index, value))
    assert q.log_prob(value)[-1] == -math.inf
    at = torch.arange(50)
    others = torch.stack([brute(index[torch.arange(200) != i], value[i : i + 1])[0] for i in at.tolist()])
    torch.testing.assert_close(q.leave_one_out(value[:50], at), others)
    assert torch.equal(q.component_log_prob(value[:50], at), torch.zeros(50).double())
    assert float(q.component_log_prob(1 - value[:1], at[:1])) < -1e29
    drawn = q.sample((64,))
    assert bool(q.log_prob(drawn).isfinite().all())


def test_a_subset_of_certain_codes_bounds_their_information():
    index = torch.randint(2, (4000, 4))
    own = torch.zeros(4000).double()
    exact = AggregatedPosterior(CertainCodes(index, 2)).information(index.double(), torch.arange(4000), own)
    chosen = torch.randperm(4000)[:100].sort().values
    some = AggregatedPosterior(CertainCodes(index[chosen], 2), 4000, chosen)
    found = some.information(index.double(), torch.arange(4000), own)
    assert found.lower.mean() < exact.upper.mean() < found.upper.mean()
    assert float(exact.bias) == 0
    assert bool((found.upper <= math.log(4000) + 1e-9).all())


def test_counting_is_the_matrix_product():
    index = torch.randint(9, (60, 3))
    certain, value = CertainCodes(index, 9), torch.randint(9, (40, 3)).double()
    multiplied = AggregatedPosterior(certain.codes())
    got, want = AggregatedPosterior(certain).log_prob(value), multiplied.log_prob(value)
    assert bool((got.isfinite() == (want > -1e29)).all())
    torch.testing.assert_close(got[got.isfinite()], want[got.isfinite()])


def test_certain_codes_beside_normals_are_summed_within_each_code():
    n = 80
    index, loc, scale = torch.randint(3, (n, 1)), torch.randn(n, 2).double(), torch.rand(n, 2).double() + 0.1
    q = product([Normals(loc, scale), CertainCodes(index, 3)])
    assert isinstance(q, Product)
    mixture = AggregatedPosterior(q)
    assert isinstance(mixture.components, Tallied)
    value = torch.cat([torch.randn(30, 2), torch.randint(4, (30, 1))], 1).double()
    density = dist.Normal(loc, scale).to_event(1).log_prob(value[:, None, :2])
    density = torch.where(value[:, None, 2] == index[:, 0], density, -math.inf)
    torch.testing.assert_close(mixture.log_prob(value), density.logsumexp(1) - math.log(n))
    at = torch.arange(30)
    density[at, at] = -math.inf
    torch.testing.assert_close(mixture.leave_one_out(value, at), density.logsumexp(1) - math.log(n - 1))


def test_rows_of_a_table_are_the_product_with_one_hots():
    q, value = Codes(torch.randn(50, 6, 12).double()), torch.randint(12, (70, 6)).double()
    assert q.is_sparse
    out = torch.empty(70, 50).double()
    q.scorer()(value, out)
    eta, constant = q.natural()
    torch.testing.assert_close(out, q.statistics(value, q.origin) @ eta + constant)


VQ = {"codes": 16, "grid": [3, 2], "posterior": "nearest_code", "embedding": 4, "prior": "uniform"}


def test_the_kl_of_a_nearest_code_is_positions_times_log_k():
    x = rows(40)
    for pair in (declared({"c": VQ}), declared({"c": VQ}).float()):  # single precision too
        found = surgery(pair, x)
        for figure in (found.kl, found.kl_exact, found.latents["c"].kl):
            assert figure.value == pytest.approx(6 * math.log(16), abs=1e-9)
            assert (figure.kind, figure.standard_error) == ("exact", 0.0)
        index = encode(pair, x)["c"].reshape(40, -1)
        counts = index.unique(dim=0, return_counts=True)[1].double() / 40
        assert found.mutual_information.value == pytest.approx(float(-(counts * counts.log()).sum()), abs=1e-9)
        assert f"c: certain codes ({len(counts)} distinct ones)" in found.notes[0]


def test_other_rows_as_the_prior_of_certain_codes():
    pair = declared({"c": {**VQ, "codes": 3, "grid": [2]}})
    x, train = rows(30), rows(3000, seed=1)
    with quiet(pair, x, 0):
        index, seen = (draw(pair, part).latents["c"].value for part in (x, train))
    want = brute(seen, index) + 2 * math.log(3)
    assert bool(want.isfinite().all())
    assert surgery(pair, x, train=train).train_gain.value == pytest.approx(float(want.mean()), abs=1e-8)
    nothing = surgery(pair, x, train=train[seen[:, 0] != index[0, 0]]).train_gain
    assert nothing.value == -math.inf
    assert "have codes that no training row has" in nothing.note


def test_gain_of_a_prior_fitted_to_certain_codes():
    x = rows(60)
    before = declared({"c": {**VQ, "codes": 3, "grid": [2], "prior": "categorical"}})
    after = declared({"c": {**VQ, "codes": 3, "grid": [2], "prior": "categorical"}})
    with torch.no_grad():
        for p in after.model.priors.parameters():
            p.mul_(0.5)
    found = gain(before, after, x)
    kls = [surgery(pair, x).kl.value for pair in (before, after)]
    assert found.gained.value == pytest.approx(kls[0] - kls[1], abs=1e-8)
    assert abs(found.gained.value) > 1e-3
    assert found.promised.kind == "exact"


# ---------------------------------------------------------------------- hierarchies


TRANSFORMER = {"kind": "transformer", "width": 8, "layers": 1, "heads": 2}
NEAREST, DRAWN = {"kind": "nearest_code"}, {"kind": "categorical", "estimator": "score"}


def hierarchy(top, bottom) -> Pair:
    """Two levels of codes, the bottom given the top on both sides."""
    level = {"codes": 3, "grid": [2], "embedding": 4}
    below = {"posterior": {**bottom, "given": ["x", "top"]}, "given": ["top"], "prior": TRANSFORMER}
    latents = {"top": {**level, "posterior": top, "prior": "categorical"}, "bottom": {**level, **below}}
    net = {"kind": "mlp", "hidden": [8]}
    decoder = {"network": net, "likelihood": {"kind": "bernoulli"}, "given": ["top", "bottom"]}
    return declared(latents, decoder=decoder, spread=0.7)


def joint_tables(pair: Pair, x: Tensor) -> tuple[Array, Array]:
    """log q(top, bottom | x) `(n, S)` and log p(top, bottom) `(S,)` of all 81 states."""
    states = joint_states(3, (4,), x.device)
    log_q, log_p = [], []
    with quiet(pair, x, 0):
        for state in states:
            values = {"top": state[:2].expand(len(x), 2), "bottom": state[2:].expand(len(x), 2)}
            model = samples(pair.model_trace(x, values))
            log_p.append(sum(model[z]["fn"].log_prob(v) for z, v in values.items()))
            with pyro.poutine.trace() as tracer, pyro.poutine.condition(data=values):
                pair.guide(x)
            total = torch.zeros(len(x)).double()
            for z, v in values.items():
                q = tracer.trace.nodes[z]["fn"]
                hit = (q.index == v).all(1) if isinstance(q, Certain) else None
                total = total + (q.log_prob(v) if hit is None else torch.where(hit, 0.0, -math.inf))
            log_q.append(total)
    return torch.stack(log_q, 1).numpy(), torch.stack(log_p, 1)[0].numpy()


@pytest.mark.parametrize(
    ("top", "bottom", "first"),
    [
        (NEAREST, NEAREST, {"top", "bottom"}),
        (NEAREST, DRAWN, {"top", "bottom"}),
        (DRAWN, NEAREST, {"top"}),
        (DRAWN, DRAWN, {"top"}),
    ],
    ids=["both certain", "top certain", "bottom certain", "both drawn"],
)
def test_levels_of_codes(top, bottom, first):
    # Where codes are drawn: 4 standard errors, one new seed in 4000.
    pair, x = hierarchy(top, bottom), rows(40)
    assert pair.dependencies(x).guide_roots == first
    assert pair.dependencies(x).model_roots == {"top"}
    log_q, log_p = joint_tables(pair, x)
    q = np.exp(log_q)
    np.testing.assert_allclose(q.sum(1), 1, atol=1e-9)
    mean = q.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.where(q > 0, q * (log_q - np.log(mean)), 0.0).sum(1).mean()
        kl = np.where(q > 0, q * (log_q - log_p), 0.0).sum(1).mean()
    certain = top is bottom is NEAREST
    found = surgery(pair, x, samples=1 if certain else 60)
    slack = 1e-8 if certain else 0
    for figure, want in ((found.kl, kl), (found.mutual_information, information)):
        error = figure.standard_error
        if figure is found.mutual_information and first != {"top", "bottom"}:
            error = surgery(pair, x).mutual_information.standard_error  # levels that read draws are scored once
        assert figure.value == pytest.approx(want, abs=slack + 4 * error)
    assert found.marginal_kl.value == pytest.approx(found.kl.value - found.mutual_information.value, abs=1e-9)
    levels = [level.kl for level in found.latents.values()]
    slack = 1e-9 if certain or levels[0].kind == "estimate" else 4 * found.kl.standard_error  # a level may be exact
    assert found.kl.value == pytest.approx(sum(level.value for level in levels), abs=slack)
    assert found.latents["bottom"].marginal_kl is None
    if certain:
        assert found.elbo.kind == "exact"
        bottoms = encode(pair, x)["bottom"].unique(dim=0, return_counts=True)[1].double() / 40
        want = float(-(bottoms * bottoms.log()).sum())
        assert found.latents["bottom"].mutual_information.value == pytest.approx(want, abs=1e-8)
    exact = evidence(pair, x, samples=50)
    assert exact.exact.value >= exact.elbo.value


def test_a_code_seen_by_another_changes_what_follows_it():
    pair, x = hierarchy(NEAREST, NEAREST), rows(6)
    with quiet(pair, x, 0):
        one, two = (
            samples(pair.model_trace(x, {"top": torch.full((6, 2), k), "bottom": torch.zeros(6, 2, dtype=torch.int64)}))
            for k in (0, 1)
        )
    code = torch.zeros(6, 2, dtype=torch.int64)
    assert not torch.allclose(*(nodes["bottom"]["fn"].log_prob(code) for nodes in (one, two)))
    assert not torch.equal(one["x"]["fn"].base_dist.logits, two["x"]["fn"].base_dist.logits)


def test_guides_that_are_run_compare_certain_codes():
    pair, x = hierarchy(DRAWN, NEAREST), rows(12)
    q = AggregatedPosterior.of(pair, x)
    assert isinstance(q.components, GuideRuns)
    log_q, _ = joint_tables(pair, x)
    states = joint_states(3, (4,), x.device).double()
    torch.testing.assert_close(q.log_prob(states).exp(), torch.tensor(np.exp(log_q).mean(0)))


# ---------------------------------------------------------------------- priors that read codes before


@pytest.mark.parametrize("posterior", [DRAWN, NEAREST, "straight_through"], ids=["drawn", "nearest", "relaxed"])
def test_priors_that_are_not_factorised_have_no_positions(posterior):
    latent = {"codes": 3, "grid": [3], "embedding": 4, "posterior": posterior, "prior": TRANSFORMER}
    pair, x = declared({"c": latent}, spread=0.3), rows(40)
    tables = Tables(pair, x)
    np.testing.assert_allclose(np.exp(tables.log_p).sum(1), 1, atol=1e-6)
    found = surgery(pair, x, samples=100)
    assert found.latents["c"].dimensions.marginal_kl is None
    assert found.latents["c"].dimensions.coordinate_kl is None
    # 4 standard errors of two figures, one new seed in 8000.
    assert found.kl.value == pytest.approx(tables.kl, abs=1e-6 + 4 * found.kl.standard_error)
    assert found.marginal_kl.value == pytest.approx(
        tables.kl - tables.information, abs=1e-6 + 4 * found.marginal_kl.standard_error
    )
    entropies, _ = tables.entropy_of_positions()
    assert np.log(found.latents["c"].perplexity) == pytest.approx(entropies, abs=1e-8)


# ---------------------------------------------------------------------- usage


def test_duplicates_are_rows_that_lie_on_each_other():
    table = torch.randn(20, 3)
    assert len(duplicates(table)) == 0
    table[7] = table[3] + 1e-4
    assert duplicates(table).tolist() == [3, 7]
    assert duplicates(table[:1]).tolist() == []


def test_dead_codes_and_duplicates_are_told_with_the_knob():
    pair, x = declared({"c": {**VQ, "codes": 64, "grid": [2]}}), rows(30)
    alert = collapse(pair, x).alerts[0]
    use = collapse(pair, x).latents["c"].codes
    assert use.used < 64
    assert use.active_share == use.used / 64
    assert f"c: {64 - use.used} of 64 codes are dead" in alert
    assert "posterior.restart" in alert
    assert 'start = "kmeans"' in alert
    assert use.duplicates == 0


def test_duplicates_are_counted_among_codes_in_use():
    pair, x = declared({"c": {**VQ, "codes": 64, "grid": [2]}}), rows(30)
    with quiet(pair.adopt(x), x, 0):
        infer: Any = pair.guide_trace(x).nodes["c/embedded"]["infer"]
        z = infer["point"].movedim(1, -1).reshape(-1, 4).unique(dim=0)
    apart = torch.cdist(z, z).fill_diagonal_(math.inf)
    a, b = divmod(int(apart.argmin()), len(z))
    middle, across = (z[a] + z[b]) / 2, z[a] - z[b]
    far = z[(z - middle).norm(dim=1).argmax()]
    with torch.no_grad():  # two codes side by side between two vectors, one at the farthest, the rest nowhere
        table = pair.model.codebooks["c"].weight
        table[:] = 1e6
        table[0], table[1], table[2] = middle + 1e-3 * across, middle - 1e-3 * across, far
    found = collapse(pair, x)
    use = found.latents["c"].codes
    assert (use.used, use.duplicates) == (3, 2)
    assert "c: 2 codes lie on each other in the codebook" in found.alerts[0]
    assert "2 duplicates" in str(found)


def test_one_code_for_all_has_collapsed():
    pair = declared({"c": {**VQ, "codes": 8, "grid": [2]}})
    with torch.no_grad():
        pair.model.codebooks["c"].weight[1:] = 1e6
    assert "c has collapsed: one code is chosen whatever x is" in collapse(pair, rows(30)).alerts[0]


def test_usage_does_not_depend_on_batches_and_moves_nothing(monkeypatch):
    pair, x = declared({"c": VQ}).train(), rows(50)
    before = {name: t.clone() for name, t in pair.state_dict().items()}
    state = torch.get_rng_state()
    want = code_usage(pair, x)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, before[name]) for name, t in pair.state_dict().items())
    assert pair.training
    monkeypatch.setattr("pvae.pair.structure.PROBABILITIES_AT_ONCE", 300)
    assert code_usage(pair, x) == pytest.approx(want)
    assert set(want) == {"perplexity/c", "used/c"}
    assert code_usage(declared({"z": {"dim": 2}}), x) == {}


# ---------------------------------------------------------------------- what is large


def wide(posterior, codes: int, grid) -> Pair:
    """Codes of logits that are a fixed projection of x, in single precision: nothing but the codes takes room."""
    latent = {"codes": codes, "grid": grid, "posterior": posterior}
    return declared({"c": {**latent, "embedding": 4}}, spread=0.1).float()


@pytest.mark.parametrize(("posterior", "n"), [(NEAREST, 3000), (DRAWN, 1000)], ids=["nearest", "drawn"])
def test_memory_does_not_hold_all_probabilities(posterior, n, monkeypatch):
    # Half of what the probabilities of all rows would take in float64: 786 and 262 MB.
    monkeypatch.setattr(posterior_draws, "PARAMETER_BYTES", 2**26)
    pair, x = wide(posterior, 512, [8, 8]), rows(n).float()
    surgery(pair, x[:200], memory=2**26)  # what is made once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = surgery(pair, x, memory=2**26)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < n * 64 * 512 * 8 / 2**20 / 2
    assert found.latents["c"].dimensions is not None
    assert found.kl.value == pytest.approx(found.mutual_information.value + found.marginal_kl.value, abs=1e-9)
    assert 0 <= found.mutual_information.value <= math.log(n) + 1e-9


def test_streamed_codes_are_scored_as_kept_ones(monkeypatch):
    # More joint states than are summed over: the same draws, with probabilities in memory and read off again.
    pair, x = declared({"c": {"codes": 9, "grid": [6], "posterior": DRAWN}}), rows(300)
    kept = surgery(pair, x, samples=2)
    assert kept.mutual_information.kind == "estimate"
    monkeypatch.setattr(posterior_draws, "PARAMETER_BYTES", 8)
    streamed = surgery(pair, x, samples=2, memory=2**17)
    for name in ("kl", "kl_exact", "mutual_information", "marginal_kl", "leave_one_out"):
        assert getattr(streamed, name).value == pytest.approx(getattr(kept, name).value, abs=1e-8)
    assert isinstance(AggregatedPosterior.of(pair, x, memory=2**17).components, Reread)
    parts = [s.latents["c"].dimensions for s in (kept, streamed)]
    assert parts[0].mutual_information == pytest.approx(parts[1].mutual_information, abs=1e-10)
    assert parts[0].marginal_kl == pytest.approx(parts[1].marginal_kl, abs=1e-10)


def test_probabilities_that_are_many_are_not_encoded():
    pair, x = wide({"kind": "categorical", "estimator": "score"}, 512, [4, 4]), rows(5).float()
    code = encode(pair, x).latents["c"]
    assert code.probs is None
    assert code.value.shape == (5, 4, 4)


# ---------------------------------------------------------------------- traversal


def test_bits_are_traversed_and_grids_are_not():
    found = traverse(declared({"b": {"bits": 3}}).adopt(rows(3)), rows(1))
    assert found.x.shape == (3, 2, *SHAPE)
    assert found.values.tolist() == [[0.0, 1.0]] * 3
    assert float((found.x[:, 0] - found.x[:, 1]).abs().max()) > 1e-3
    with pytest.raises(DataError, match="expected real coordinates, bits or a single code; got c, a grid of codes"):
        traverse(declared({"c": GRID | {"posterior": "categorical"}}).adopt(rows(3)), rows(1))
