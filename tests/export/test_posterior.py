"""The posterior export: its groups, its file, ArviZ of either generation; faults 5, 37."""

import hashlib
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from hypothesis import given, strategies as st
from torch import Tensor, nn

from pvae import __version__
from pvae.analysis.aggregate.entry import quiet
from pvae.analysis.decompose.posterior_draws import draw
from pvae.analysis.export.datasets import GROUP_NAMES, PosteriorDraws
from pvae.analysis.export.sites import LONGEST_NAME, dims_of, safe_names
from pvae.data.dataset import Dataset
from pvae.errors import CheckpointError, DeclarationError, MissingExtraError, StorageError
from pvae.pair.layout import samples
from pvae.pair.pair import Pair
from pvae.runs.run import Run
from pvae.training.fit import fit
from pvae.util import seeds
from pvae.util.seeds import subset
from tests.cli_runner import run_cli
from tests.samples.models import Global, refused

ROOT = Path(__file__).parents[2]
DATASETS = ROOT / "analysis" / "export" / "datasets.py"
TINY = ("train.epochs=2", "encoder.network.hidden=[8]", "decoder.network.hidden=[8]", "train.engine=eager")
DRAWS, ROWS = 5, 30
AWKWARD = ("enc/z", "chain", "theta_dim")
THETA, CODES = "theta", 3


