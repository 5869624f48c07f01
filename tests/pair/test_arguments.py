"""Programs of several arguments, and whole numbers: the figures are those of one tensor of all columns."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pvae
from pvae import analysis
from pvae.errors import DataError, PvaeError
from pvae.pair.pair import Pair
from tests.pair.against_pyro import require_right
from tests.programs.program import normal

ROWS = 20
OPTIONS = ("train.epochs=2", "train.batch_size=8")


@pytest.fixture(autouse=True)
def clean():
    yield
    pyro.clear_param_store()


def model(x: Tensor, label: Tensor, lengths: Tensor | None = None) -> None:
    shift = torch.tensor([-1.0, 0.0, 1.0])[label]
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(shift, 1.0))
        loc = z if lengths is None else z + lengths.float()
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def guide(x: Tensor, label: Tensor, lengths: Tensor | None = None) -> None:
    a = pyro.param("a", torch.tensor(0.5))
    shift = torch.tensor([-1.0, 0.0, 1.0])[label]
    left = x if lengths is None else x - lengths
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(a * (left + shift), 0.72))


def columns(model):
    return lambda x: model(x[:, 0], x[:, 1].long(), x[:, 2].long())


DATA = {"x": 1.4 * normal(ROWS), "label": torch.arange(ROWS) % 3, "lengths": torch.arange(ROWS) % 2}
FORMS = {
    "tuple": tuple(DATA.values()),
    "list": list(DATA.values()),
    "dictionary": DATA,
    "dictionary in another order": dict(reversed(DATA.items())),
    "numpy": tuple(v.numpy() for v in DATA.values()),
    "int32": (DATA["x"], DATA["label"].int(), DATA["lengths"].int()),
    "uint8": (DATA["x"], DATA["label"].to(torch.uint8).long(), DATA["lengths"].to(torch.uint8)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_several_arguments(form):
    one = torch.stack([v.float() for v in DATA.values()], 1)
    plain = Pair(model=columns(model), guide=columns(guide))
    pair, data = Pair(model=model, guide=guide), FORMS[form]
    assert not pair.check(data)
    for run in (
        lambda p, x: analysis.surgery(p, x, samples=3).elbo.value,
        lambda p, x: analysis.evidence(p, x, samples=20).iwae.value,
        lambda p, x: analysis.gap(p, x, steps=1, samples=5).elbo.value,
    ):
        assert run(pair, data) == pytest.approx(run(plain, one), abs=1e-4)


def test_two_arguments_of_three():
    require_right(model, guide, (DATA["x"], DATA["label"]))


def test_other_dtypes_and_shapes_of_an_argument():
    """A boolean mask, a matrix, doubles and an image beside each other."""

    def wide(x: Tensor, seen: Tensor, image: Tensor, weight: Tensor) -> None:
        assert (seen.dtype, image.dtype, weight.dtype) == (torch.bool, torch.uint8, torch.float64)
        assert image.shape[1:] == (2, 3)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(z + image.float().mean((1, 2))[:, None], 1.0).to_event(1), obs=x)
            pyro.sample("w", dist.Normal(z[..., 0].double(), 1.0), obs=weight)

    def posterior(x: Tensor, seen: Tensor, image: Tensor, weight: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.4 * x * seen[:, None], 0.8).to_event(1))

    image = (torch.arange(ROWS * 6) % 5).to(torch.uint8).reshape(ROWS, 2, 3)
    data = (normal((ROWS, 2)), torch.arange(ROWS) % 2 > 0, image, normal(ROWS, 4).double())
    require_right(wide, posterior, data)


@pytest.mark.parametrize(
    "data",
    [
        (DATA["x"], DATA["label"][:-1], DATA["lengths"]),
        (DATA["x"], DATA["label"]),
        {"x": DATA["x"], "label": DATA["label"], "others": DATA["lengths"]},
        (DATA["x"][:, None], DATA["label"], DATA["lengths"]),
        (),
        DATA["x"],
        (DATA["x"], "labels", DATA["lengths"]),
    ],
    ids=["rows", "one too few", "another name", "another shape", "none", "one tensor", "text"],
)
def test_other_arguments_than_before_are_refused_in_words(data):
    pair = Pair(model=model, guide=guide)
    analysis.evidence(pair, tuple(DATA.values()), samples=2)
    with pytest.raises(PvaeError):
        analysis.evidence(pair, data, samples=2)


def held_out(run: pvae.Run):
    """Surgery of the rows that the run held out."""
    return analysis.surgery(run.pair, run.data.split("test").rows, samples=2)


@pytest.mark.parametrize("form", ["tuple", "dictionary"])
def test_a_fit_batches_arguments_together(form, tmp_path):
    seen = []

    def watched(x: Tensor, label: Tensor, lengths: Tensor) -> None:
        seen.append((len(x), len(label), len(lengths)))
        assert label.dtype == torch.int64
        model(x, label, lengths)

    run = pvae.fit(Pair(model=watched, guide=guide), *OPTIONS, data=FORMS[form], run_dir=tmp_path, progress=False)
    assert all(len(set(sizes)) == 1 for sizes in seen)
    assert any(sizes[0] == 8 for sizes in seen)
    figures = [analysis.surgery(run.pair, FORMS[form], samples=2).elbo.value, held_out(run).elbo.value]
    again = pvae.Run.load(run.path, pair=Pair(model=watched, guide=guide), data=FORMS[form])
    assert analysis.surgery(again.pair, FORMS[form], samples=2).elbo.value == pytest.approx(figures[0], abs=1e-5)
    assert held_out(again).elbo.value == pytest.approx(figures[1], abs=1e-5)


# ---------------------------------------------------------------------- whole numbers

TABLE = torch.linspace(-1.0, 1.0, 4)


def counts(x: Tensor) -> None:
    assert x.dtype == torch.int64
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Categorical(logits=z[..., None] * TABLE), obs=x)


def of_counts(x: Tensor) -> None:
    a = pyro.param("a", torch.tensor(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(a * TABLE[x], 0.8))


def test_whole_numbers_stay_whole_in_check_fit_analyses_and_a_loaded_run(tmp_path):
    x = torch.arange(24) % 4
    pair = Pair(model=counts, guide=of_counts)
    assert not pair.check(x)
    for _ in range(2):
        analysis.surgery(pair, x, samples=2)
    analysis.evidence(pair, x.numpy(), samples=3)
    run = pvae.fit(pair, *OPTIONS, data=x, run_dir=tmp_path, progress=False)
    want = held_out(run).elbo.value
    again = pvae.Run.load(run.path, pair=Pair(model=counts, guide=of_counts), data=x)
    assert held_out(again).elbo.value == pytest.approx(want, abs=1e-5)
    require_right(counts, of_counts, x, _log_p(x), slack=0.1)


def _log_p(x: Tensor) -> float:
    grid = torch.linspace(-9, 9, 2001)
    joint = dist.Normal(0.0, 1.0).log_prob(grid)[:, None] + (grid[:, None] * TABLE).log_softmax(1)[:, x]
    return (joint.logsumexp(0) + np.log(float(grid[1] - grid[0]))).mean().item()


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_programs_that_need_floats_get_them(dtype):
    def bits(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z), obs=x)

    def posterior(x: Tensor) -> None:
        layer = pyro.module("layer", LAYER)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(layer(x[:, None])[:, 0], 0.9))

    x = (torch.arange(12) % 2).to(dtype)
    found = analysis.evidence(Pair(model=bits, guide=posterior), x, samples=50)
    assert found.iwae.value == pytest.approx(np.log(0.5), abs=0.1)


torch.manual_seed(0)
LAYER = torch.nn.Linear(1, 1)


def test_no_rows_of_whole_numbers_are_refused():
    with pytest.raises(DataError):
        analysis.evidence(Pair(model=counts, guide=of_counts), torch.arange(0))
