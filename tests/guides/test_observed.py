"""Latents whose values some rows have: ELBOs by hand, Pyro's, closed forms; hidden, missing and unknown labels."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, union-attr, no-untyped-def"

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from scipy import stats
from sklearn.metrics import mean_squared_error, r2_score, root_mean_squared_error, silhouette_score
from torch import Tensor

import pvae
from pvae import analysis
from pvae.analysis.decompose.result import SURGERY_TERMS
from pvae.analysis.pages.sections.examination import Examination
from pvae.analysis.pages.sections.latents import calibration_error, labels
from pvae.analysis.samples.probe import groups
from pvae.analysis.samples.quality import space_of
from pvae.data import Dataset
from pvae.data.split import Split, chosen_labels
from pvae.distributions.observed import PartlyObserved, observed
from pvae.errors import DataError, DeclarationError
from pvae.experiment.experiment import Experiment, reading
from pvae.objectives.elbo import TraceELBO, TraceMeanFieldELBO
from pvae.pair.pair import Pair
from pvae.pair.running import run
from pvae.training.evaluation import FIGURES, classified, figures_of, predicted
from tests.cli_runner import run_cli, run_cli_json
from tests.runs_shared import assert_resumes_exactly, fit, tiny

ROWS, PIXELS, NAN = 7, 5, torch.nan
CODE = {"codes": 3, "observed": "label"}
PLAIN = {"network": {"kind": "mlp", "hidden": [4]}}
LABELS = {"known": [0, 2, 1, 1, 0, 2, 2], "unknown": [NAN] * ROWS, "mixed": [0, NAN, 1, NAN, NAN, 2, NAN]}
every_batch = pytest.mark.parametrize("batch", LABELS)


def m2(x: int = PIXELS, **changes: Any) -> Experiment:
    """M2: p(y) p(z) p(x | y, z) with q(y | x) q(z | x, y)."""
    latents = {"y": CODE, "z": {"dim": 2, "posterior": {"kind": "normal", "given": ["x", "y"]}}}
    decoder = {**PLAIN, "given": ["y", "z"]}
    return Experiment.from_dict({"latents": latents, "encoder": PLAIN, "decoder": decoder, **changes})


def discrete(**changes: Any) -> Experiment:
    """M2 with a discrete z, of which everything is an exact sum."""
    z = {"codes": 2, "posterior": {"kind": "categorical", "given": ["x", "y"]}}
    return m2(latents={"y": CODE, "z": z}, **changes)


def built(e: Experiment, shape: tuple[int, ...] = (PIXELS,)) -> Pair:
    """The pair in float64, with priors that are not uniform."""
    pair = e.build(shape).double()
    with torch.no_grad():
        for p in pair.parameters():
            p += 0.3 * torch.randn_like(p)
    return pair


def rows_of(labels: list[float], pixels: int = PIXELS) -> Tensor:
    x = torch.bernoulli(torch.full((len(labels), pixels), 0.5)).double()
    return torch.cat([x, torch.tensor(labels).double()[:, None]], 1)


def by_hand(pair: Pair, rows: Tensor, guide: Any) -> Tensor:
    """log p(x, y, z) - log q of every row, weighed over y by the sum's definition, at z `(K, n, d)` of a trace."""
    x, label = rows[:, :-1], rows[:, -1]
    features = pair.guide.encoder(x)
    q_y = pair.guide.posteriors["y"]({"x": features}, {}).logits.log_softmax(-1)
    p_y = pair.model.prior("y", {}).logits.log_softmax(-1).expand(ROWS, 3)
    z = guide.nodes["z"]["value"]
    found = []
    for y in range(3):
        hot = torch.eye(3).double()[y].expand(ROWS, 3)
        q = pair.guide.posteriors["z"]({"x": features, "y": hot}, {}).base_dist
        log_q = -0.5 * ((z[y] - q.loc) / q.scale) ** 2 - q.scale.log() - 0.5 * math.log(2 * math.pi)
        log_p = -0.5 * z[y] ** 2 - 0.5 * math.log(2 * math.pi)
        probs = pair.model.decoder.network({"y": hot, "z": z[y]}).sigmoid()
        log_x = torch.where(x == 1, probs, 1 - probs).log().sum(1)
        found.append(log_x + (log_p - log_q).sum(1) + p_y[:, y])
    joint = torch.stack(found, 1)
    unknown = (q_y.exp() * (joint - q_y)).sum(1)
    known = joint.gather(1, label.nan_to_num().long()[:, None]).squeeze(1)
    return torch.where(label.isnan(), unknown, known)