class Awkward(nn.Module):
    """A number, a matrix and a code of awkward names, one global vector; x is a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(4, 1 + 6 + CODES)
        self.decode = nn.Linear(1 + 6 + 1, 4)
        self.theta = nn.Parameter(torch.zeros(4))

    def model(self, x: Tensor) -> None:
        theta = pyro.sample(THETA, dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            number = pyro.sample(AWKWARD[0], dist.Normal(0.0, 1.0))
            matrix = pyro.sample(AWKWARD[1], dist.Laplace(torch.zeros(2, 3), 1.0).to_event(2))
            code = pyro.sample(AWKWARD[2], dist.Categorical(torch.ones(CODES)))
            h = torch.cat([number[:, None], matrix.flatten(1), code[:, None].float()], 1)
            pyro.sample("x", dist.Normal(self.decode(h) + theta, 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.sample(THETA, dist.Normal(self.theta, 0.1).to_event(1))
        h = self.encode(x)
        with pyro.plate("data", len(x)):
            pyro.sample(AWKWARD[0], dist.Normal(h[:, 0], 0.7))
            pyro.sample(AWKWARD[1], dist.Laplace(h[:, 1:7].reshape(-1, 2, 3), 0.3).to_event(2))
            pyro.sample(AWKWARD[2], dist.Categorical(logits=h[:, 7:]))


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    root = tmp_path_factory.mktemp("runs")
    runs: dict[str, Run] = {}

    def run(name: str) -> Run:
        if name not in runs:
            deeper = ["latents.z1.prior.network.hidden=[8]"] if name == "hvae" else []
            runs[name] = fit(name, *TINY, *deeper, run_dir=root, progress=False)
        return runs[name]

    return run


@pytest.fixture
def run(make: Callable[[str], Run]) -> Run:
    return make("vae")


@pytest.fixture
def small(run: Run) -> PosteriorDraws:
    return run.posterior(draws=DRAWS, rows=ROWS)


def hand_written(run: Run, module: Any, data: Dataset) -> Run:
    """Return the files of a run with another pair and other data."""
    again, pair = Run(run.files), Pair(model=module.model, guide=module.guide).adopt(data.train.x)
    again.__dict__.update(pair=pair, data=data)
    return again


@pytest.fixture(scope="module")
def awkward(make: Callable[[str], Run]) -> Run:
    """A run of a hand-written pair, untrained: its categorical has no pathwise gradient."""
    return hand_written(make("vae"), Awkward(), Dataset.from_tensors(torch.randn(60, 4)))


def assert_same(one: PosteriorDraws, two: PosteriorDraws) -> None:
    assert list(one.groups) == list(two.groups)
    for name in one.groups:
        xarray.testing.assert_identical(one[name], two[name])
        assert all(one[name][v].dtype == two[name][v].dtype for v in one[name].variables)


# ---------------------------------------------------------------------- groups


def test_every_group_has_explicit_dims_and_coordinates(run, small):
    assert tuple(small.groups) == GROUP_NAMES
    dims = {name: {v: tuple(d.dims) for v, d in group.data_vars.items()} for name, group in small.groups.items()}
    draws, x = ("chain", "draw"), ("x_dim_0", "x_dim_1", "x_dim_2")
    assert dims["posterior"] == {"z": (*draws, "datum", "z_dim")}
    assert dims["sample_stats"] == dict.fromkeys(("log_q", "log_p", "log_likelihood", "log_weight"), (*draws, "datum"))
    assert dims["guide"] == {"z_loc": ("datum", "z_dim"), "z_scale": ("datum", "z_dim")}
    per_row = dict.fromkeys(("elbo", "log_evidence", "ess", "khat"), ("datum",))
    assert dims["diagnostics"] == per_row | {"z_kl": ("datum", "z_dim")}
    assert dims["prior"] == {"z": (*draws, "z_dim")}
    assert dims["posterior_predictive"] == {"x": (*draws, "datum_predictive", *x)}
    assert dims["observed_data"] == {"x": ("datum_predictive", *x)}
    assert dims["constant_data"] == {"row": ("datum",), "label": ("datum",)}
    for group in small.groups.values():
        assert set(group.dims) <= set(group.coords)
    posterior = small["posterior"]
    assert posterior.sizes == {"chain": 1, "draw": DRAWS, "datum": ROWS, "z_dim": 16}
    assert posterior.z.dtype == np.float32
    assert posterior.datum.values.tolist() == subset(len(run.data.test), ROWS, 0).tolist()
    assert posterior.z_dim.values.tolist() == list(range(16))
    assert small["sample_stats"].log_weight.attrs == {"units": "nats"}
    assert small["sample_stats"].log_weight.dtype == np.float64


def test_attributes_name_the_library_and_the_run_and_no_time(run, small):
    told = {"inference_library": "pvae", "inference_library_version": __version__, "split": "test", "seed": 0}
    told |= {"run": "vae", "run_id": run.files.manifest["id"]}
    assert all(group.attrs == told for group in small.groups.values())


def test_data_are_the_rows_of_the_split(run, small):
    rows = small["posterior"].datum.values.tolist()
    assert np.array_equal(small["constant_data"].label, run.data.test.y[rows])
    assert np.array_equal(small["observed_data"].x, run.data.test.x[rows[:20]])
    assert np.array_equal(small["observed_data"].datum_predictive, rows[:20])
    assert set(np.unique(small["posterior_predictive"].x)) == {0.0, 1.0}


@pytest.mark.parametrize("name", ["vae", "hvae"])
def test_weights_are_those_of_the_elbo_on_the_same_draws(make, name):
    run = make(name)
    found, x = run.posterior(draws=3), run.data.test.x
    with quiet(run.pair, x, 0):
        drawn = []
        for number in range(3):
            seeds.set_noise(seeds.mix(0, seeds.ANALYSIS, 4 + number), x.device)
            drawn.append(draw(run.pair, x))
    elbo = [float((d.reconstruction - sum(z.log_q - z.log_p for z in d.latents.values())).mean()) for d in drawn]
    stats = found["sample_stats"]
    assert stats.log_weight.mean(("chain", "datum")).values == pytest.approx(elbo, abs=1e-12)
    assert found["diagnostics"].elbo.mean() == pytest.approx(np.mean(elbo), abs=1e-12)
    assert np.array_equal(stats.log_weight, stats.log_likelihood + stats.log_p - stats.log_q)
    for site, latent in drawn[1].latents.items():
        assert np.array_equal(found["posterior"][site][0, 1], latent.value.float())


def test_diagnostics_bound_one_another(run):
    found = run.posterior(draws=100, rows=20)["diagnostics"]
    weights = run.posterior(draws=100, rows=20)["sample_stats"].log_weight[0].values
    ratios = np.exp(weights - weights.max(0))
    assert (found.log_evidence >= found.elbo).all()
    assert found.ess.values == pytest.approx(ratios.sum(0) ** 2 / (ratios**2).sum(0))
    assert found.log_evidence.values == pytest.approx(np.log(ratios.mean(0)) + weights.max(0))
    assert np.isfinite(found.khat).all()


def test_guide_is_what_the_encoder_says_of_every_row(run, small):
    with torch.no_grad():
        fn = run.pair.guide_trace(run.data.test.x).nodes["z"]["fn"].base_dist
    guide = small["guide"]
    assert guide.sizes["datum"] == len(run.data.test)
    assert guide.z_loc.values == pytest.approx(fn.loc.numpy(), abs=1e-6)
    assert guide.z_scale.values == pytest.approx(fn.scale.numpy(), abs=1e-6)
    exact = torch.distributions.kl_divergence(fn, dist.Normal(0.0, 1.0))[small["posterior"].datum.values.tolist()]
    assert small["diagnostics"].z_kl.values == pytest.approx(exact.numpy(), abs=1e-5)


def test_two_levels(make):
    found = make("hvae").posterior(draws=DRAWS, rows=ROWS)
    assert set(found["posterior"].data_vars) == {"z1", "z2"}
    assert set(found["guide"].data_vars) == {"z2_loc", "z2_scale"}
    assert found["guide"].attrs["missing_z1"] == "its parameters read other latents"
    assert {"z1_kl", "z2_kl"} <= set(found["diagnostics"].data_vars)


def test_same_seed_same_numbers_and_nothing_is_moved(run, small):
    state, modes = torch.get_rng_state(), [m.training for m in run.pair.modules()]
    assert_same(small, run.posterior(draws=DRAWS, rows=ROWS))
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in run.pair.modules()]
    other = run.posterior(draws=DRAWS, rows=ROWS, seed=1)
    assert not np.array_equal(other["prior"].z, small["prior"].z)


def test_chunks_do_not_show_in_the_shape(run, monkeypatch):
    whole = run.posterior(draws=2)
    monkeypatch.setattr("pvae.analysis.export.posterior.ROWS_OF_A_BATCH", 100)
    pieces = run.posterior(draws=2)
    assert pieces["guide"].z_loc.values == pytest.approx(whole["guide"].z_loc.values, abs=1e-5)
    assert pieces["posterior"].z[0, 0, :100].values == pytest.approx(whole["posterior"].z[0, 0, :100].values, abs=1e-5)
    assert np.isfinite(pieces["sample_stats"].log_weight).all()


# ---------------------------------------------------------------------- awkward pairs


def test_awkward_names_are_kept_as_attributes(awkward):
    """FAULTS 37."""
    found = awkward.posterior(draws=DRAWS, split="train")
    posterior = found["posterior"]
    sites = {v.attrs["site"]: name for name, v in posterior.data_vars.items()}
    assert set(sites) == {*AWKWARD, THETA}
    assert sites["enc/z"] == "enc_z"
    assert sites["chain"].startswith("chain_")
    assert (sites["theta_dim"], sites["theta"] == "theta") == ("theta_dim", False)
    draws = ("chain", "draw")
    assert posterior[sites["enc/z"]].dims == (*draws, "datum")
    matrix = sites["chain"]
    assert posterior[matrix].dims == (*draws, "datum", f"{matrix}_dim_0", f"{matrix}_dim_1")
    assert posterior[sites["theta"]].dims == (*draws, f"{sites['theta']}_dim")
    assert posterior["theta_dim"].dtype == np.int64
    guide = found["guide"]
    assert guide["theta_dim_probs"].dims == ("datum", "theta_dim_code")
    assert guide["theta_dim_probs"].sum("theta_dim_code").values == pytest.approx(1.0, abs=1e-6)
    assert set(guide.data_vars) == {"enc_z_loc", "enc_z_scale", "theta_dim_probs"}
    assert guide.attrs[f"missing_{matrix}"].endswith("got Laplace")


def test_a_global_latent_is_one_for_all_rows_of_a_draw(awkward, monkeypatch):
    monkeypatch.setattr("pvae.analysis.export.posterior.ROWS_OF_A_BATCH", 7)
    found = awkward.posterior(draws=4, split="train")
    pair, x = awkward.pair, awkward.data.train.x
    names = {v.attrs["site"]: name for name, v in found["posterior"].data_vars.items()}
    values = {site: torch.from_numpy(found["posterior"][name].values[0, 2]) for site, name in names.items()}
    for site, node in samples(pair.guide_trace(x)).items():
        assert values[site].shape == node["value"].shape
    with torch.no_grad():
        model = samples(pair.model_trace(x, values))
        with pyro.poutine.condition(data=values):
            guide = samples(pair.guide_trace(x))
    stats = found["sample_stats"]
    assert model["x"]["fn"].log_prob(x).numpy() == pytest.approx(stats.log_likelihood[0, 2].values, abs=1e-4)
    log_q, log_p = ({z: nodes[z]["fn"].log_prob(v).detach() for z, v in values.items()} for nodes in (guide, model))
    ratio = {site: (log_q[site] - log_p[site]).numpy() for site in values}
    assert stats.global_log_ratio[0, 2] == pytest.approx(ratio[THETA], abs=1e-4)
    weight = stats.log_likelihood[0, 2] - sum(ratio[site] for site in AWKWARD) - ratio[THETA] / len(x)
    assert stats.log_weight[0, 2].values == pytest.approx(weight.values, abs=1e-4)
    assert "ess" not in found["diagnostics"]
    assert "got global theta" in found["diagnostics"].attrs["missing_khat"]
    assert set(found["prior"].data_vars) == set(names.values())
    assert len(np.unique(found["prior"][names[THETA]][0, :, 0])) == 4
    assert found["posterior_predictive"].x.shape == (1, 4, 20, 4)


def test_a_global_number_has_one_value_a_draw(run):
    found = hand_written(run, Global(), Dataset.from_tensors(torch.randn(60, 1))).posterior(draws=DRAWS, split="train")
    assert {name: v.shape for name, v in found["posterior"].items()} == {"z": (1, DRAWS, 48, 1), "w": (1, DRAWS)}


def test_a_pair_that_cannot_be_simulated_loses_groups_only(awkward, tmp_path, monkeypatch):
    def refuse(self: Pair, x: Tensor) -> None:
        raise NotImplementedError("no\x00 way")

    monkeypatch.setattr(Pair, "simulate", refuse)
    found = awkward.posterior(draws=DRAWS)
    assert not {"prior", "posterior_predictive"} & set(found.groups)
    assert found["posterior"].attrs["missing_prior"] == json.dumps("no\x00 way")
    assert_same(found, PosteriorDraws.load(found.save(tmp_path / "p.nc")))


class Mixture(nn.Module):
    """A code that the model sums out and the guide does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.randn(CODES, 4))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            code = pyro.sample("code", dist.Categorical(torch.ones(CODES)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(self.loc[code], 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Nothing to infer."""


def test_latents_that_the_model_sums_out_have_draws_and_no_weights(awkward, tmp_path):
    found = hand_written(awkward, Mixture(), awkward.data).posterior(draws=DRAWS, rows=4)
    assert found["posterior"].code.dims == ("chain", "draw", "datum")
    assert found["posterior"].code.dtype == np.int64
    assert set(found["sample_stats"].data_vars) == {"log_q", "log_p"}
    assert found["sample_stats"].attrs["missing_log_weight"] == "the model sums out code"
    assert set(found["diagnostics"].data_vars) == {"elbo", "code_kl"}
    assert found.summary().loc["code", "kl"] == pytest.approx(float(found["diagnostics"].code_kl.mean()), abs=1e-12)
    assert "missing_code" in found["guide"].attrs
    assert_same(found, PosteriorDraws.load(found.save(tmp_path / "p.nc")))
    assert found.to_arviz() is not None


class Grids(nn.Module):
    """A grid of codes whose prior reads bits, and the bits."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.prior, self.decode = nn.Linear(4, 2 * CODES + 2), nn.Linear(2, CODES), nn.Linear(2, 4)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            bits = pyro.sample("bits", dist.Bernoulli(torch.tensor([0.3, 0.8])).to_event(1))
            code = pyro.sample("code", dist.Categorical(logits=self.prior(bits)[:, None].expand(-1, 2, -1)).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(bits + code), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        h = self.encode(x)
        with pyro.plate("data", len(x)):
            pyro.sample("bits", dist.Bernoulli(logits=h[:, :2]).to_event(1))
            pyro.sample("code", dist.Categorical(logits=h[:, 2:].reshape(-1, 2, CODES)).to_event(1))


def test_kls_of_codes_and_bits_are_those_of_torch(awkward):
    module, kl = Grids(), torch.distributions.kl_divergence
    run = hand_written(awkward, module, awkward.data)
    found = run.posterior(draws=3, rows=9)
    x = run.data.test.x[found["posterior"].datum.values.tolist()]
    with torch.no_grad():
        guide = samples(run.pair.guide_trace(x))
        bits = kl(guide["bits"]["fn"].base_dist, dist.Bernoulli(torch.tensor([0.3, 0.8]).expand(len(x), 2)))
        values = torch.tensor(found["posterior"].bits.values.copy())[0]
        priors = [dist.Categorical(logits=module.prior(value)[:, None].expand(-1, 2, -1)) for value in values]
        codes = torch.stack([kl(guide["code"]["fn"].base_dist, p) for p in priors]).mean(0)
    assert found["diagnostics"].bits_kl.values == pytest.approx(bits.numpy(), abs=1e-5)
    assert found["diagnostics"].code_kl.values == pytest.approx(codes.numpy(), abs=1e-5)
    means = [*bits.mean(0).tolist(), *codes.mean(0).tolist()]
    assert found.summary()["kl"].to_list() == pytest.approx(means, abs=1e-5)


RESERVED = ("chain", "draw", "datum", "z", "z_dim", "z_dim_0")
HARD = (*RESERVED, "", "a/b", "a_b", "a b", "x" * 300, "\x00", "\ud800", "潜", "<b>")


@given(st.dictionaries(st.sampled_from(HARD) | st.text(max_size=8), st.lists(st.just(2), max_size=3), min_size=1))
def test_names_are_safe_distinct_and_deterministic(tails):
    names = safe_names(tails)
    assert names == safe_names(tails)
    assert list(names) == list(tails)
    claimed = [claim for site, name in names.items() for claim in (name, *dims_of(name, tails[site]))]
    assert len(set(claimed)) == len(claimed)
    assert all(
        0 < len(name) <= LONGEST_NAME and name.isascii() and name.replace("_", "a").isalnum() for name in names.values()
    )
    assert not {"chain", "draw", "datum"} & set(names.values())
    again = safe_names({name: tails[site] for site, name in names.items()})
    assert all(name == site for site, name in again.items())


# ---------------------------------------------------------------------- refusals


def test_memory_is_refused_before_anything_is_drawn(run, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("drawn")

    monkeypatch.setattr("pvae.analysis.export.posterior.draw_chunk", never)
    refused(r"at most 1073741824 bytes .* posterior/z takes \d+. Lower draws or rows", run.posterior, draws=100_000_000)
    message = r"posterior_predictive/x takes \d+. Lower predictive_rows or predictive_draws"
    refused(message, run.posterior, rows=20, memory=10**5, draws=10)


def test_bad_arguments(run, small):
    for name in ("draws", "rows", "predictive_rows", "predictive_draws"):
        refused(f"{name}: expected at least 1; got 0", partial(run.posterior, **{name: 0}))
    refused("Expected a split", run.posterior, "tset", by=DeclarationError)
    refused("did you mean 'prior'", lambda: small["priors"])
    refused("proportion between 0 and 1; got 94", small.summary, 94)


# ---------------------------------------------------------------------- the file


def test_file_round_trips_exactly_and_twice_the_same(run, small, tmp_path):
    one = small.save(tmp_path / "one.nc")
    two = run.posterior(draws=DRAWS, rows=ROWS).save(tmp_path / "two.nc")
    assert_same(small, PosteriorDraws.load(one))
    assert one.read_bytes() == two.read_bytes()
    assert PosteriorDraws.load(one).save(tmp_path / "one.nc") == one
    assert {p.name for p in tmp_path.iterdir()} >= {"one.nc", "one.nc.sha256", "two.nc", "two.nc.sha256"}
    assert not list(tmp_path.glob(".tmp*"))
    subprocess.run(["sha256sum", "--check", "--quiet", "one.nc.sha256"], cwd=tmp_path, check=True)


def test_damage_is_refused(small, tmp_path):
    """FAULTS 5: one flipped bit, a missing or foreign checksum, no such file."""
    path = small.save(tmp_path / "p.nc")
    content, checksum = bytearray(path.read_bytes()), path.with_name("p.nc.sha256")
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused(r"expected SHA-256 .* \(its bytes changed", PosteriorDraws.load, path, by=CheckpointError)
    checksum.write_text("nothing\n")
    refused("expected a line of sha256sum", PosteriorDraws.load, path, by=CheckpointError)
    checksum.unlink()
    refused("expected the file and its p.nc.sha256", PosteriorDraws.load, path, by=CheckpointError)
    refused("expected the file", PosteriorDraws.load, tmp_path / "absent.nc", by=CheckpointError)
    assert CheckpointError.exit_code == 65


def checksum(path: Path) -> None:
    path.with_name("p.nc.sha256").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  p.nc\n")


def test_what_is_no_netcdf_is_refused(tmp_path):
    path = tmp_path / "p.nc"
    path.write_bytes(b"\x80\x04pickle")
    checksum(path)
    refused("expected NetCDF with groups", PosteriorDraws.load, path, by=CheckpointError)


LEADING_ELSEWHERE = {
    "external link": ("posterior/more", lambda file: h5py.ExternalLink("other.nc", "/z")),
    "soft link": ("posterior/more", lambda file: h5py.SoftLink("/posterior/z")),
    "deep": ("posterior/more/again", lambda file: file["posterior"]),
    "no group": ("more", lambda file: np.zeros(3)),
    "external storage": ("", None),
}


@pytest.mark.parametrize(("name", "item"), LEADING_ELSEWHERE.values(), ids=list(LEADING_ELSEWHERE))
def test_a_file_that_leads_elsewhere_is_refused(small, tmp_path, name, item):
    """FAULTS 36: links and raw storage outside of the file, though the checksum beside it is right."""
    path = small.save(tmp_path / "p.nc")
    with h5py.File(path, "a") as file:
        if item is not None:
            file[name] = item(file)
        else:
            (tmp_path / "secret").write_bytes(bytes(80))
            file.create_dataset("posterior/more", (10,), "f8", external=[(str(tmp_path / "secret"), 0, 80)])
    checksum(path)
    refused("expected groups of plain arrays; got .*more", PosteriorDraws.load, path, by=CheckpointError)


def test_failed_writing_leaves_what_stood_there(small, tmp_path, monkeypatch):
    path = small.save(tmp_path / "p.nc")
    old = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(xarray.DataTree, "to_netcdf", full)
    refused(r"No space left.* try again", small.save, path, by=StorageError)
    assert path.read_bytes() == old
    assert not list(tmp_path.glob(".tmp*"))
    (tmp_path / "link.nc").symlink_to(path)
    refused("not a plain file", small.save, tmp_path / "link.nc", by=StorageError)


# ---------------------------------------------------------------------- summary and words


def test_summary_has_no_chain_diagnostics(small):
    frame = small.summary()
    assert list(frame.columns) == ["mean", "sd", "sd_of_means", "hdi_3%", "hdi_97%", "kl"]
    assert list(frame.index[:2]) == ["z[0]", "z[1]"]
    z = small["posterior"].z.values[0, :, :, 1].astype(float)
    assert frame.loc["z[1]", "mean"] == pytest.approx(z.mean())
    assert frame.loc["z[1]", "sd"] == pytest.approx(z.std())
    assert frame.loc["z[1]", "sd_of_means"] == pytest.approx(z.mean(0).std())
    assert frame.loc["z[1]", "kl"] == pytest.approx(small["diagnostics"].z_kl[:, 1].mean())


def test_summary_of_awkward_latents(awkward):
    frame = awkward.posterior(draws=DRAWS).summary(hdi=0.5)
    assert {"hdi_25%", "hdi_75%"} <= set(frame.columns)
    assert len(frame) == 1 + 6 + 1 + 4
    assert frame["kl"].notna().sum() == 2
    assert frame["sd_of_means"].isna().sum() == 4


def test_words_are_short_and_escaped(small):
    assert len(repr(small)) < 300
    assert "5 draws x 30 rows" in repr(small)
    assert "z [16]" in repr(small)
    attrs = {"run": "<script>", "run_id": "&", "split": "test"}
    hostile = PosteriorDraws({"posterior": small["posterior"].assign_attrs(attrs)})
    assert "<script>" not in hostile._repr_html_()
    assert "&lt;script&gt; &amp;" in hostile._repr_html_()


# ---------------------------------------------------------------------- ArviZ


def test_arviz_works_on_it(small, awkward):
    arviz = importlib.import_module("arviz")
    for found in (small, awkward.posterior(draws=DRAWS, rows=4)):
        given_to_arviz = found.to_arviz()
        assert isinstance(given_to_arviz, arviz.InferenceData)
        assert set(given_to_arviz.groups()) == set(found.groups)
        few = given_to_arviz.isel(datum=slice(2), groups=["posterior"])
        assert len(arviz.summary(few, kind="stats")) > 0
        assert np.isfinite(arviz.ess(few).to_array()).any()
    hdi = arviz.hdi(small["posterior"].z.values[0, :, :, 3].ravel().astype(float), hdi_prob=0.94)
    assert small.summary().loc["z[3]", ["hdi_3%", "hdi_97%"]].tolist() == pytest.approx(hdi.tolist())


def test_arviz_is_not_imported_until_it_is_asked_for(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)  # any import of it fails
    found = run.posterior(draws=2, rows=4)
    found.save(tmp_path / "p.nc")
    assert "z [16]" in repr(found)
    assert len(found.summary()) == 16


def test_arviz_1_gets_a_tree(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", SimpleNamespace(__version__="1.2.0"))
    tree = small.to_arviz()
    assert isinstance(tree, xarray.DataTree)
    for name in small.groups:
        xarray.testing.assert_identical(tree[name].to_dataset(), small[name])


@pytest.mark.parametrize("why", ["absent", "broken"])
def test_arviz_that_does_not_import_is_a_typed_error(small, tmp_path, monkeypatch, why):
    if why == "absent":
        monkeypatch.setitem(sys.modules, "arviz", None)
    else:
        (tmp_path / "arviz.py").write_text("raise FutureWarning('a cache that cannot be written')\n")
        monkeypatch.delitem(sys.modules, "arviz", raising=False)
        monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingExtraError, match=r"Expected ArviZ to import; got .*pip install") as caught:
        small.to_arviz()
    assert caught.value.exit_code == 69


NEWER = """
import importlib.util, sys, warnings
import arviz, xarray
spec = importlib.util.spec_from_file_location("groups", sys.argv[1])
groups = importlib.util.module_from_spec(spec)
sys.modules["groups"] = groups
spec.loader.exec_module(groups)
found = groups.PosteriorDraws.load(sys.argv[2])
tree = found.to_arviz()
assert isinstance(tree, xarray.DataTree), type(tree)
with xarray.open_datatree(sys.argv[2], engine="h5netcdf") as opened:
    for name in found.groups:
        xarray.testing.assert_identical(opened[name].to_dataset(), found[name])
        xarray.testing.assert_identical(tree[name].to_dataset(), found[name])
    print(int(arviz.__version__.split(".")[0]) >= 1, float(arviz.ess(opened)["z"].mean()) > 0)
few = groups.PosteriorDraws({"posterior": found["posterior"].isel(datum=slice(2))})
print(len(arviz.summary(few.to_arviz())), len(found.summary()), "torch" in sys.modules)
"""


def test_a_file_is_opened_without_torch(small, tmp_path):
    code = NEWER.replace("import arviz, xarray", "import xarray").partition("found = ")[0]
    code += "found = groups.PosteriorDraws.load(sys.argv[2])\nprint(len(found.summary()), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, DATASETS, small.save(tmp_path / "p.nc")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.stdout.split() == ["16", "False"], done.stderr


@pytest.mark.slow
@pytest.mark.python312
def test_arviz_1_opens_the_file_without_torch(small, newer_python, tmp_path):
    """Installs from the package index: fails where there is none."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([newer_python, "-m", "venv", str(tmp_path / "venv")], check=True)
    wanted = ["arviz>=1.2,<2", "h5netcdf", "h5py", "xarray", "pandas"]
    installed = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", *wanted], capture_output=True, text=True, timeout=300
    )
    assert installed.returncode == 0, installed.stderr[-2000:]
    path = small.save(tmp_path / "p.nc")
    # pvae itself comes from this tree; its errors and files need the standard library alone
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run(
        [python, "-c", NEWER, DATASETS, path],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["True", "True", "32", "16", "False"]


# ---------------------------------------------------------------------- the command line


def test_command(run, tmp_path, monkeypatch):
    arguments = ["posterior", str(run.path), "--draws", "4", "--rows", "6", "--seed", "3"]
    for more, path in (([], run.path / "analysis" / "posterior-test.nc"), (["--out", "p.nc"], tmp_path / "p.nc")):
        monkeypatch.chdir(tmp_path)
        out, _ = run_cli(*arguments, *more)
        assert_same(PosteriorDraws.load(path), run.posterior(draws=4, rows=6, seed=3))
    assert "z[15]" in out
    assert "r_hat" not in out
    assert "posterior: p.nc" in out
