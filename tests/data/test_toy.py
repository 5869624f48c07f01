"""Densities in the plane: every density x every law, and the exact log densities against their draws and integrals."""

import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

import pvae
from pvae.analysis import surgery
from pvae.analysis.decompose.result import Surgery
from pvae.data import Toy, load
from pvae.data.rows.prepare import Floats
from pvae.data.sources import toys
from pvae.data.sources.toys import DensityName
from pvae.errors import DeclarationError
from tests.data import toy_densities
from tests.data.writers import refused

PARTS = {"moons": 2, "rings": 3, "pinwheel": 5, "checkerboard": 8, "eight_gaussians": 8, "spiral": 2}
CASES = [(name, noise) for name in toy_densities.CLOSED for noise in (None, 0.35)]

every_density = pytest.mark.parametrize("name", toys.DENSITIES)
every_exact = pytest.mark.parametrize(("name", "noise"), CASES)


def draws(name: str, n: int, noise: float | None = None) -> tuple[Floats, np.ndarray]:
    density = toys.DENSITIES[name]
    return density.draw(np.random.default_rng(1), n, density.noise if noise is None else noise)


def midpoints(reach: float, cells: int) -> tuple[Floats, float]:
    """Centres of the cells of a grid over [-reach, reach]^2, and the area of a cell."""
    axis = (np.arange(cells) + 0.5) * (2 * reach / cells) - reach
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2), (2 * reach / cells) ** 2


def test_the_tables_are_complete():
    assert set(toys.DENSITIES) == set(get_args(DensityName)) == set(PARTS)


@every_density
def test_draws_are_centred_and_of_a_scale(name):
    x, y = draws(name, 20_000)
    assert x.shape == (20_000, 2)
    assert y.shape == (20_000,)
    assert np.all(np.abs(x.mean(0)) < 5 * x.std(0) / 20_000**0.5)
    assert np.all((x.std(0) > 0.9) & (x.std(0) < 2))
    assert np.abs(x).max() < 6
    counts = np.bincount(y)
    assert len(counts) == PARTS[name]
    assert np.all(np.abs(counts / 20_000 - 1 / PARTS[name]) < 0.02)


@every_density
def test_splits_are_disjoint_and_labelled(name):
    data = load(Toy(density=name, rows=500))
    assert data.source == "toy"
    assert data.notes == ()
    assert [tuple(split.x.shape) for split in data.splits] == [(500, 2), (50, 2), (50, 2)]
    assert all(split.x.dtype == torch.float32 for split in data.splits)
    assert len(torch.cat([split.x for split in data.splits]).unique(dim=0)) == 600
    assert data.train.y is not None
    assert int(data.train.y.max()) + 1 == PARTS[name]
    assert data.label_names is None or len(data.label_names) == PARTS[name]


@every_density
def test_the_declaration_alone_makes_the_data(name):
    one = load(Toy(density=name, rows=50), seed=0).fingerprint
    assert load(Toy(density=name, rows=50), seed=7).fingerprint == one
    assert load(Toy(density=name, rows=50, data_seed=1)).fingerprint != one
    assert load(Toy(density=name, rows=50, noise=0.4)).fingerprint != one
    drawn = Toy(density=name, rows=50, data_seed="experiment")
    assert load(drawn, seed=0).fingerprint == one != load(drawn, seed=7).fingerprint


def test_labels_name_the_part():
    x, y = draws("eight_gaussians", 2000)
    assert toys.COMPASS[2] == "north"
    np.testing.assert_allclose(x[y == 2].mean(0), [0, 2], atol=0.1)
    x, y = draws("rings", 2000)
    for ring, radius in enumerate(toys.RADII):
        assert np.abs(np.hypot(*x[y == ring].T) - radius).max() < 0.5
    x, y = draws("moons", 2000)
    assert x[y == 0, 1].mean() > 0.5 > -0.5 > x[y == 1, 1].mean()
    x, y = draws("checkerboard", 2000)
    assert np.all(np.abs(x - toys.SQUARES[y]) <= toys.SIDE / 2)


# Exact densities


@every_exact
def test_the_density_integrates_to_one(name, noise):
    grid, area = midpoints(9, 300)  # an edge of the checkerboard is one of the grid
    assert np.exp(toy_densities.log_density(name, grid, noise)).sum() * area == pytest.approx(1, abs=1e-6)


@every_exact
def test_draws_lie_as_the_density_says(name, noise):
    # Chi-squared of the counts over cells of 1 with 20 draws or more; a new seed fails once in ten thousand.
    x, _ = draws(name, 100_000, noise)
    counts = np.histogram2d(x[:, 0], x[:, 1], bins=18, range=[[-9, 9]] * 2)[0].ravel()
    grid, area = midpoints(9, 18 * 30)
    mass = np.exp(toy_densities.log_density(name, grid, noise)) * area
    expected = 100_000 * mass.reshape(18, 30, 18, 30).sum((1, 3)).ravel()
    assert counts[expected < 1e-6].sum() == 0
    kept = expected > 20
    found = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert abs(found - kept.sum()) < 4 * math.sqrt(2 * kept.sum())


@every_exact
def test_minus_mean_log_density_is_the_entropy(name, noise):
    surprise = -toy_densities.log_density(name, draws(name, 50_000, noise)[0], noise)
    assert abs(surprise.mean() - toy_densities.entropy(name, noise)) <= 4 * surprise.std() / 50_000**0.5 + 1e-12


