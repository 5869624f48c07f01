"""Labels that are known for some rows, enumerated codes in nested plates, points, and pairs with parameters per row."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDiagonalNormal, AutoGuideList, AutoLaplaceApproximation, AutoNormal
from torch import Tensor

from pvae.analysis.bounds.evidence import evidence
from pvae.analysis.decompose.surgery import surgery
from pvae.errors import DataError, DeclarationError
from pvae.pair.pair import Pair
from pvae.pair.terms import Terms

CENTRES = torch.tensor([-2.0, 0.0, 1.5])
X = torch.linspace(-2.5, 2.5, 12)
LABEL = torch.where(torch.arange(12) < 7, torch.arange(12) % 3, torch.tensor(-1))


@pytest.fixture(autouse=True)
def _clean():
    yield
    pyro.clear_param_store()


def total(terms: Terms) -> Tensor:
    return terms.reconstruction - sum(terms.kl.values())


def labelled_pair(marked: bool) -> Pair:
    """A label with a prior, seen in some rows; the guide draws it elsewhere, under a mask."""
    infer = {"enumerate": "parallel"} if marked else {}

    def model(x: Tensor, label: Tensor) -> None:
        with pyro.plate("data", len(x)):
            prior = dist.Categorical(torch.tensor([0.2, 0.3, 0.5]))
            y = pyro.sample("y", prior, obs=label.clamp(min=0), obs_mask=label >= 0)
            pyro.sample("x", dist.Normal(CENTRES[y], 0.8), obs=x)

    def guide(x: Tensor, label: Tensor) -> None:
        sharp = pyro.param("sharp", torch.tensor(0.4))
        with pyro.plate("data", len(x)), poutine.mask(mask=label < 0):
            q = dist.Categorical(logits=-sharp * (x[:, None] - CENTRES) ** 2)
            pyro.sample("y_unobserved", q, infer=infer)

    return Pair(model=model, guide=guide)


def exact_rows() -> tuple[Tensor, Tensor]:
    """ELBO and log p of every row: of x and label where it is known, of x elsewhere."""
    log_joint = dist.Normal(CENTRES, 0.8).log_prob(X[:, None]) + torch.tensor([0.2, 0.3, 0.5]).log()
    log_q = (-0.4 * (X[:, None] - CENTRES) ** 2).log_softmax(1)
    known = LABEL >= 0
    seen = log_joint.gather(1, LABEL.clamp(min=0)[:, None])[:, 0]
    elbo = torch.where(known, seen, (log_q.exp() * (log_joint - log_q)).sum(1))
    return elbo, torch.where(known, seen, log_joint.logsumexp(1))


def test_a_loss_sums_over_labels_where_they_are_unknown():
    pair = labelled_pair(marked=True)
    x = pair.accept((X, LABEL))
    assert pair.check((X, LABEL)) == []
    torch.testing.assert_close(total(pair.terms(x, expected=True)), exact_rows()[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("marked", [True, False])
def test_evidence_counts_a_hidden_label_once(marked):
    found = evidence(labelled_pair(marked), (X, LABEL), samples=2000)
    want = float(exact_rows()[1].mean())
    assert found.iwae.value == pytest.approx(want, abs=4 * found.iwae.standard_error + 1e-3)
    assert found.exact is None or found.exact.value == pytest.approx(want, abs=1e-5)


def codes_in_pixels(decoded_together: bool = False) -> Pair:
    @config_enumerate
    def guide(x: Tensor) -> None:
        sharp = pyro.param("sharp", torch.tensor(0.4))
        with pyro.plate("rows", len(x), dim=-2), pyro.plate("pixels", 3, dim=-1):
            pyro.sample("c", dist.Categorical(logits=-sharp * (x[..., None] - CENTRES) ** 2))

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-2):
            with pyro.plate("pixels", 3, dim=-1):
                c = pyro.sample("c", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
                if not decoded_together:
                    pyro.sample("x", dist.Normal(CENTRES[c], 0.8), obs=x)
            if decoded_together:
                mean = CENTRES[c].sum(-1, keepdim=True)
                pyro.sample("x", dist.Normal(mean, 0.8), obs=x.sum(-1, keepdim=True))

    return Pair(model=model, guide=guide)


def test_codes_in_a_plate_inside_the_rows_are_summed_over_one_by_one():
    x = X.reshape(4, 3)
    pair = codes_in_pixels().adopt(x)
    log_joint = dist.Normal(CENTRES, 0.8).log_prob(x[..., None]) + torch.tensor([0.2, 0.3, 0.5]).log()
    log_q = (-0.4 * (x[..., None] - CENTRES) ** 2).log_softmax(-1)
    want = (log_q.exp() * (log_joint - log_q)).sum((1, 2))
    torch.testing.assert_close(total(pair.terms(x, expected=True)), want, rtol=1e-5, atol=1e-5)
    for closed_form in (False, True):
        several = total(pair.terms(x, particles=5, expected=True, closed_form=closed_form))
        torch.testing.assert_close(several, want.expand(5, -1), rtol=1e-5, atol=1e-5)


def test_a_site_outside_the_plate_of_the_codes_that_it_reads_is_refused():
    x = X.reshape(4, 3)
    with pytest.raises(DeclarationError, match="x: expected a site that depends on the enumerated c inside its plates"):
        codes_in_pixels(decoded_together=True).adopt(x).terms(x, expected=True)


def test_a_sum_over_one_row_is_that_of_the_row_among_others():
    @config_enumerate
    def model(x: Tensor) -> None:
        gain = pyro.param("gain", torch.tensor(1.0))
        with pyro.plate("rows", len(x), dim=-2), pyro.plate("pixels", 3, dim=-1):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            pyro.sample("x", dist.Normal(gain * CENTRES[c], 0.8), obs=x)

    x, pair = X.reshape(4, 3), Pair(model=model, guide=lambda x: None)
    whole = evidence(pair, x, samples=1).log_p
    alone = [evidence(pair, x[i : i + 1], samples=1).log_p for i in range(4)]
    torch.testing.assert_close(torch.cat(alone), whole, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------ points, and guides that were copied


def two_means(x: Tensor) -> None:
    a, b = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("a", "b"))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)


def mixed_list() -> Any:
    """A vector for one latent, a point of Laplace's guide for the other."""
    guide = AutoGuideList(two_means)
    guide.append(AutoDiagonalNormal(poutine.block(two_means, expose=["a"]), init_scale=0.3))
    guide.append(AutoLaplaceApproximation(poutine.block(two_means, expose=["b"])))
    return guide


