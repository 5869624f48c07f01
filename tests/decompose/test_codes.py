"""Every discrete latent taken apart: against sums over all joint states in NumPy."""

# Attributes of Modules and Pyro programs have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, typeddict-item, union-attr"

import math
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from torch import Tensor

from pvae.analysis.aggregate.aggregated import AggregatedPosterior
from pvae.analysis.aggregate.entry import quiet
from pvae.analysis.aggregate.pairwise import GuideRuns
from pvae.analysis.bounds.evidence import evidence
from pvae.analysis.decompose import posterior_draws
from pvae.analysis.decompose.codes import duplicates
from pvae.analysis.decompose.collapse import collapse
from pvae.analysis.decompose.posterior_draws import draw
from pvae.analysis.decompose.surgery import surgery
from pvae.analysis.samples.encode import encode, reconstruct
from pvae.analysis.samples.sample import sample
from pvae.analysis.samples.traversal import traverse
from pvae.distributions.codes import Certain
from pvae.errors import DataError
from pvae.pair.code_usage import code_usage
from pvae.pair.layout import samples
from pvae.pair.pair import Pair
from tests.decompose.pairs import DRAWN, NEAREST, SHAPE, VQ, Array, declared, rows

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


def joint_states(states: int, grid: torch.Size | tuple[int, ...], device: torch.device) -> Tensor:
    """All joint states of the elements of a grid, `(S, *grid)`."""
    return torch.cartesian_prod(*[torch.arange(states, device=device)] * math.prod(grid)).reshape(-1, *grid)


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


TRANSFORMER = {"kind": "transformer", "width": 8, "layers": 1, "heads": 2}


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
    assert "c has collapsed: one of 8 codes is chosen whatever x is" in collapse(pair, rows(30)).alerts[0]


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


def test_bits_are_traversed_and_grids_are_not():
    found = traverse(declared({"b": {"bits": 3}}).adopt(rows(3)), rows(1))
    assert found.x.shape == (3, 2, *SHAPE)
    assert found.values.tolist() == [[0.0, 1.0]] * 3
    assert float((found.x[:, 0] - found.x[:, 1]).abs().max()) > 1e-3
    with pytest.raises(DataError, match="expected real coordinates, bits or a single code; got c, a grid of codes"):
        traverse(declared({"c": GRID | {"posterior": "categorical"}}).adopt(rows(3)), rows(1))