def test_entropies_that_are_known():
    assert toy_densities.entropy("checkerboard") == math.log(18)
    apart = math.log(8) + math.log(2 * math.pi * math.e * 0.1**2)  # eight normals that do not touch
    assert toy_densities.entropy("eight_gaussians", 0.1) == pytest.approx(apart, abs=1e-9)
    assert toy_densities.entropy("eight_gaussians") < math.log(8) + math.log(2 * math.pi * math.e * 0.2**2)
    assert math.log(18) < toy_densities.entropy("checkerboard", 0.1) < math.log(18) + 0.3


def test_far_away_the_density_is_finite_where_it_has_tails():
    far = np.array([[40.0, -30.0], [0.0, 0.0]])
    for name in ("rings", "pinwheel", "eight_gaussians"):
        assert np.isfinite(toy_densities.log_density(name, far)).all()
    assert np.isneginf(toy_densities.log_density("checkerboard", far)[0])


def test_float32_rows_of_a_checkerboard_stay_on_it():
    data = load(Toy(density="checkerboard", rows=20_000))
    assert np.all(toy_densities.log_density("checkerboard", data.train.x.double().numpy()) > -3)


# Declarations


def declared(
    hidden: int = 8, likelihood: Any = "normal", prior: Any = "standard_normal", train: Any = None, **data: object
) -> pvae.Experiment:
    network = {"network": {"kind": "mlp", "hidden": [hidden]}}
    table = {
        "data": {"source": "toy", "rows": 200, **data},
        "latents": {"z": {"dim": 2, "prior": prior}},
        "encoder": network,
        "decoder": {**network, "likelihood": likelihood},
        "train": {"epochs": 1, "engine": "eager", **(train or {})},
    }
    return pvae.Experiment.from_dict(table)


def test_an_unknown_density_is_refused_with_the_near_name():
    with pytest.raises(DeclarationError, match=r"data.density: expected .moons., .*; got .moon. .did you mean .moo"):
        declared(density="moon")
    refused(r"data.density: expected 'moons', .*; got 3", declared, density=3, error=DeclarationError)


@pytest.mark.parametrize("change", [{"rows": 0}, {"noise": -0.1}, {"data_seed": "own"}, {"data_seed": -1}])
def test_broken_declarations(change):
    refused(f"data.{next(iter(change))}", declared, **change, error=DeclarationError)


def test_there_is_no_largest_level():
    refused("expected data.largest", load, Toy(scale="unit"))


@every_density
def test_a_vae_fits(name, tmp_path: Path):
    run = pvae.fit(declared(density=name), run_dir=tmp_path / "run", device="cpu", progress=False)
    assert math.isfinite(run.metrics["elbo"].iloc[-1])


# ---------------------------------------------------------------------- priors


LEARNED: dict[str, dict[str, Any]] = {
    "mixture": {"components": 30},
    "vamp": {"components": 30},
    "exemplar": {"components": 200},
    "realnvp": {},
    "maf": {},
    "spline_coupling": {"layers": 2},
}


def plane(folder: Path, prior: str) -> pvae.Run:
    """A VAE of eight normals in the plane, with a narrow decoder, so that the prior must hold the shape."""
    narrow = {"kind": "normal", "scale": "fixed", "value": 0.3}
    kind = {"kind": prior, **LEARNED.get(prior, {})}
    train = {"epochs": 20, "batch_size": 100, "schedule": {"kind": "cosine"}, "optimizer": {"kind": "adam", "lr": 1e-2}}
    experiment = declared(64, narrow, kind, train, density="eight_gaussians", rows=2000)
    return pvae.fit(experiment, run_dir=folder, device="cpu", progress=False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Surgery:
    """The surgery of a VAE of the plane whose prior is N(0, I)."""
    run = plane(tmp_path_factory.mktemp("plain"), "standard_normal")
    return surgery(run.pair, run.data.test.x, samples=5)


@pytest.mark.fast("realnvp", "vamp")
@pytest.mark.parametrize("prior", LEARNED)
def test_a_prior_that_learns_wins_in_the_plane(prior: str, plain: Surgery, tmp_path: Path) -> None:
    run = plane(tmp_path, prior)
    found = surgery(run.pair, run.data.test.x, samples=5)
    assert found.elbo.value > plain.elbo.value + 0.25
    assert found.marginal_kl is not None
    assert plain.marginal_kl is not None
    assert found.marginal_kl.value < plain.marginal_kl.value - 0.15
    if prior == "vamp":  # pseudo-inputs went where data are, none beyond, and no two to the same place
        model: Any = run.pair.model
        inputs = model.priors["z"].pseudo_inputs.detach()
        assert run.data.train.x.abs().max() > 2
        assert 1.5 < inputs.abs().max() < 4
        assert torch.cdist(inputs, inputs).fill_diagonal_(torch.inf).min() > 1e-3


def test_rows_too_large_for_memory_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS 57."""
    monkeypatch.setattr("pvae.util.memory.total_memory", lambda: 2**32)
    refused("data.rows = 20,000,000.* which need 3.22 GiB. Lower data.rows", Toy(rows=20_000_000).read, None, 0)
