"""Models given the label of a datum: in the prior, the decoder and the guide."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="union-attr, attr-defined, arg-type, dict-item, operator"

import copy
from typing import Any

import pyro.poutine as poutine
import pytest
import torch
from torch import Tensor

import pvae
from pvae.analysis import bracket, encode, evidence, sample, surgery
from pvae.analysis.decompose.by_covariate import GROUP_SEEDS
from pvae.data import Dataset
from pvae.errors import DataError, DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.graph.frame import Entry, Frame
from pvae.pair.pair import Pair
from pvae.runs.run import Run
from pvae.util import seeds
from tests.laws import require_trainable, shake

NETWORK = {"network": {"kind": "mlp", "hidden": [16]}}
PRIOR = {"kind": "conditional_normal", **NETWORK}
TABLE: dict[str, Any] = {
    "name": "given",
    "data": {"source": "digits", "binarize": "dynamic"},
    "covariates": {"y": {"codes": 10}},
    "latents": {"z": {"dim": 3, "given": ["y"], "prior": PRIOR, "posterior": {"kind": "normal", "given": ["x", "y"]}}},
    "encoder": {"kind": "per_latent", **NETWORK},
    "decoder": {**NETWORK, "given": ["z", "y"], "likelihood": {"kind": "bernoulli"}},
    "train": {"epochs": 2, "batch_size": 300},
}


def declared(codes: int = 3, **changes: Any) -> Pair:
    table = {**TABLE, "covariates": {"y": {"codes": codes}}, **changes}
    return Experiment.from_dict(table).build((6,))


def rows(n: int = 60, codes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = (torch.rand(n, 6, generator=generator) > 0.5).float()
    y = torch.randint(0, codes, (n,), generator=generator)
    return torch.cat([x, y[:, None].float()], 1), y


def test_a_row_holds_the_datum_and_its_label():
    frame = Frame((1, 2, 3), {"y": Entry(codes=4)})
    assert frame.row == (7,)
    x, y = torch.rand(5, 1, 2, 3), torch.tensor([0, 3, 1, 2, 3])
    datum, seen = frame.split(torch.cat([x.flatten(1), y[:, None].float()], 1))
    assert torch.equal(datum, x)
    assert torch.equal(seen["y"], torch.nn.functional.one_hot(y, 4).float())
    assert Frame((1, 2, 3)).row == (1, 2, 3)
    assert Frame((2,)).groups(torch.zeros(3, 2)) is None


def test_every_density_reads_the_label():
    pair, (x, y) = declared(), rows()
    assert pair.check(x) == []
    other = x.clone()
    other[:, -1] = (y + 1) % 3
    z = torch.randn(len(x), 3)
    with torch.no_grad():
        sides = []
        for data in (x, other):
            guide = poutine.trace(poutine.condition(pair.guide, {"z": z})).get_trace(data)
            model = pair.model_trace(data, {"z": z})
            sides.append([guide.nodes["z"]["fn"].log_prob(z)])
            sides[-1] += [model.nodes[name]["fn"].log_prob(model.nodes[name]["value"]) for name in ("z", "x")]
    for one, two in zip(*sides, strict=True):
        assert not torch.isclose(one, two).any()
    assert model.nodes["x"]["value"].shape == (60, 6)  # the label is no part of what is modelled


def test_the_elbo_is_that_of_one_model_for_each_label():
    # A linear-Gaussian VAE whose offset depends on the label: the same numbers as an unconditioned one of x - offset.
    table = {
        **TABLE,
        "latents": {"z": {"dim": 2}},
        "encoder": {"kind": "shared", "network": {"kind": "mlp", "hidden": []}},
        "decoder": {
            "given": ["z", "y"],
            "network": {"kind": "mlp", "hidden": []},
            "likelihood": {"kind": "normal", "scale": "fixed", "value": 0.5},
        },
    }
    pair = Experiment.from_dict({**table, "covariates": {"y": {"codes": 3}}}).build((6,))
    plain = {**table, "decoder": {**table["decoder"], "given": ["z"]}}
    del plain["covariates"]
    alone = Experiment.from_dict(plain).build((6,))
    x, y = torch.randn(40, 6), torch.randint(0, 3, (40,))
    weight = pair.model.decoder.network.head.weight
    alone.load_state_dict({**pair.state_dict(), "model.decoder.network.head.weight": weight[:, :2]})
    offset = weight[:, 2:].T[y].detach()
    packed = torch.cat([x, y[:, None].float()], 1)
    z = torch.randn(40, 2)
    with torch.no_grad():
        given = pair.model_trace(packed, {"z": z}).nodes["x"]
        plain_x = alone.model_trace(x - offset, {"z": z}).nodes["x"]
        torch.testing.assert_close(
            given["fn"].log_prob(given["value"]), plain_x["fn"].log_prob(plain_x["value"]), rtol=1e-4, atol=1e-4
        )


def test_surgery_is_made_within_each_label():
    pair, (x, y) = declared(), rows()
    found = surgery(pair, x, samples=3, labels=y)
    sizes = [int((y == label).sum()) for label in range(3)]
    own = [seeds.mix(0, seeds.ANALYSIS, GROUP_SEEDS + label) for label in range(3)]
    parts = [surgery(pair, x[y == label], samples=3, seed=seed) for label, seed in enumerate(own)]
    for name in ("elbo", "reconstruction", "kl", "kl_exact", "mutual_information", "marginal_kl", "log_n"):
        mean = sum(n * getattr(s, name).value for n, s in zip(sizes, parts, strict=True)) / 60
        assert getattr(found, name).value == pytest.approx(mean, abs=1e-9), name
    assert found.kl.value == pytest.approx(found.mutual_information.value + found.marginal_kl.value, abs=1e-9)
    assert found.n == 60
    assert {label: c.n for label, c in found.classes.items()} == dict(enumerate(sizes))
    other = torch.arange(60) % 2  # a label of its own, in every group
    for label, c in surgery(pair, x, samples=3, labels=other).classes.items():
        mine = [surgery(pair, x[y == g], samples=3, seed=own[g], labels=other[y == g]).classes[label] for g in range(3)]
        assert c.n == 30
        assert c.elbo.value == pytest.approx(sum(m.n * m.elbo.value for m in mine) / 30, abs=1e-9)
        assert c.kl.value == pytest.approx(c.mutual_information.value + c.marginal_kl.value, abs=1e-9)
    assert "within each of 3 groups" in found.notes[0]
    assert found.kl.standard_error < max(s.kl.standard_error for s in parts)
    gain = surgery(pair, x, train=rows(90)[0]).train_gain
    assert gain is not None
    assert gain.value < found.marginal_kl.value + 4 * gain.standard_error


def test_groups_draw_apart_so_that_the_stated_error_is_the_spread_over_seeds():
    pair, (x, _) = declared(codes=4), rows(200, codes=4)
    with torch.no_grad():
        for name, parameter in pair.named_parameters():
            if name.startswith("guide") and parameter.dim() == 1:  # posteriors narrower than their prior
                parameter.sub_(1.5)
    found = [surgery(pair, x, samples=2, seed=seed, population=None).kl for seed in range(40)]
    spread = float(torch.tensor([kl.value for kl in found]).std())
    assert 0.6 < spread / found[0].standard_error < 1.4


def test_information_is_that_of_an_independent_sum():
    pair, (x, y) = declared(), rows(30)
    found = surgery(pair, x, samples=200)
    with torch.no_grad():
        trace = pair.guide_trace(x)
        q = trace.nodes["z"]["fn"].base_dist
        z = q.sample((200,))
        pairs = torch.distributions.Normal(q.loc.double(), q.scale.double())
        scores = torch.stack([pairs.log_prob(z[:, i : i + 1].double()).sum(-1) for i in range(30)], 1)  # (S, i, j)
    same = (y[:, None] == y).double()
    own = scores.diagonal(dim1=1, dim2=2)
    mixed = (scores + same.log()).logsumexp(-1) - same.sum(-1).log()
    assert found.mutual_information.value == pytest.approx(float((own - mixed).mean()), abs=0.02)


def test_evidence_and_objectives_take_rows_as_they_are():
    pair, (x, _) = declared(), rows()
    bound = evidence(pair, x, samples=200)
    assert bound.iwae.value > bound.elbo.value
    assert pair.terms(x, particles=4).kl["z"].shape == (4, 60)


def test_a_run_packs_binarises_and_resumes(tmp_path):
    run = pvae.fit(Experiment.from_dict(TABLE), run_dir=tmp_path, progress=False)
    train = run.data.train
    assert train.x.shape == (1000, 65)
    assert train.data.shape == (1000, 1, 8, 8)
    assert torch.equal(train.x[:, -1].long(), train.y)
    index = torch.arange(7)
    batch = train.draw(index)
    assert torch.equal(batch[:, -1], train.x[:7, -1])
    assert not torch.equal(batch, train.draw(index))  # dynamic binarisation
    again = Run.load(run.path)
    assert again.data.test.x.shape == (447, 65)
    assert surgery(again.pair, again.data.test.x).n == 447
    longer = pvae.resume(again, "train.epochs=3", allow_changes=True, progress=False)
    assert longer.status["epoch"] == 3


def test_labels_are_needed_and_must_fit(tmp_path):
    x, y = torch.rand(50, 4).round(), torch.randint(0, 12, (50,))
    experiment = Experiment.from_dict(TABLE)
    with pytest.raises(DataError, match=r"expected labels 0 \.\. 9; got .*Set the covariate's codes to"):
        pvae.fit(experiment, data=Dataset.from_tensors(x, y), run_dir=tmp_path, progress=False)
    with pytest.raises(DataError, match="expected labels, on which the model is conditioned; got none"):
        pvae.fit(experiment, data=Dataset.from_tensors(x), run_dir=tmp_path, progress=False)


BAD = {
    "unknown": ({"covariates": {}}, r"latents\.z\.given: expected names among .*; got \"y\""),
    "taken": ({"covariates": {"z": {"codes": 3}}}, "covariates: expected names that no latent has"),
    "reserved": ({"covariates": {"x": {"codes": 3}}}, r"covariates: expected names in lower case"),
    "two": ({"covariates": {"y": {"codes": 3}, "w": {"codes": 3}}}, "covariates.w: expected a covariate that"),
    "forms": ({"covariates": {"y": {"codes": 3, "dim": 1}}}, "one of codes .* got codes and dim"),
    "of": ({"covariates": {"y": {"dim": 1}}}, "of, the column or array that has the dim; got none"),
    "ordinal": ({"covariates": {"y": {"dim": 1, "of": "y", "ordinal": True}}}, "ordinal with codes or levels"),
    "spline": (
        {"latents": {"z": {"dim": 2, "given": ["y"], "prior": {"kind": "spline_coupling"}}}},
        "reads y, such as",
    ),
    "one code": ({"covariates": {"y": {"codes": 1}}}, r"covariates\.y\.codes: expected greater than 1"),
    "no latent": ({"decoder": {"given": ["y"]}}, r"decoder\.given: expected at least one latent"),
    "guided": (
        {"latents": {"z": {"dim": 2, "prior": "vamp", "posterior": {"kind": "normal", "given": ["x", "y"]}}}},
        r"latents\.z\.posterior\.given: expected \['x'\] alone",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case):
    changes, message = BAD[case]
    with pytest.raises(DeclarationError, match=message):
        Experiment.from_dict({**TABLE, **changes})


def test_a_model_without_rows_asks_for_its_label():
    with pytest.raises(DeclarationError, match="expected rows with y"):
        declared().model()


# ---------------------------------------------------------------------- what was found by looking twice


def test_labels_outside_the_codes_are_refused_everywhere(tmp_path):
    pair, (x, _) = declared(), rows()
    wrong = x.clone()
    wrong[5, -1] = 7
    with pytest.raises(DataError, match=r"y: expected integers 0 \.\. 2 in its column of x; got 7"):
        surgery(pair, wrong)
    data = Dataset.from_tensors(x[:, :6], x[:, 6].long()).conditioned({"y": Entry(codes=3)})
    with pytest.raises(DataError, match=r"expected labels 0 \.\. 1; got 0 \.\. 2"):
        data.conditioned({"y": Entry(codes=2)})
    assert torch.equal(data.conditioned({}).train.x, data.train.data)
    plain = {**TABLE, "latents": {"z": {"dim": 2}}, "decoder": {**NETWORK, "likelihood": {"kind": "bernoulli"}}}
    del plain["covariates"]
    run = pvae.fit(Experiment.from_dict(plain), "train.epochs=1", data=data, run_dir=tmp_path, progress=False)
    assert run.data.train.x.shape[1] == 6


def test_a_label_of_one_row_leaves_the_errors_known():
    pair, (x, _) = declared(), rows(20)
    x[:, -1] = torch.tensor([0.0] * 19 + [1.0])
    found = surgery(pair, x)
    assert found.kl.standard_error > 0
    assert found.log_n.value == pytest.approx(19 / 20 * torch.tensor(19.0).log().item())


def test_bounds_of_some_groups_are_bounds_of_all():
    pair = declared()
    x, _ = rows(100)
    x[:, -1] = (torch.arange(100) >= 20).float()
    for data in (x, torch.cat([x[:, :-1], 1 - x[:, -1:]], 1)):
        found = surgery(pair, data, components=25, samples=2)
        assert found.mutual_information.kind == "upper_bound"
        assert found.mutual_information_lower.kind == "lower_bound"
        assert found.mutual_information_lower.value <= found.mutual_information.value
        assert found.marginal_kl.kind == "lower_bound"
        assert found.marginal_kl_upper.value >= found.marginal_kl.value
        assert found.kl.value == pytest.approx(
            found.mutual_information_lower.value + found.marginal_kl_upper.value, abs=1e-9
        )


def test_prior_draws_follow_the_labels_of_the_data(tmp_path):
    run = pvae.fit(Experiment.from_dict(TABLE), "train.epochs=1", run_dir=tmp_path, progress=False)
    with torch.no_grad():
        head = run.pair.model.priors["z"].network.head
        head.weight.mul_(100)
    drawn = run.posterior(draws=300).groups["prior"]["z"].values[0]
    some = [row[None].expand(400, -1) for row in run.data.test.x[:60]]
    means = [float(run.pair.simulate(x).nodes["z"]["value"].detach().mean()) for x in some]
    assert max(means) - min(means) > 1
    assert abs(float(drawn.mean()) - sum(means) / len(means)) < 0.5 * (max(means) - min(means))


def test_bracket_simulates_rows_with_their_labels():
    found = bracket(declared(), rows(12)[0], rows=12, temperatures=3, chains=2)
    assert found.x.shape == (12, 7)


def test_a_covariate_that_nothing_reads_is_refused():
    table = {**TABLE, "latents": {"z": {"dim": 2}}, "decoder": {**NETWORK, "likelihood": {"kind": "bernoulli"}}}
    with pytest.raises(DeclarationError, match=r"covariates\.y: expected a covariate that a prior, a posterior or"):
        Experiment.from_dict(table)


# ---------------------------------------------------------------------- several covariates

LINEAR: dict[str, Any] = {
    "name": "linear",
    "latents": {"z": {"dim": 2, "posterior": {"kind": "normal"}}},
    "encoder": {"kind": "shared", "network": {"kind": "mlp", "hidden": []}},
    "decoder": {
        "network": {"kind": "mlp", "hidden": []},
        "likelihood": {"kind": "normal", "scale": "fixed", "value": 0.5},
    },
}


def linear(covariates: dict[str, Any], **latent: Any) -> Pair:
    table = copy.deepcopy(LINEAR) | {"covariates": covariates}
    table["decoder"]["given"] = ["z", *covariates]
    table["latents"]["z"] |= latent
    return Experiment.from_dict(table).build((4,))


def test_two_labels_are_their_joint_code():
    two = linear({"a": {"codes": 2}, "b": {"codes": 3}})
    one = linear({"y": {"codes": 6}})
    weight = two.model.decoder.network.head.weight.detach()
    z, a, b = weight.split([2, 2, 3], 1)
    joint = (a[:, :, None] + b[:, None, :]).flatten(1)
    one.load_state_dict({**two.state_dict(), "model.decoder.network.head.weight": torch.cat([z, joint], 1)})
    x, labels = torch.randn(60, 4), torch.stack([torch.arange(60) % 2, torch.arange(60) % 3], 1)
    both = torch.cat([x, labels.float()], 1)
    code = torch.cat([x, (labels[:, :1] * 3 + labels[:, 1:]).float()], 1)
    assert torch.equal(two.groups(both), one.groups(code))
    found, want = surgery(two, both, seed=3), surgery(one, code, seed=3)
    for name in ("elbo", "kl", "mutual_information", "marginal_kl"):
        assert getattr(found, name).value == pytest.approx(getattr(want, name).value, rel=1e-5)
    assert "within each of 6 groups" in " ".join(found.notes)


def test_covariates_change_nothing_where_nothing_is_given_them():
    pair = linear({"a": {"codes": 3}, "age": {"dim": 1, "of": "age"}})
    x = torch.randn(50, 4)
    beside = torch.cat([(torch.arange(50) % 3)[:, None].float(), torch.randn(50, 1)], 1)
    rows, shuffled = (torch.cat([x, beside[order]], 1) for order in (torch.arange(50), torch.randperm(50)))
    z = torch.randn(50, 2)
    one, other = (pair.model_trace(part, {"z": z}) for part in (rows, shuffled))
    assert torch.equal(one.nodes["z"]["fn"].log_prob(z), other.nodes["z"]["fn"].log_prob(z))
    assert not torch.equal(one.nodes["x"]["fn"].log_prob(x), other.nodes["x"]["fn"].log_prob(x))
    torch.testing.assert_close(encode(pair, rows, mean=True).latents["z"].loc, encode(pair, shuffled).latents["z"].loc)


def test_a_prior_given_a_number_has_no_marginal_kl_and_says_why():
    """The decoder alone reading a number leaves the surgery whole: x and the number are the data."""
    of = {"age": {"dim": 1, "of": "age"}}
    rows = torch.cat([torch.randn(80, 4), torch.linspace(-1, 1, 80)[:, None]], 1)
    read = surgery(linear(of), rows)
    assert read.marginal_kl is not None
    assert read.mutual_information.value + read.marginal_kl.value == pytest.approx(read.kl.value, abs=1e-6)
    assert "age: real numbers, which rows do not share" in " ".join(read.notes)
    given = surgery(linear(of, given=["age"], prior={"kind": "conditional_normal"}), rows)
    assert given.marginal_kl is None
    assert given.population is None
    assert "z: the prior differs from row to row" in " ".join(given.notes)
    many = linear({"y": {"codes": 200}}, given=["y"], prior={"kind": "conditional_normal"})
    found = surgery(many, torch.cat([torch.randn(150, 4), torch.arange(150.0)[:, None]], 1))
    assert found.marginal_kl is None


CONDITIONAL_FLOWS = ("realnvp", "maf", "iaf", "spline_autoregressive", "neural_autoregressive")


@pytest.mark.fast("iaf", "maf", "realnvp")
@pytest.mark.parametrize("kind", CONDITIONAL_FLOWS)
def test_a_flow_given_parents_has_a_density_for_each(kind):
    torch.manual_seed(0)
    pair = linear({"y": {"codes": 2}}, given=["y"], prior={"kind": kind, "layers": 2, "hidden": [8]}).double()
    module = pair.model.priors["z"]
    shake(module, 0.1)
    grid = torch.linspace(-12, 12, 481).double()
    cells = torch.cartesian_prod(grid, grid)
    with torch.no_grad():
        density = [module({"y": y}).log_prob(cells).exp() for y in torch.eye(2).double()]
        for y, p in zip(torch.eye(2).double(), density, strict=True):
            mass = float(p.sum()) * 0.05**2
            assert mass == pytest.approx(1, abs=0.003)
            drawn = module({"y": y.expand(500, 2)}).sample()
            mean = (p[:, None] * cells).sum(0) * 0.05**2 / mass
            spread = ((p[:, None] * (cells - mean) ** 2).sum(0) * 0.05**2 / mass).sqrt()
            assert float(((drawn.mean(0) - mean) / spread).abs().max()) < 4.5 / 500**0.5
            assert float((drawn.std(0) / spread - 1).abs().max()) < 0.3
    assert float((density[0] - density[1]).abs().sum()) * 0.05**2 > 0.01  # the context is read
    require_trainable(pair, torch.cat([torch.randn(20, 4), torch.arange(20)[:, None] % 2], 1).double())


def test_a_flow_reads_a_latent_and_a_covariate():
    table = copy.deepcopy(LINEAR) | {"covariates": {"y": {"codes": 2}}, "encoder": {"kind": "per_latent"}}
    latent = {"dim": 2, "given": ["z2", "y"], "prior": {"kind": "maf", "hidden": [8]}}
    table["latents"] = {"z2": {"dim": 2}, "z1": {**latent, "posterior": {"kind": "normal", "given": ["x", "z2"]}}}
    pair = Experiment.from_dict(table).build((4,))
    rows = torch.cat([torch.randn(30, 4), torch.arange(30)[:, None] % 2], 1)
    require_trainable(pair, rows)
    assert pair.terms(rows, particles=3).reconstruction.shape == (3, 30)
    assert sample(pair, 5, given={"y": 1}).latents["z1"].shape == (5, 2)
