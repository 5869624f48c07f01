"""The structure of a pair: asked once, kept, held against every batch; runs of the programs are counted."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pvae.analysis.decompose.surgery import surgery
from pvae.errors import DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.pair.dependencies import read_dependencies
from pvae.pair.layout import samples
from pvae.pair.pair import Pair

NET = {"kind": "mlp", "hidden": [4]}
SHAPE = (6,)
CHAIN: dict[str, dict[str, Any]] = {"a": {"dim": 2, "given": ["b"], "prior": "conditional_normal"}, "b": {"dim": 2}}
GRID = {"codes": 3, "grid": [2]}


def declared(latents: dict[str, Any]) -> Pair:
    """A tiny declared pair."""
    decoder = {"network": NET, "likelihood": "normal"}
    raw = {"data": {"source": "tensor"}, "latents": latents, "encoder": {"network": NET}, "decoder": decoder}
    return Experiment.from_dict(raw).build(SHAPE)


def calls_of(pair: Pair) -> Counter[str]:
    """Count the runs of both programs from now on."""
    counted: Counter[str] = Counter()
    for side in ("model", "guide"):
        getattr(pair, side).register_forward_pre_hook(lambda *_, side=side: counted.update([side]))
    return counted


RUNS = {
    "one level": ({"z": {"dim": 2}}, 2, 2),
    "two levels, each inferred from x": (CHAIN, 10, 2),
    "a grid of codes": ({"c": {**GRID, "posterior": "categorical"}}, 2, 2),
    "nearest codes": ({"c": {**GRID, "embedding": 2, "posterior": "nearest_code"}}, 2, 2),
    "relaxed codes": ({"c": {**GRID, "posterior": "relaxed_onehot"}}, 4, 4),
    "summed out by the model": ({"c": {"codes": 3, "posterior": "exact"}}, 2, 2),
}


@pytest.mark.parametrize(("latents", "first", "second"), RUNS.values(), ids=list(RUNS))
def test_one_surgery_runs_the_programs_a_few_times(latents, first, second):
    """A guide and a model for the samples (and those of relaxed codes); two more, and one for each of several latents
    on a few rows, to learn who reads whom."""
    pair, x = declared(latents), torch.randn(20, *SHAPE)
    counted = calls_of(pair)
    surgery(pair, x)
    assert counted == {"guide": first // 2, "model": first // 2}
    counted.clear()
    surgery(pair, x)
    assert counted == {"guide": second // 2, "model": second // 2}


def test_levels_that_read_each_other_are_scored_by_the_guide_besides():
    """The particle check takes three runs, once for a pair; scoring all pairs of sample and row takes one a block."""
    latents = {**CHAIN, "a": {**CHAIN["a"], "posterior": {"kind": "normal", "given": ["x", "b"]}}}
    pair, x = declared(latents), torch.randn(20, *SHAPE)
    counted = calls_of(pair)
    surgery(pair, x)
    assert counted == {"guide": 1 + 4 + 3 + 1, "model": 1 + 4}
    counted.clear()
    surgery(pair, x)
    assert counted == {"guide": 1 + 1, "model": 1}


# ---------------------------------------------------------------------- who reads whom


class Levels(nn.Module):
    """A pair of three levels, c -> b -> a -> x in the model; the guide infers them in a chosen order, with `weight`."""

    def __init__(self, weight: float = 1.0, order: str = "abc") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight).double())
        self.order = order

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            value: Any = 0.0
            for name in "cba":
                value = pyro.sample(name, dist.Normal(self.weight * value + torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(value, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        value = x
        with pyro.plate("data", len(x)):
            for name in self.order:
                value = pyro.sample(name, dist.Normal(self.weight * value, 1.0).to_event(1))


def levels(weight: float = 1.0, order: str = "abc") -> Pair:
    module = Levels(weight, order)
    return Pair(module.model, module.guide)


X = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize(
    ("order", "guide", "bottom_up"),
    [("abc", {"a": "", "b": "a", "c": "b"}, {"a", "b"}), ("cba", {"c": "", "b": "c", "a": "b"}, set())],
    ids=["bottom up", "top down"],
)
@pytest.mark.parametrize("weight", [1.0, 1e-4], ids=["strong", "hardly"])
def test_each_distribution_reads_what_its_program_gives_it(weight, order, guide, bottom_up):
    found = levels(weight, order).adopt(X).dependencies(X)
    assert {name: set(read) for name, read in found.guide.items()} == {name: set(z) for name, z in guide.items()}
    assert found.model == {"a": {"b"}, "b": {"c"}, "c": set()}
    assert found.guide_roots == {order[0]}
    assert found.model_roots == {"c"}
    assert found.bottom_up == bottom_up


def test_a_site_of_the_model_alone_stands_for_what_it_reads():
    """p(a) reads b through a code k that the model sums out."""

    def model(x):
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            logits = torch.stack([b, -b], -1)
            k = pyro.sample("k", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            a = pyro.sample("a", dist.Normal(k.float(), 1.0))
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            for name in "ab":
                pyro.sample(name, dist.Normal(pyro.param(f"slope of {name}", torch.tensor(0.5)) * x, 1.0))

    x = torch.randn(20)
    found = Pair(model, guide).adopt(x).dependencies(x)
    assert found.model == {"a": {"b"}, "b": set()}
    assert found.guide_roots == {"a", "b"}


def test_a_plate_that_takes_no_more_rows_than_the_data_has():
    """The copies of the rows would not fit into the plate: latents are moved in runs of their own."""

    def model(x):
        with pyro.plate("data", 20, subsample_size=len(x)):
            b = pyro.sample("b", dist.Normal(0 * x, 1.0).to_event(1))
            a = pyro.sample("a", dist.Normal(b, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(a, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", 20, subsample_size=len(x)):
            a = pyro.sample("a", dist.Normal(pyro.param("slope", torch.tensor(0.5)) * x, 1.0).to_event(1))
            pyro.sample("b", dist.Normal(a, 1.0).to_event(1))

    found = Pair(model, guide).adopt(X).dependencies(X)
    assert found.guide == {"a": set(), "b": {"a"}}
    assert found.model == {"a": {"b"}, "b": set()}


def test_noise_that_no_site_shows_is_no_dependency():
    """The points differ from row to row, but stay where a latent is moved and the noise is the same."""

    def model(x):
        with pyro.plate("data", len(x)):
            a, b = (pyro.sample(name, dist.Normal(0 * x, 1.0).to_event(1)) for name in "ab")
            pyro.sample("x", dist.Normal(a + b, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            for name in "ab":
                slope = pyro.param(f"slope of {name}", torch.tensor(0.5))
                pyro.sample(name, dist.Delta(slope * x + torch.randn_like(x)).to_event(1))

    found = Pair(model, guide).adopt(X).dependencies(X)
    assert found.guide_roots == found.model_roots == {"a", "b"}


def test_dependencies_are_kept_until_the_weights_change():
    pair = levels().adopt(X)
    first = pair.dependencies(X)
    assert pair.dependencies(X[:3]) is first
    with torch.no_grad():
        for p in pair.parameters():
            p.zero_()
    assert pair.dependencies(X).guide_roots == {"a", "b", "c"}


def test_a_random_stream_and_the_weights_stay_as_they_were():
    pair = levels().adopt(X)
    state, random = copy.deepcopy(pair.state_dict()), torch.get_rng_state()
    read_dependencies(pair, X)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in pair.state_dict().items())


# ---------------------------------------------------------------------- kept, and held against every batch


def test_the_structure_is_no_part_of_the_state_and_survives_a_copy():
    pair = declared(CHAIN)
    assert set(pair.state_dict()) <= {name for name, _ in (*pair.named_parameters(), *pair.named_buffers())}
    twin = copy.deepcopy(pair)
    assert twin.structure == pair.structure
    counted = calls_of(twin)
    twin.dependencies(torch.randn(5, *SHAPE))
    assert counted == {"guide": 4, "model": 4}


class Fickle(nn.Module):
    """Programs with a second latent, and a second observation, for batches whose first number is large."""

    def __init__(self, side: str, more: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.side, self.more = side, more

    def _here(self, side: str, x: Tensor) -> bool:
        return side == self.side and (float(x[0, 0]) > 10) == self.more

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            if self._here("model", x):
                pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=x)
            pyro.sample("x", dist.Normal(z, self.scale).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x, self.scale).to_event(1))
            if self._here("guide", x):
                pyro.sample("w", dist.Normal(z, 1.0).to_event(1))


USES: dict[str, Callable[[Pair, Tensor], Any]] = {
    "terms": lambda pair, x: pair.terms(x),
    "surgery": lambda pair, x: surgery(pair, x),
    "guide or model": lambda pair, x: (pair.guide_trace(x), pair.model_trace(x)),
}


@pytest.mark.parametrize("use", USES.values(), ids=list(USES))
@pytest.mark.parametrize("more", [True, False], ids=["later", "at first"])
def test_a_latent_that_only_the_guide_has_in_some_batch_is_refused(use, more):
    module = Fickle("guide", more)
    pair = Pair(module.model, module.guide).adopt(torch.zeros(3, 2))
    if not more and use is USES["guide or model"]:
        return  # no figure comes of it
    with pytest.raises(DeclarationError, match="w: expected every latent of the guide in the model"):
        use(pair, torch.full((4, 2), 20.0))


@pytest.mark.parametrize("more", [True, False], ids=["appears", "vanishes"])
def test_an_observation_of_some_batches_counts_where_it_is(more):
    module = Fickle("model", more)
    pair = Pair(module.model, module.guide).adopt(torch.zeros(3, 2))
    x = torch.cat([torch.zeros(30, 2), torch.full((10, 2), 20.0)])
    for rows in (x[:30], x[30:]):
        with torch.no_grad():
            torch.manual_seed(0)
            want = -Trace_ELBO().loss(module.model, module.guide, rows)
            torch.manual_seed(0)
            assert float(pair.forward(rows).sum()) == pytest.approx(want, rel=1e-5)
    assert set(pair.layout.observed) == {"x", "y"}


def test_facts_are_those_of_the_codes_that_relaxed_latents_stand_for():
    pair = declared({"c": {**GRID, "posterior": "relaxed_onehot"}, "z": {"dim": 4}})
    found = pair.structure
    assert found.codes == {"c"}
    assert found.parameters_per_row == {"c": 6, "z": 4}
    assert found.shapes["c"].numel == 2
    assert found.rows_at_once() == 1000
    assert found.rows_at_once(7) == 7
    assert found.elements is None
    assert samples(pair.guide_trace(torch.zeros(2, *SHAPE)))["c"]["value"].shape == (2, 2, 3)