@pytest.mark.parametrize(
    ("guide", "points"),
    [(AutoDiagonalNormal, set()), (AutoLaplaceApproximation, {"a", "b", "_AutoLaplaceApproximation_latent"})],
)
def test_points_are_latents_that_no_draw_moves(guide, points):
    found = Pair(model=two_means, guide=guide(two_means)).adopt(X)
    assert found.structure.points == points
    figures = surgery(found, X, samples=2)
    assert (figures.elbo is None) == bool(points)


def test_a_vector_of_one_latent_leaves_the_other_a_point():
    found = Pair(model=two_means, guide=mixed_list()).adopt(X)
    assert {"b"} <= found.structure.points
    assert "a" not in found.structure.points


def test_check_leaves_an_autoguide_whole():
    guide = AutoGuideList(two_means)
    guide.append(AutoNormal(poutine.block(two_means, expose=["a"])))
    guide.append(AutoNormal(poutine.block(two_means, expose=["b"])))
    pair = Pair(model=two_means, guide=guide)
    assert pair.check(X) == []
    guide(X)  # failed: a copy takes the model from the guide that it is made of
    assert guide.model is two_means
    assert all(part.master is not None for part in guide)


def test_other_rows_than_those_with_parameters_are_told_by_check_and_analyses():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(12))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.7))

    pair = Pair(model=model, guide=guide)
    assert "or it has parameters for each of 12 rows" in str(Pair(model=model, guide=guide).check(X[:5])[0])
    log_p = dist.Normal(0.0, math.sqrt(2.0)).log_prob(X).mean()
    found = evidence(pair, X, samples=3000).iwae
    assert found.value == pytest.approx(float(log_p), abs=4 * found.standard_error + 0.05)
    words = "expected the 12 rows that the parameters of the programs were made for"
    assert [words in str(problem) for problem in pair.check(X[:5])] == [True]
    with pytest.raises(DataError, match=words):
        evidence(pair, X[:5], samples=2)
