"""Surgery of rows of several lengths: masks of sites or of distributions, absent sites; one answer for all."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pvae.analysis.decompose.surgery import Surgery, surgery
from pvae.pair.pair import Pair

LENGTHS = torch.tensor([1] * 10 + [2] * 12 + [3] * 8)
X = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)).double()


def chain(mask_sites: bool, steps: int | None = None) -> Pair:
    """z_t given z_t-1 up to the length of a row, masked by handlers or by the distributions."""

    def latent(t: int, loc: Tensor, scale: float, shown: Tensor) -> Tensor:
        fn = dist.Normal(loc, scale)
        if mask_sites:
            with poutine.mask(mask=shown):
                return pyro.sample(f"z{t}", fn)
        return pyro.sample(f"z{t}", fn.mask(shown))

    def model(x: Tensor, lengths: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x)).double()
            for t in range(steps or int(lengths.max())):
                z = latent(t, 0.8 * z, 1.0, t < lengths)
                with poutine.mask(mask=t < lengths):
                    pyro.sample(f"x{t}", dist.Normal(z, 0.5), obs=x[:, t])

    def guide(x: Tensor, lengths: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.8).double())
        with pyro.plate("data", len(x)):
            for t in range(steps or int(lengths.max())):
                latent(t, slope * x[:, t], 0.5, t < lengths)

    return Pair(model, guide)


@pytest.fixture(scope="module")
def by_length() -> list[Surgery]:
    """A surgery of the rows of each length alone, whose latents are all there."""
    pair = chain(mask_sites=True)
    chosen = [LENGTHS == length for length in (1, 2, 3)]
    return [surgery(pair, (X[mine], LENGTHS[mine]), samples=200, seed=length) for length, mine in enumerate(chosen)]


WAYS = {"sites": (True, None), "sites, all steps": (True, 3), "distributions": (False, None)}


@pytest.mark.fast("distributions")
@pytest.mark.parametrize(("mask_sites", "steps"), WAYS.values(), ids=list(WAYS))
def test_information_is_the_mean_over_lengths(mask_sites, steps, by_length):
    found = surgery(chain(mask_sites, steps), (X, LENGTHS), samples=200)
    sizes = LENGTHS.bincount()[1:].tolist()
    for figure in ("elbo", "kl", "mutual_information", "marginal_kl"):
        want = sum(n * getattr(s, figure).value for n, s in zip(sizes, by_length, strict=True)) / len(X)
        got = getattr(found, figure)
        assert abs(got.value - want) < 6 * got.standard_error, figure  # two independent errors, four figures
    assert found.kl.value == pytest.approx(sum(z.kl.value for z in found.latents.values()), abs=1e-9)
    assert "within each of 3 groups" in found.notes[0]
    assert [z.kl.value > 0 for z in found.latents.values()] == [True] * 3


def test_rows_of_lengths_of_their_own_have_no_information():
    lengths = torch.tensor([1, 2, 3])
    found = surgery(chain(mask_sites=True), (X[:3], lengths), samples=5)
    assert found.mutual_information is found.marginal_kl is None
    assert "z1, z2: absent or masked in some rows" in " ".join(found.notes)
    assert found.elbo is not None


def test_masks_that_sampled_values_decide_are_no_lengths():
    """Steps while a sampled flag holds, as in AIR: which latents a row has is not known from the row."""

    def program(x: Tensor, *, observe: bool) -> None:
        with pyro.plate("data", len(x)):
            here = torch.ones(len(x), dtype=torch.bool)
            total = torch.zeros(len(x)).double()
            for t in range(2):
                with poutine.mask(mask=here):
                    flag = pyro.sample(f"flag{t}", dist.Bernoulli(torch.tensor(0.6).double()))
                    here = here & (flag > 0)
                with poutine.mask(mask=here):
                    total = total + here * pyro.sample(f"z{t}", dist.Normal(torch.tensor(0.0).double(), 1.0))
            if observe:
                pyro.sample("x", dist.Normal(total, 1.0), obs=x[:, 0])

    found = surgery(Pair(lambda x: program(x, observe=True), lambda x: program(x, observe=False)), X, samples=300)
    assert found.mutual_information is found.marginal_kl is None
    assert found.kl.value == pytest.approx(0.0, abs=1e-9)  # the guide is the prior
    assert "flag1, z0, z1" in " ".join(found.notes) or "absent or masked" in " ".join(found.notes)


def test_points_of_some_rows_are_pooled():
    """A latent set to a point where a flag stands: the total is the log joint of all rows; two plates over the rows."""
    x = torch.cat([X[:, :1], (torch.arange(30) % 3 > 0).double()[:, None]], 1)

    def program(x: Tensor, *, observe: bool) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=x[:, 1] > 0):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0).double(), 1.0) if observe else dist.Delta(x[:, 0] / 2))
        if observe:
            with pyro.plate("rows", len(x)):
                pyro.sample("x", dist.Normal(z * x[:, 1], 1.0), obs=x[:, 0])

    found = surgery(Pair(lambda x: program(x, observe=True), lambda x: program(x, observe=False)), x, samples=2)
    point, standard = x[:, 0] / 2, dist.Normal(torch.tensor(0.0).double(), 1.0)
    want = standard.log_prob(x[:, 0] - point * x[:, 1]) + x[:, 1] * standard.log_prob(point)
    assert found.elbo is None
    assert found.log_joint is not None
    assert found.log_joint.value == pytest.approx(float(want.mean()), abs=1e-9)


def test_masks_by_the_number_of_a_row_are_no_groups():
    """The same rows in a batch of their own would have other latents: no information, and the total of the whole."""

    def program(x: Tensor, *, observe: bool) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=torch.arange(len(x)) < 12):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)).double() if observe else x[:, 0] / 2, 1.0))
        if observe:
            with pyro.plate("rows", len(x)):
                pyro.sample("x", dist.Normal(0 * z, 1.0), obs=x[:, 0])

    found = surgery(Pair(lambda x: program(x, observe=True), lambda x: program(x, observe=False)), X, samples=400)
    assert found.mutual_information is None
    assert found.kl.value == pytest.approx(float((X[:12, 0] ** 2 / 8).sum() / 30), abs=5 * found.kl.standard_error)