@every_batch
def test_the_elbo_of_some_labels_is_the_sum_by_hand(batch):
    pair, rows = built(m2()).train(), rows_of(LABELS[batch])
    pyro.set_rng_seed(1)
    guide, _ = run(pair, rows, pair.layout, expected=True)
    pyro.set_rng_seed(1)
    terms = pair.terms(rows, expected=True)
    ours = terms.reconstruction - terms.kl["y"] - terms.kl["z"]
    torch.testing.assert_close(ours, by_hand(pair, rows, guide), rtol=1e-9, atol=1e-9)


@every_batch
def test_the_elbo_of_some_labels_is_that_of_pyro_for_a_hand_written_m2(batch):
    """Rows with a label go through `obs=` of model and no site of the guide, as in Pyro's own tutorial on M2."""
    pair, rows = built(discrete()).train(), rows_of(LABELS[batch])
    model, guide = pair.model, pair.guide

    def p(x, y=None):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=model.prior("y", {}).logits), obs=y)
            z = pyro.sample("z", dist.Categorical(logits=model.prior("z", {}).logits))
            seen = {"y": torch.eye(3).double()[y], "z": torch.eye(2).double()[z]}
            pyro.sample("x", dist.Bernoulli(logits=model.decoder.network(seen)).to_event(1), obs=x)

    def q(x, y=None):
        with pyro.plate("data", len(x)):
            features = guide.encoder(x)
            if y is None:
                logits = guide.posteriors["y"]({"x": features}, {}).logits
                y = pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            logits = guide.posteriors["z"]({"x": features, "y": torch.eye(3).double()[y]}, {}).logits
            pyro.sample("z", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})

    elbo, x, label = TraceEnum_ELBO(max_plate_nesting=1), rows[:, :-1], rows[:, -1]
    unknown = label.isnan()
    parts = [(x[unknown],)] * bool(unknown.any()) + [(x[~unknown], label[~unknown].long())] * bool((~unknown).any())
    theirs = sum(elbo.differentiable_loss(p, q, *part) for part in parts) / ROWS
    ours = TraceELBO().loss(TraceELBO().terms(pair, rows), torch.ones(()).double())
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    learned = list(pair.parameters())
    slopes = [torch.autograd.grad(loss, learned, allow_unused=True, materialize_grads=True) for loss in (ours, theirs)]
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_all_labels_known_is_the_model_given_the_label():
    covariate = {"covariates": {"y": {"codes": 3}}, "latents": {"z": discrete().latents["z"]}}
    given = Experiment.from_dict({**covariate, "encoder": PLAIN, "decoder": {**PLAIN, "given": ["y", "z"]}})
    pair, other, rows = built(discrete()), built(given), rows_of(LABELS["known"])
    other.load_state_dict(pair.state_dict(), strict=False)
    ours, theirs = pair.terms(rows, expected=True), other.terms(rows, expected=True)
    torch.testing.assert_close(ours.reconstruction, theirs.reconstruction)
    torch.testing.assert_close(ours.kl["z"], theirs.kl["z"])
    log_p = pair.model.prior("y", {}).logits.log_softmax(-1)
    torch.testing.assert_close(ours.kl["y"], -log_p[rows[:, -1].long()])


