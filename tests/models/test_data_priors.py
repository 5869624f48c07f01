"""Priors made of training data, `exemplar` and `aggregated`: which components, when, and what they cost in honesty."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="attr-defined, operator, union-attr, index"

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import pvae
from pvae.analysis import surgery
from pvae.data import Dataset, load
from pvae.data.sources.collections import Digits
from pvae.errors import DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.pair.pair import Pair
from pvae.runs.run import Run
from pvae.training.evaluation import evaluate

NETWORK = {"network": {"kind": "mlp", "hidden": [16]}}
KINDS: dict[str, dict[str, Any]] = {
    "aggregated": {"kind": "aggregated"},
    "aggregated, loo": {"kind": "aggregated", "leave_one_out": True},
    "aggregated, some": {"kind": "aggregated", "components": 9},
    "exemplar": {"kind": "exemplar", "components": 9},
    "exemplar, all": {"kind": "exemplar", "components": 500},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def table(kind: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": "made",
        "data": {"source": "digits", "binarize": "dynamic"},
        "latents": {"z": {"dim": 2, "prior": KINDS[kind]}},
        "encoder": NETWORK,
        "decoder": {**NETWORK, "likelihood": {"kind": "bernoulli"}},
        "train": {"epochs": 2, "batch_size": 300, "engine": "eager"},
        **changes,
    }


def rows(n: int = 40) -> Tensor:
    return (torch.rand(n, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float()


def built(kind: str, x: Tensor) -> Pair:
    return Experiment.from_dict(table(kind)).build((6,)).attend(x)


def prior(pair: Pair) -> Any:
    return pair.model.priors["z"]({})


def brute(pair: Pair, z: Tensor, x: Tensor, left_out: Tensor | None = None) -> Tensor:
    """log of the mean of the components at rows `x`, in float64, one by one."""
    module = pair.model.priors["z"]
    q = pair.guide.posterior("z", x)
    scale = getattr(module, "log_scale", None)
    spread = q.base_dist.scale if scale is None else scale.exp().expand_as(q.mean)
    parts = torch.distributions.Normal(q.mean.double(), spread.double())
    scores = parts.log_prob(z[:, None].double()).sum(-1)
    keep = torch.ones_like(scores, dtype=torch.bool) if left_out is None else ~left_out
    return (scores + keep.double().log()).logsumexp(1) - keep.double().sum(1).log()


@every_kind
def test_evaluation_takes_all_training_rows(kind):
    x = rows()
    pair = built(kind, x).eval()
    z = torch.randn(50, 2)
    with torch.no_grad():
        torch.testing.assert_close(prior(pair).log_prob(z).double(), brute(pair, z, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["aggregated, loo", "exemplar, all"])
def test_training_leaves_the_own_component_out(kind):
    x = rows()
    pair = built(kind, x).train()
    index = torch.tensor([3, 17, 39])
    pair.model.priors["z"].start(index)
    z = torch.randn(3, 2)
    own = torch.zeros(3, 40, dtype=torch.bool)
    own[torch.arange(3), index] = True
    expected = brute(pair, z, x, own)
    torch.testing.assert_close(prior(pair).log_prob(z).double(), expected, rtol=1e-5, atol=1e-5)
    particles = prior(pair).log_prob(torch.stack([z, z + 1]))
    torch.testing.assert_close(particles[0].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(particles[1].double(), brute(pair, z + 1, x, own), rtol=1e-5, atol=1e-5)


def test_a_subset_is_drawn_anew_at_every_step():
    pair = built("exemplar", rows()).train()
    z = torch.zeros(1, 2)
    scores = {float(prior(pair).log_prob(z).detach()) for _ in range(20)}
    assert len(scores) == 20
    assert len(prior(pair).members) == 9


@every_kind
def test_the_gradient_reaches_the_encoder_through_the_prior(kind):
    pair = built(kind, rows()).train()
    prior(pair).log_prob(torch.randn(5, 2)).sum().backward()
    for name, parameter in pair.guide.named_parameters():
        if "exemplar" in kind and parameter.grad is None:
            continue  # scales of the posterior are no part of an exemplar
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@every_kind
def test_encodings_are_never_stale(kind):
    x = rows()
    pair = built(kind, x)
    before = evaluate(pair, x, 0)
    assert evaluate(pair, x, 0) == before
    pair.eval()
    with torch.no_grad():
        z = torch.randn(5, 2)
        kept = prior(pair).log_prob(z)
        for parameter in pair.guide.parameters():
            parameter.add_(0.3)
        moved = prior(pair).log_prob(z)
        assert not torch.equal(kept, moved)
        other = copy.deepcopy(pair)
        for parameter in other.guide.parameters():
            parameter.sub_(0.3)
        torch.testing.assert_close(prior(other).log_prob(z), kept, rtol=1e-4, atol=1e-4)
        assert torch.equal(prior(pair).log_prob(z), moved)
    assert pair.attend(x[:7]) is pair
    with torch.no_grad():
        assert not torch.equal(prior(pair).log_prob(z), moved)


def test_no_prior_without_data():
    pair = Experiment.from_dict(table("aggregated")).build((6,))
    assert pair.made_of_data()
    with pytest.raises(DeclarationError, match=r"latents\.z\.prior: expected the training data.*pair\.attend"):
        pair(rows())
    assert not Experiment.from_dict(table("aggregated", latents={"z": {"dim": 2}})).build((6,)).made_of_data()


def test_q_agg_as_prior_wins_the_marginal_kl_on_train_and_not_on_test():
    # Many parameters, few rows: the posteriors become narrow, and q_agg of train is a bad prior elsewhere.
    plain = table("aggregated", latents={"z": {"dim": 2}}, data={"source": "digits", "binarize": "threshold"})
    first = Experiment.from_dict(plain).build((1, 8, 8))
    data = pvae.data.load(Experiment.from_dict(plain).data)
    optimizer = torch.optim.Adam(first.parameters(), 3e-3)
    x, test = data.train.x[:200], data.test.x[:200]
    for _ in range(600):
        optimizer.zero_grad()
        (-first(x).mean()).backward()
        optimizer.step()
    second = Experiment.from_dict({**plain, "latents": {"z": {"dim": 2, "prior": "aggregated"}}}).build((1, 8, 8))
    second.load_state_dict(first.state_dict())
    second.attend(x)
    before, after = surgery(first.double(), x, samples=3), surgery(second.double(), x, samples=3)
    assert after.elbo.value - before.elbo.value == pytest.approx(before.marginal_kl.value, abs=1e-6)
    assert after.marginal_kl.value == pytest.approx(0, abs=1e-6)
    before, after = surgery(first, test, samples=3), surgery(second, test, samples=3)
    gained = after.elbo.value - before.elbo.value
    assert gained < before.marginal_kl.value - 0.1


@pytest.mark.parametrize("kind", ["aggregated, some", "exemplar"])
def test_a_fit_is_read_again_and_resumed_bit_for_bit(kind, tmp_path):
    whole = pvae.fit(Experiment.from_dict(table(kind)), run_dir=tmp_path, progress=False)
    again = Run.load(whole.path)
    x = whole.data.test.x
    assert evaluate(again.pair, x, 0) == evaluate(whole.pair, x, 0)
    short = table(kind, train={"epochs": 1, "batch_size": 300, "engine": "eager"})
    half = pvae.fit(Experiment.from_dict(short), run_dir=tmp_path / "half", progress=False)
    longer = pvae.resume(half, "train.epochs=2", allow_changes=True, progress=False)
    for name, value in whole.pair.state_dict().items():
        assert torch.equal(value, longer.pair.state_dict()[name]), name
    assert not any("rows" in name or "index" in name for name in whole.pair.state_dict())


@pytest.mark.slow
def test_a_compiled_step_leaves_the_same_rows_out(tmp_path):
    runs = [
        pvae.fit(
            Experiment.from_dict(table("exemplar, all", train={"epochs": 2, "batch_size": 300, "engine": engine})),
            run_dir=tmp_path / engine, progress=False,
        )
        for engine in ("eager", "compiled")
    ]  # fmt: skip
    assert [run.status["engine"] for run in runs] == ["eager", "compiled"]
    one, two = (run.metrics.query("split == 'train'")["elbo"].to_numpy() for run in runs)
    assert one == pytest.approx(two, rel=1e-4)


def test_two_exemplars_are_never_both_left_out():
    latents = {"z": {"dim": 2, "prior": {"kind": "exemplar", "components": 2}}}
    pair = Experiment.from_dict(table("exemplar", latents=latents)).build((6,)).attend(rows(4)).train()
    for _ in range(50):
        pair.model.priors["z"].start(torch.arange(4))
        assert pair(rows(4)).isfinite().all()


def test_what_was_announced_ends_with_training():
    pair = built("exemplar, all", rows()).train()
    pair.model.priors["z"].start(torch.arange(5))
    pair.eval()
    pair.train()
    assert pair(rows(7)).shape == (7,)


@pytest.mark.parametrize("posterior", ["flow", "delta"])
@pytest.mark.parametrize("kind", ["aggregated", "exemplar"])
def test_mixtures_are_made_of_normal_posteriors(kind, posterior):
    latents = {"z": {"dim": 2, "prior": KINDS[kind], "posterior": posterior}}
    with pytest.raises(DeclarationError, match=r"latents\.z\.posterior: expected normal or full_rank_normal"):
        Experiment.from_dict(table(kind, latents=latents)).build((6,))


def test_a_point_has_no_weights_in_the_export(tmp_path):
    latents = {"z": {"dim": 2, "posterior": {"kind": "delta"}}}
    run = pvae.fit(Experiment.from_dict(table("exemplar", latents=latents)), run_dir=tmp_path, progress=False)
    groups = run.posterior(draws=5, rows=20).groups
    assert not {"log_evidence", "ess", "khat", "elbo"} & set(groups["diagnostics"].variables)
    assert "log_weight" not in groups["sample_stats"].variables


def test_leave_one_out_keeps_the_prior_from_learning_the_training_rows_by_heart(tmp_path):
    digits = load(Digits(binarize="dynamic"))
    data = Dataset.from_tensors(digits.train.x[:60], validation=digits.validation.x[:50], test=digits.test.x[:200])
    wide = {"network": {"kind": "mlp", "hidden": [64]}}
    changes = {
        "data": {"source": "tensor"},
        "encoder": wide,
        "decoder": {**wide, "likelihood": {"kind": "bernoulli"}},
        "train": {
            "epochs": 150,
            "batch_size": 30,
            "engine": "eager",
            "keep": "last",
            "optimizer": {"kind": "adam", "lr": 3e-3},
        },
    }
    gaps, marginal = [], []
    for kind in ("aggregated", "aggregated, loo"):
        latents = {"z": {"dim": 4, "prior": KINDS[kind]}}
        experiment = Experiment.from_dict(table(kind, **{**changes, "latents": latents}))
        run = pvae.fit(experiment, data=data, run_dir=tmp_path, device="cpu", progress=False)
        train, test = (surgery(run.pair, split.x, samples=5) for split in (data.train, data.test))
        assert train.marginal_kl.value == pytest.approx(0, abs=1e-4)  # of its training rows it is q_agg either way
        gaps.append(train.elbo.value - test.elbo.value)
        marginal.append(test.marginal_kl.value)
    assert gaps[1] < 0.5 * gaps[0]
    assert marginal[1] < 0.5 * marginal[0]
