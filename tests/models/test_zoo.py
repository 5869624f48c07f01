"""Every entry of the zoo, made tiny: fitted, read again, resumed, taken apart, reported, opened in a browser."""

# A figure that may be None fails its test if it is.
# mypy: disable-error-code="union-attr"

import json
import math

import pytest
import torch

import pvae
from pvae.analysis import evidence, surgery
from pvae.errors import DataError
from pvae.experiment import zoo
from pvae.experiment.experiment import Experiment
from pvae.experiment.readback import formulas
from pvae.runs.run import Run
from tests.browser import opened
from tests.zoo_runs import declared, fit, tiny_report, tiny_run

CONTINUOUS = {
    "vae", "vae_normal", "autoencoder", "em_mixture", "kmeans", "flow", "flow_dequantised", "flow_variational",
    "mixture_prior", "vamp", "exemplar", "aggregated", "realnvp_prior", "maf_prior", "spline_prior", "iaf_posterior",
    "hvae", "ladder", "bidirectional", "conditional", "cells",
}  # fmt: skip
DISCRETE = {
    "categorical_vae", "bernoulli_vae", "gumbel_softmax_vae", "straight_through_vae", "relaxed_flow_prior", "vq_vae",
    "vq_vae_2", "fsq", "rvq", "dvae", "pixelcnn_prior", "transformer_prior", "semi_supervised",
}  # fmt: skip
POINTS = {"autoencoder", "flow"}
"""Systems whose codes are deterministic."""
LIKELIHOOD_FREE = {"gan"}
"""Systems that can be sampled and have no likelihood."""
every_system = pytest.mark.parametrize("name", zoo.names())


def test_the_zoo_is_complete():
    assert set(zoo.names()) == CONTINUOUS | DISCRETE | LIKELIHOOD_FREE


@every_system
def test_it_is_fitted_and_read_again(name):
    assert Experiment.from_toml(declared(name).to_toml()) == declared(name)
    run = tiny_run(name)
    text = formulas(run.experiment)
    assert text["model"].startswith("p(x, ")
    assert text["guide"].startswith("q(") or run.pair.layout.enumerated
    again = Run.load(run.path)
    for key, value in run.pair.state_dict().items():
        assert torch.equal(value, again.pair.state_dict()[key]), key
    total = run.pair.structure.total
    assert math.isfinite(float(str(run.status[total]))) if name not in LIKELIHOOD_FREE else "elbo" not in run.status
    assert run.pair.check(run.data.train.x[:3]) == []


@every_system
def test_it_is_resumed_bit_for_bit(name, tmp_path):
    whole, half = tiny_run(name), fit(name, tmp_path, 1)
    if half.files.manifest.get("parent"):  # the second stage has the same epochs; the first is compared
        whole, half = (Run.load(r.files.manifest["parent"]["run"], root=r.path.parent.parent) for r in (whole, half))
    longer = pvae.resume(half, "train.epochs=2", allow_changes=True, progress=False)
    if longer.files.manifest.get("parent"):
        longer = Run.load(half.path)
    for key, value in whole.pair.state_dict().items():
        assert torch.equal(value, longer.pair.state_dict()[key]), key


@every_system
def test_it_is_taken_apart_and_bounded(name):
    run = tiny_run(name)
    x = run.data.test.x
    if name in LIKELIHOOD_FREE:
        for analysis in (surgery, evidence):
            with pytest.raises(DataError, match="without a likelihood"):
                analysis(run.pair, x, samples=2)
        return
    found = surgery(run.pair, x, samples=2)
    shared = 0.0 if found.global_kl is None else found.global_kl.value
    assert (found.elbo is None) == (name == "autoencoder")  # whose total is a log joint density at a point
    assert found.total.value == pytest.approx(found.reconstruction.value - found.kl.value - shared, abs=1e-6)
    assert -0.5 < found.mutual_information.value <= found.log_n.value + 1e-9
    if name in POINTS:
        assert found.marginal_kl is None
        assert found.mutual_information.value == pytest.approx(math.log(len(x)))
        assert "deterministic code" in " ".join(found.notes)
    else:
        assert found.kl.value == pytest.approx(found.mutual_information.value + found.marginal_kl.value, abs=1e-6)
    if name == "autoencoder":
        with pytest.raises(DataError, match="a point for z"):
            evidence(run.pair, x, samples=20)
        return
    bound = evidence(run.pair, x[:20], samples=50)
    assert bound.iwae.value >= bound.elbo.value - 1e-6
    if name in {"flow", "em_mixture", "kmeans"}:
        assert bound.exact.value == pytest.approx(bound.iwae.value, abs=1e-4)


@pytest.mark.fast(
    "vae",
    "vq_vae_2",
    "dvae",
    "hvae",
    "cells",
    "flow",
    "semi_supervised",
    "maf_prior",
    "categorical_vae",
    "gan",
    "em_mixture",
    "autoencoder",
)
@every_system
def test_it_is_reported(name, chromium):
    """In a browser at two widths, light, dark and on paper: no error, no request, all images, nothing too wide."""
    path = tiny_report(name)
    seen = opened(chromium, path)
    assert seen.faults == ()
    assert seen.images >= 1
    assert 2 <= seen.pages <= 60
    reasons = json.loads((path.parent / "report.json").read_text())["missing"]
    assert all("expected" in reason for reason in reasons.values()), reasons  # refused on purpose, no bug in hiding
    text = path.read_text()
    assert "nan" not in text.lower().split("base64")[0]
    assert name not in LIKELIHOOD_FREE or "elbo" not in text.lower()