def test_no_label_known_is_the_clustering_model_unchanged():
    latents = {"y": {"codes": 3, "posterior": {"kind": "categorical"}}, "z": discrete().latents["z"]}
    pair, other, rows = built(discrete()), built(discrete().with_changes({"latents": latents})), rows_of([NAN] * ROWS)
    other.load_state_dict(pair.state_dict())
    for mode in (True, False):  # in training every row is looked at
        ours, theirs = pair.train(mode).terms(rows, expected=True), other.terms(rows[:, :-1], expected=True)
        torch.testing.assert_close(ours.kl, theirs.kl, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.reconstruction, theirs.reconstruction, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------- a number that some rows have


def test_a_number_that_some_rows_have_against_a_linear_gaussian():
    """p(a) = N(0, 1), p(x | a) = N(w a + b, s^2), with the exact q(a | x): log p(x, a) and log p(x) in closed form."""
    linear = {"network": {"kind": "mlp", "hidden": []}}
    likelihood = {"kind": "normal", "scale": "fixed", "value": 1.0}
    e = Experiment.from_dict({
        "latents": {"a": {"dim": 1, "observed": "age", "posterior": linear | {"kind": "normal"}}},
        "encoder": linear, "decoder": {**linear, "likelihood": likelihood},
    })  # fmt: skip
    pair, s = built(e, (3,)).train(), 1.0
    decode = pair.model.decoder.network
    with torch.no_grad():
        b, w = (
            t.squeeze(0) for t in (decode({"a": torch.zeros(1, 1).double()}), decode({"a": torch.ones(1, 1).double()}))
        )
        w = w - b
        precision = 1 + (w**2).sum() / s**2
        x = torch.randn(ROWS, 3).double()
        values = torch.tensor(LABELS["mixed"]).double()
        rows = torch.cat([x, values[:, None]], 1)
        mean = ((x - b) @ w) / s**2 / precision

        class Exact(torch.nn.Module):
            def forward(self, _inputs, _seen=None):
                return dist.Normal(mean[:, None], precision.rsqrt()).to_event(1)

    pair.guide.posteriors["a"] = Exact()
    log_p = -0.5 * values**2 - 0.5 * math.log(2 * math.pi)
    joint = log_p - (0.5 * ((x - w * values[:, None] - b) / s) ** 2 + math.log(s * math.sqrt(2 * math.pi))).sum(1)
    marginal = dist.MultivariateNormal(b, s**2 * torch.eye(3).double() + w[:, None] * w).log_prob(x)
    want = torch.where(values.isnan(), marginal, joint)
    for objective in (TraceELBO(), TraceMeanFieldELBO()):
        terms = objective.terms(pair, rows)
        if objective.kind == "trace_elbo":
            torch.testing.assert_close(terms.reconstruction - terms.kl["a"], want, rtol=1e-9, atol=1e-9)
        seen = torch.where(values.isnan(), torch.nan, terms.kl["a"])
        torch.testing.assert_close(seen, -log_p, equal_nan=True)


def test_a_distribution_of_known_and_unknown_vectors():
    base = dist.Normal(torch.zeros(3, 2), 1.0).to_event(1)
    fn, log_q = observed(base, torch.tensor([[1.0, 2.0], [NAN, NAN], [0.0, 0.0]]))
    assert isinstance(fn, PartlyObserved)
    wide = fn.expand((4, 3))
    draw = wide.rsample()
    assert draw.shape == (4, 3, 2)
    assert (draw[:, 0] == torch.tensor([1.0, 2.0])).all()
    assert (draw[:, 1] != 0).all()
    assert (wide.log_prob(draw)[:, [0, 2]] == 0).all()
    torch.testing.assert_close(wide.log_prob(draw)[:, 1], base.log_prob(draw)[:, 1])
    assert fn.mean[0].tolist() == [1.0, 2.0]
    torch.testing.assert_close(log_q, torch.tensor([-math.log(2 * math.pi) - 2.5, 0.0, -math.log(2 * math.pi)]))


# ---------------------------------------------------------------------- the classification term


def test_the_gradient_of_the_classification_term_is_that_of_cross_entropy():
    """On labelled rows the ELBO does not reach q(y | x), whose gradient is that of the weighted cross-entropy."""
    rows = rows_of(LABELS["mixed"])
    pair = built(m2(objective={"classification": 7.0})).train()
    known = ~rows[:, -1].isnan()
    labelled, head = rows[known], list(pair.guide.posteriors["y"].parameters())
    loss = TraceELBO().loss(TraceELBO().terms(pair, labelled), torch.ones(()).double())
    logits = pair.guide.posteriors["y"]({"x": pair.guide.encoder(labelled[:, :-1])}, {}).logits
    want = 7.0 * torch.nn.functional.cross_entropy(logits, labelled[:, -1].long())
    for one, other in zip(torch.autograd.grad(loss, head), torch.autograd.grad(want, head), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    penalty = pair.terms(rows, expected=True).penalties["y/classification"]
    assert (penalty[~known] == 0).all()
    assert (penalty[known] > 0).all()


# ---------------------------------------------------------------------- fits: which labels, which rows, the same bits

LABELLED = {
    "data": {"source": "digits", "binarize": "dynamic", "labelled": 40},
    "latents": {
        "y": {"codes": 10, "observed": "label"},
        "z": {"dim": 3, "posterior": {"kind": "normal", "given": ["x", "y"]}},
    },
    "decoder": {**PLAIN, "given": ["y", "z"]},
    "objective": {"classification": 2.0},
}


def labelled(**train: Any) -> Experiment:
    e = tiny(**train).model_dump(exclude_none=True, exclude_unset=True)
    return Experiment.from_dict({**e, **LABELLED, "train": {**e["train"], "labelled": 0.25}})


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> pvae.Run:
    return fit(labelled(), tmp_path_factory.mktemp("labelled"))


def test_a_fit_of_some_labels_resumes_bit_for_bit(tmp_path: Path, fitted: pvae.Run):
    assert_resumes_exactly(labelled(), tmp_path, 15, whole=fitted)


def test_a_fit_sees_the_declared_labels_and_analyses_none(fitted: pvae.Run):
    run, accuracy = fitted, [row["accuracy/y"] for row in fitted.files.metrics_rows() if "accuracy/y" in row]
    assert len(accuracy) == 3
    assert all(0 <= share <= 1 for share in accuracy)
    for split in run.data.splits:
        assert split.rows[:, -1].isnan().all()
    seen = run.experiment.known(run.data.train)["y"].squeeze(1)
    assert run.data.train.y is not None
    values, counts = seen[~seen.isnan()].unique(return_counts=True)
    assert values.tolist() == list(range(10))
    assert counts.tolist() == [4] * 10
    assert (seen == run.data.train.y)[~seen.isnan()].all()
    codes = run.encode(run.data.test, mean=True)
    assert run.data.test.y is not None
    assert run.data.validation.y is not None
    assert codes.latents["y"].probs.shape == (len(run.data.test), 10)
    right = run.encode(run.data.validation, mean=True)["y"] == run.data.validation.y
    assert accuracy[-1] == pytest.approx(float(right.double().mean()))


def test_evidence_is_of_x_or_of_x_and_y_but_never_of_some_of_each(fitted: pvae.Run):
    rows = fitted.labelled(fitted.data.test)[:20]
    hidden = rows.clone()
    hidden[:, -1] = torch.nan
    joint, marginal = (analysis.evidence(fitted.pair, x, 200).log_p for x in (rows, hidden))
    total = []  # log p(x) = log sum_y p(x, y)
    for y in range(10):
        rows[:, -1] = y
        total.append(analysis.evidence(fitted.pair, rows, 200).log_p)
    torch.testing.assert_close(torch.stack(total).logsumexp(0), marginal, rtol=0, atol=0.1)
    assert (joint < marginal + 0.1).all()
    for of in (analysis.ais, analysis.gap, analysis.score, analysis.prior_evidence):
        with pytest.raises(DataError, match="expected rows without the value of y"):
            of(fitted.pair, rows)
    rows[::2, -1] = torch.nan
    with pytest.raises(DataError, match="all hold a value of y, or none; got 10 of 20"):
        analysis.evidence(fitted.pair, rows)


def test_the_surgery_of_some_labels_is_that_of_each_part_in_proportion():
    pair, rows = built(discrete()).eval(), rows_of(LABELS["mixed"])
    found, known = analysis.surgery(pair, rows, 100), ~rows[:, -1].isnan()
    terms = pair.terms(rows, expected=True)  # exact sums
    each = (terms.reconstruction - terms.kl["y"] - terms.kl["z"]).detach()
    assert abs(found.elbo.value - float(each.mean())) < 5 * found.elbo.standard_error  # 6e-7
    assert list(found.parts) == ["y unknown", "y known"]
    for mine, part in zip((~known, known), found.parts.values(), strict=True):
        assert part.n == int(mine.sum())
        assert abs(part.elbo.value - float(each[mine].mean())) < 5 * part.elbo.standard_error
        assert part.elbo.value == pytest.approx(part.reconstruction.value - part.kl.value, abs=1e-9)
    for term in SURGERY_TERMS:
        parts = [(getattr(part, term).value, part.n) for part in found.parts.values()]
        assert getattr(found, term).value == pytest.approx(sum(v * n for v, n in parts) / ROWS, abs=1e-9)


def test_no_leave_one_out_where_one_row_alone_has_a_code():
    pair, rows = built(discrete()).eval(), rows_of([0.0, 0.0, 0.0, 1.0])
    assert analysis.surgery(pair, rows).leave_one_out is None
    twice = analysis.surgery(pair, torch.cat([rows, rows])).leave_one_out
    assert twice is not None
    assert 0 < twice.value < 10


def test_no_error_advises_what_is_refused():
    pair, rows = built(discrete()).eval(), rows_of(LABELS["unknown"])
    for of in (analysis.gap, analysis.ais):
        with pytest.raises(DataError, match="Use evidence"):
            of(pair, rows)
    assert analysis.evidence(pair, rows, 10).n == ROWS


def test_a_command_takes_rows_with_and_without_a_label_apart(fitted: pvae.Run):
    out = run_cli_json("surgery", str(fitted.path), "--split", "train", "--labelled", "--rows", "300")
    kinds = {name: part["n"] for name, part in out["parts"].items()}
    assert sum(kinds.values()) == 300
    assert 0 < kinds["y known"] <= 40


def test_codes_are_probed_on_rows_whose_labels_the_guide_does_not_see(fitted: pvae.Run):
    found = analysis.probe(fitted)
    assert found.asked == len(fitted.data.test)
    assert 0 <= found["y"].linear.value <= 1


def test_labels_of_new_rows_are_typed(fitted: pvae.Run):
    x = np.random.RandomState(0).randint(0, 17, (4, 8, 8)).astype(np.uint8)
    assert fitted.labelled(fitted.rows((x, np.array([0, -1, 9, 3])))).shape == (3, 65)
    with pytest.raises(DataError, match="expected labels 0 .. 9; got 0 .. 11"):
        fitted.labelled(fitted.rows((x, np.array([0, 1, 11, 3]))))
    with pytest.raises(DataError, match="expected labels"):
        fitted.labelled(fitted.rows(x))


def test_labelled_rows_are_chosen_by_class_and_seed_alone():
    y = torch.tensor([0] * 50 + [1] * 3 + [2] * 20 + [-1] * 10)
    for count, want in ((6, [2, 2, 2]), (30, [14, 3, 13]), (73, [50, 3, 20])):
        mask = chosen_labels(y, count, seed=1)
        assert [int((y[mask] == k).sum()) for k in range(3)] == want
        assert mask.sum() == sum(want)
    again, other = (chosen_labels(y, 6, seed) for seed in (1, 2))
    assert torch.equal(again, chosen_labels(y, 6, 1))
    assert not torch.equal(again, other)
    with pytest.raises(DataError, match="data.labelled: expected at most 73, .*; got 74"):
        chosen_labels(y, 74, 1)


def test_labelled_rows_are_those_with_the_values_that_a_latent_reads():
    """The data's own label is of other classes than the side value that the latent is."""
    rows = torch.arange(60)
    kind = (rows % 10 == 0).float().masked_fill(rows % 2 == 1, NAN)  # known in half of the rows, rarely 1
    split = Split("train", torch.zeros(60, 2), rows % 3, side={"kind": kind})
    latents = {"y": {"codes": 2, "observed": "kind"}, "z": {"dim": 2}}
    e = m2(2, data={"source": "tensor", "labelled": 10}, latents=latents)
    seen = e.known(split)["y"].squeeze(1)
    assert [int((seen == k).sum()) for k in (0, 1)] == [5, 5]


# ---------------------------------------------------------------------- labels that are missing at the source

X = np.random.RandomState(1).randint(0, 2, (40, PIXELS)).astype(np.float32)
CODES = np.arange(40) % 3
GONE = np.arange(40) % 4 == 0
MISSING: dict[str, Any] = {
    "minus one": np.where(GONE, -1, CODES),
    "NaN": torch.tensor(np.where(GONE, np.nan, CODES)),
    "empty": np.where(GONE, "", np.array(["ant", "bee", "cow"])[CODES]),
    "unknown": np.where(GONE, "unknown", np.array(["ant", "bee", "zebra"])[CODES]),
}


@pytest.mark.parametrize("how", MISSING)
def test_missing_labels_are_unknown(how):
    with reading(m2()):
        data = Dataset.of((torch.tensor(X), MISSING[how]))
    found = torch.cat([m2().known(split)["y"] for split in data.splits]).squeeze(1)
    numbers = np.concatenate([split.numbers for split in data.splits])
    assert torch.equal(found.isnan(), torch.tensor(GONE[numbers]))
    assert found[~found.isnan()].tolist() == CODES[numbers][~GONE[numbers]].tolist()
    if how in ("empty", "unknown"):
        assert len(data.label_names) == 3
        assert not {"", "unknown"} & {*data.label_names}


def test_an_empty_cell_is_a_missing_label_where_a_latent_observes_it(tmp_path: Path):
    words = np.array(["ant", "bee", "cow"], object)[CODES]
    frame = pandas.DataFrame({"a": X[:, 0], "b": X[:, 1], "kind": pandas.Series(words).mask(GONE)})
    frame.to_csv(tmp_path / "t.csv", index=False)
    columns = {"a": "binary", "b": "binary"}
    data = {"source": "csv", "path": str(tmp_path / "t.csv"), "label": "kind", "columns": columns}
    decoder = {**PLAIN, "given": ["y", "z"], "likelihood": "columns"}
    short = {"epochs": 1, "batch_size": 20}
    run = fit(m2(data=data, decoder=decoder, train=short), tmp_path)
    assert sum(int(v["y"].isnan().sum()) for v in map(run.experiment.known, run.data.splits)) == GONE.sum()
    assert pvae.Run.load(run.path).data.label_names == ("ant", "bee", "cow")
    out, _ = run_cli("show", str(run.path / "spec.toml"))
    assert "guide.posteriors.y" in out
    assert space_of(run).names == ("ant", "bee", "cow")
    held = run.data.validation
    assert held.labels is not None
    found = analysis.probe(run, "validation")
    assert (found.trained, found.asked) == (int((run.data.train.y >= 0).sum()), int((held.y >= 0).sum()))
    train, have = run.data.train, run.data.train.y >= 0
    z = analysis.encode(run, train.rows, mean=True).latents["z"].value[have].double()
    apart = groups(run, "train").separated["label"].value  # rows without a label are in no group
    assert apart == pytest.approx(silhouette_score(z.numpy(), train.y[have].numpy()), abs=1e-9)
    assert {*analysis.surgery(run.pair, held.rows, labels=held.labels).classes} == {*held.y[held.y >= 0].tolist()}
    with pytest.raises(DataError, match="expected a label; got none"):
        fit(tiny().with_changes({"data": data, "decoder": {**PLAIN, "likelihood": "columns"}}), tmp_path)


def test_a_number_is_read_of_a_column_and_seen_where_it_is_known(tmp_path: Path):
    """A latent that is the column `age` of a table, in rows where that is not empty, standardised by those of train."""
    age = np.arange(40) / 10
    frame = pandas.DataFrame({"a": X[:, 0], "b": X[:, 1], "age": np.where(GONE, np.nan, age)})
    frame.to_csv(tmp_path / "t.csv", index=False)
    data = {"source": "csv", "path": str(tmp_path / "t.csv"), "columns": {"a": "binary", "b": "binary"}}
    latents = {"t": {"dim": 1, "observed": "age"}, "z": {"dim": 2}}
    e = Experiment.from_dict({
        "data": data, "latents": latents, "encoder": PLAIN, "objective": {"classification": 1.0},
        "decoder": {**PLAIN, "given": ["t", "z"], "likelihood": "columns"},
        "train": {"epochs": 2, "batch_size": 20, "keep": "last"},
    })  # fmt: skip
    run = fit(e, tmp_path)
    seen = np.where(GONE, np.nan, age)
    of_train = seen[run.data.train.numbers]
    scaled = (seen - np.nanmean(of_train)) / np.nanstd(of_train)
    for split in run.data.splits:
        want = torch.tensor(scaled[split.numbers]).float()
        torch.testing.assert_close(run.experiment.known(split)["t"].squeeze(1), want, equal_nan=True)
        assert split.rows[:, -1].isnan().all()
    assert_predicts_age(run, seen)
    rows = run.labelled(run.data.train)
    assert len(rows) == int((~GONE[run.data.train.numbers]).sum())
    assert torch.equal(run.pair.guide_trace(rows).nodes["t"]["value"], rows[:, -1:])
    assert analysis.evidence(run.pair, rows, 20).iwae.value > -math.inf


def assert_predicts_age(run: pvae.Run, seen: Any) -> None:
    """Metrics and report say how well the age is predicted from x, in its units, as scikit-learn and SciPy do."""
    of_train, held = seen[run.data.train.numbers], run.data.validation
    shift, unit, y = np.nanmean(of_train), np.nanstd(of_train), seen[held.numbers]
    with torch.no_grad():
        q = run.pair.guide_trace(held.rows).nodes["t"]["fn"].base_dist
    there = ~np.isnan(y)
    y, loc, scale = y[there], q.loc.numpy()[there, 0] * unit + shift, q.scale.numpy()[there, 0] * unit
    inside = {width: np.abs(stats.norm.cdf(y, loc, scale) - 0.5) <= width / 200 for width in (50, 90)}
    want = {"rmse": mean_squared_error(y, loc) ** 0.5, "r2": r2_score(y, loc)}
    want |= {"log_density": stats.norm.logpdf(y, loc, scale).mean()}
    want |= {f"coverage_{width}": hits.mean() for width, hits in inside.items()}
    row = next(row for row in reversed(run.files.metrics_rows()) if "rmse/t" in row)
    found = labels(Examination(run, split="validation"))
    (told,) = next(part["numbers"] for part in found.parts if isinstance(part, dict) and "numbers" in part)
    assert (told["training_labels"], told["rows"]) == ((~np.isnan(of_train)).sum(), len(y))
    for name, value in want.items():
        assert told[name].value == pytest.approx(value, abs=1e-4), name
        assert told[name].kind == "estimate"
        assert row[f"{name}/t"] == pytest.approx(value, abs=1e-4), name


def test_figures_of_a_closed_form_posterior_are_those_of_its_definition():
    """y ~ N(0, 1), x | y ~ N(y, 1/4): y | x ~ N(.8 x, .2); errors are the spread over data sets of this size."""
    y = torch.randn(1000, 300, 2).double()
    mean = 0.8 * (y + 0.5 * torch.randn_like(y))
    q = dist.Normal(mean, 0.2**0.5)
    every = [figures_of(1, a, b, c, d.sum(1)) for a, b, c, d in zip(y, mean, q.cdf(y), q.log_prob(y), strict=True)]
    first = every[0]
    assert first["r2"][0] == pytest.approx(r2_score(y[0], mean[0]))
    assert first["rmse"][0] == pytest.approx(root_mean_squared_error(y[0], mean[0]))
    log_density = -math.log(2 * math.pi * math.e * 0.2)
    truth = {"rmse": 0.2**0.5, "r2": 0.8, "log_density": log_density, "coverage_50": 0.5, "coverage_90": 0.9}
    for name, value in truth.items():
        values, errors = torch.tensor([found[name][:2] for found in every]).T
        assert float(values.mean()) == pytest.approx(value, abs=0.003), name
        assert float(errors.mean()) == pytest.approx(float(values.std()), rel=0.1), name


def test_a_prediction_that_reads_other_latents_is_a_mixture_over_them():
    latents = {"c": {"codes": 2, "posterior": "categorical"}, "t": {"dim": 1, "observed": "age"}}
    latents["t"]["posterior"] = {"kind": "normal", "given": ["x", "c"]}
    e = Experiment.from_dict({"latents": latents, "encoder": PLAIN, "decoder": {**PLAIN, "given": ["c", "t"]}})
    pair, x = built(e).requires_grad_(False), torch.bernoulli(torch.full((9, PIXELS), 0.5))
    age = torch.randn(9)
    split = e.conditioned(Split("test", x, side={"age": age}))
    data = Dataset(split, split, split, (PIXELS,), "tensor", "none", "")
    found = predicted(e, pair, data, split, 1000)["t"]
    features = pair.guide.encoder(x.double())
    probs = pair.guide.posteriors["c"]({"x": features}, {}).probs
    both = [pair.guide.posteriors["t"]({"x": features, "c": c.expand(9, 2)}, {}) for c in torch.eye(2).double()]
    log_q = torch.stack([q.log_prob(age[:, None].double()) for q in both], 1)
    mean = (probs * torch.cat([q.mean for q in both], 1)).sum(1)
    assert found["log_density"][0] == pytest.approx(float((log_q + probs.log()).logsumexp(1).mean()), abs=0.03)
    assert found["rmse"][0] == pytest.approx(float((mean - age).square().mean().sqrt()), abs=0.03)
    assert found["log_density"][2] == "lower_bound"


def test_every_latent_that_some_rows_observe_is_in_the_report(tmp_path: Path):
    """A label, words beside x, and a number that no row of validation has."""
    latents = {"y": CODE, "kind": {"codes": 2, "observed": "kind"}, "t": {"dim": 1, "observed": "age"}}
    decoder = {**PLAIN, "given": [*latents]}
    splits = {"train": [0, 30], "validation": [30, 35], "test": [35, 40]}
    declared = m2(latents=latents, decoder=decoder, data={"source": "tensor", "splits": splits}, train={"epochs": 1})
    kind, age = np.where(GONE, np.nan, CODES == 1), np.where(np.arange(40) < 30, np.arange(40), np.nan)
    data = {"x": X, "y": MISSING["minus one"], "kind": kind, "age": age}
    run = pvae.fit(declared, run_dir=tmp_path, progress=False, data=data)
    found = labels(Examination(run, split="validation"))
    told: dict[str, Any] = {}
    for part in found.parts:
        told |= part if isinstance(part, dict) else {}
    assert [row["latent"] for row in told["labels"]] == ["y", "kind"]
    assert all(0 <= row["accuracy"].value <= 1 for row in told["labels"])
    assert told["numbers"] == [{"latent": "t", "training_labels": 30, "rows": 0, **dict.fromkeys(FIGURES)}]


# ---------------------------------------------------------------------- declarations

WRONG = {
    "bits": ({"y": {"bits": 3, "observed": "label"}}, {}, "latents.y: expected dim or codes, without a grid"),
    "exact": ({"y": {**CODE, "posterior": "exact"}}, {}, "latents.y.posterior: expected categorical"),
    "delta": ({"y": {"dim": 2, "observed": "a", "posterior": "delta"}}, {}, "latents.y.posterior: .* with a density"),
    "weight alone": ({"y": {"codes": 3}}, {"classification": 1.0}, "objective.classification: expected a latent"),
}


@pytest.mark.parametrize("table", ["data", "train"])
def test_labelled_rows_need_a_latent_that_observes_the_label(table):
    with pytest.raises(DeclarationError, match=f"{table}.labelled: expected a latent with observed = 'label'"):
        Experiment.load("vae", [f"{table}.labelled=1"])


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_observed_is_refused(case):
    latents, objective, said = WRONG[case]
    with pytest.raises(DeclarationError, match=said):
        Experiment.from_dict({"latents": latents, "objective": objective})


def test_values_beside_x_are_those_of_a_latent():
    label = Experiment.from_dict({"latents": {"a": {"dim": 1, "observed": "label"}}})
    found = label.known(Split("train", torch.zeros(3, PIXELS), torch.tensor([2, -1, 0])))["a"]
    torch.testing.assert_close(found, torch.tensor([[2.0], [NAN], [0.0]]), equal_nan=True)
    wide = Experiment.from_dict({"latents": {"a": {"dim": 2, "observed": "label"}}})
    with pytest.raises(DataError, match="expected 2 values of 'label' in each row; got 1"):
        wide.known(Split("train", torch.zeros(3, PIXELS), torch.tensor([2, -1, 0])))
    e = Experiment.from_dict({"latents": {"a": {"dim": 1, "observed": "age"}}})
    age = torch.tensor([1.0, NAN, 3.0])
    split = Split("train", torch.zeros(3, PIXELS), side={"age": age})
    rows = e.conditioned(split)
    assert rows.rows.shape == (3, PIXELS + 1)
    assert rows.rows[:, -1].isnan().all()
    torch.testing.assert_close(e.known(rows)["a"], age[:, None], equal_nan=True)
    few = e.with_overrides("data.labelled=1").known(rows)["a"]
    assert int((~few.isnan()).sum()) <= 1
    torch.testing.assert_close(split.side["age"], torch.tensor([1.0, NAN, 3.0]), equal_nan=True)
    with pytest.raises(DataError, match="expected values of 'age'"):
        e.known(Split("train", torch.zeros(3, PIXELS)))


def test_a_known_number_has_evidence_but_no_information():
    pair = Experiment.from_dict({"latents": {"a": {"dim": 1, "observed": "age"}, "z": {"dim": 2}}}).build((PIXELS,))
    rows = torch.cat([torch.ones(4, PIXELS), torch.arange(4.0)[:, None]], 1)
    assert analysis.evidence(pair, rows, 5).log_p.isfinite().all()
    with pytest.raises(DataError, match="expected rows without the value of a"):
        analysis.surgery(pair, rows)
    rows[:, -1] = NAN
    assert analysis.surgery(pair, rows).mutual_information is not None


# ---------------------------------------------------------------------- the report


def test_the_calibration_error_is_that_of_its_definition():
    probs, label = torch.rand(500, 4).softmax(1), torch.randint(4, (500,))
    confidence, guess = probs.max(1)
    want = 0.0
    for k in range(15):
        inside = (confidence >= k / 15) & (confidence < (k + 1) / 15)
        if inside.any():
            gap = (guess == label)[inside].double().mean() - confidence[inside].double().mean()
            want += float(inside.double().mean() * gap.abs())
    assert calibration_error(probs, label) == pytest.approx(want)


def test_the_report_says_what_is_hidden(fitted: pvae.Run):
    found = labels(Examination(fitted))
    assert found is not None
    (row,) = next(part for part in found.parts if isinstance(part, dict))["labels"]
    assert row["training_labels"] == 40
    codes = fitted.encode(fitted.data.test, mean=True)["y"]
    assert row["accuracy"].value == pytest.approx(float((codes == fitted.data.test.y).double().mean()))


def test_m2_is_stacked_on_the_codes_of_m1(tmp_path: Path):
    """M2 is fitted to the codes that M1 encodes, and both see the same labelled rows."""
    m1 = fit(tiny(epochs=1), tmp_path)
    codes = {split.name: (m1.encode(split, mean=True)["z"], split.y) for split in m1.data.splits}
    data = Dataset.from_tensors(*codes["train"], validation=codes["validation"], test=codes["test"])
    normal = "decoder.likelihood={kind='normal', scale='per_datum'}"
    run = fit("semi_supervised", tmp_path, normal, "data.binarize=none", "train.epochs=1", data=data)
    ((probs, label),) = classified(run.plan, run.pair, run.data.test).values()
    assert probs.shape == (len(label), 10)
    assert torch.equal(label, data.test.y)
    seen = run.experiment.known(run.data.train)["y"].squeeze(1)
    assert int((~seen.isnan()).sum()) == 50
    assert torch.equal(~seen.isnan(), chosen_labels(m1.data.train.y, 50, 0))


@pytest.mark.slow
def test_m2_of_the_zoo_uses_z(tmp_path: Path):
    """The KL of z is above a nat: y alone does not explain x, as it does where the weights start too small."""
    assert fit("semi_supervised", tmp_path).metrics["kl/z"].iloc[-1] > 1
