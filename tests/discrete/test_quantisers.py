"""Quantised codes against vector-quantize-pytorch: codes, gradients and penalties; KL, resumption, use, errors."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, typeddict-item, union-attr"

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, LFQ, SimVQ, VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

import pvae
from pvae.data import Dataset
from pvae.errors import DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.guides.posteriors.nearest import rotated
from pvae.pair.pair import Pair
from tests.discrete import pairs
from tests.runs_shared import assert_same, fit, resume, signalled_at


class Given(nn.Module):
    """Network whose output is its input."""

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return inputs["z"]


def of(codes: int, grid: list[int] | None = None, embedding: int | None = None, **posterior: Any) -> Pair:
    """A pair of one latent whose vectors are given."""
    sizes = {"codes": codes, "grid": grid, "embedding": embedding}
    latent = {name: size for name, size in sizes.items() if size is not None}
    pair = pairs.built({"c": {**latent, "prior": "uniform", "posterior": posterior}})
    pair.guide.posteriors["c"].network = Given()
    return pair


def quantised(pair: Pair, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Codes `(n, *grid)`, rows with their gradient and penalties of vectors `(n, *plane, E)`; rows channels last."""
    module = pair.guide.posteriors["c"]
    found = module({"z": z.movedim(-1, 1)}, {})
    row = pair.model.see(pair.model.sites[0], found.index, z)
    return found.index, module.through(found, row).movedim(1, -1), module.penalties(found, row)


def vectors(n: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def slope(value: Tensor, at: Tensor, seed: int = 5) -> Tensor:
    """Gradient at `at` of a random combination of values."""
    weight = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
    return torch.autograd.grad((value * weight).sum(), at, retain_graph=True)[0]


def require_peer(pair: Pair, z: Tensor, peer: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Same codes, rows and gradients as the peer's; returns both penalties."""
    theirs, code, *loss = peer(z)
    index, rows, penalties = quantised(pair, z)
    assert torch.equal(index, code)
    torch.testing.assert_close(rows, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope(rows, z), slope(theirs, z), rtol=1e-4, atol=1e-6)
    return penalties, loss[0] if loss else torch.zeros(())


# ---------------------------------------------------------------------- codes and gradients


@pytest.mark.parametrize("levels", [[8, 6, 5], [3], [4, 7, 3, 5]])
def test_finite_scalars_are_vector_quantize_pytorch_s(levels):
    pair = of(math.prod(levels), [50], kind="finite_scalar", levels=levels)
    z = (2 * vectors(20, 50, len(levels))).detach().requires_grad_()
    peer = FSQ(levels)
    assert require_peer(pair, z, peer)[0] == {}
    assert torch.equal(pair.model.codebooks["c"].table, peer.implicit_codebook)
    assert pair.model.decoder.network.inputs == {"c": (len(levels), 50)}


def test_signs_and_their_entropies_are_vector_quantize_pytorch_s():
    # All combinations of five values of each scalar: their soft signs are independent, so that the entropy over the
    # batch is the sum over signs.
    axis = torch.tensor([-0.9, -0.25, 0.1, 0.3, 1.2])
    z = torch.cartesian_prod(axis, axis / 2, -axis)[None].requires_grad_()
    pair = of(8, [125], kind="lookup_free", entropy=1.0, diversity=0.7, sharpness=2.0, commitment=0.25)
    peer = LFQ(dim=3, entropy_loss_weight=1.0, diversity_gamma=0.7, commitment_loss_weight=0.25)
    penalties, loss = require_peer(pair, z, lambda z: peer(z, inv_temperature=2.0))
    assert torch.equal(pair.model.codebooks["c"].table, peer.codebook)
    # The peer's losses are means over positions, that of the commitment over scalars too.
    torch.testing.assert_close(penalties["commitment"] / 125, 3 * 0.25 * (z - z.sign()).square().mean()[None])
    theirs = loss - 0.25 * (z - z.sign().detach()).square().mean()
    ours = penalties["entropy"] / 125 - 0.7 * 3 * math.log(2)
    torch.testing.assert_close(ours, theirs[None], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(slope(ours, z), slope(theirs[None], z), rtol=1e-3, atol=1e-5)


def test_entropies_of_two_to_the_sixteen_codes_are_finite_even_where_all_signs_agree():
    pair = of(2**16, [4], kind="lookup_free")
    for z in (torch.full((6, 4, 16), 3.0, requires_grad=True), vectors(6, 4, 16)):
        index, _, penalties = quantised(pair, z)
        assert int(index.max()) < 2**16
        (found,) = torch.autograd.grad(penalties["entropy"].sum(), z)
        assert found.isfinite().all()


@pytest.mark.parametrize("passes", ["straight", "rotation"])
def test_a_mapped_codebook_is_vector_quantize_pytorch_s(passes):
    pair, peer = of(40, [30], 6, kind="simvq", passes=passes), SimVQ(6, 40, rotation_trick=passes == "rotation")
    book, z = pair.model.codebooks["c"], vectors(10, 30, 6)
    book.load_state_dict({"frozen": peer.frozen_codebook, "map.weight": peer.code_transform.weight})
    penalties, loss = require_peer(pair, z, peer)
    ours = sum(penalties.values()).mean() / 30 / 6
    torch.testing.assert_close(ours, loss)
    torch.testing.assert_close(slope(ours, z), slope(loss, z))
    torch.testing.assert_close(slope(ours, book.map.weight), slope(loss, peer.code_transform.weight))


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("passes", ["straight", "rotation"])
def test_nearest_codes_pass_vector_quantize_pytorch_s_gradient(unit, passes):
    pair = of(12, [30], 5, kind="nearest_code", unit=unit, passes=passes)
    peer = VectorQuantize(5, 12, use_cosine_sim=unit, rotation_trick=passes == "rotation")
    peer._codebook.embed.copy_(pair.model.codebooks["c"].table)
    require_peer(pair, vectors(10, 30, 5), peer)


def test_the_rotation_keeps_the_angle_between_gradient_and_vector():
    z, e = vectors(50, 7).double(), vectors(50, 7, seed=1).double().detach()
    found = rotated(z, e, -1)
    torch.testing.assert_close(found, e)
    torch.testing.assert_close(found, rotate_to(z, e))
    at_e = torch.randn(50, 7, dtype=torch.float64)
    (at_z,) = torch.autograd.grad((found * at_e).sum(), z)
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(at_z, z, -1), cosine(at_e, e, -1))
    torch.testing.assert_close(at_z.norm(dim=-1), at_e.norm(dim=-1) * e.norm(dim=-1) / z.norm(dim=-1))


# ---------------------------------------------------------------------- in a pair

QUANTISERS = {name: engine for name, engine in pairs.ENGINES.items() if engine.certain and "noise" not in name}
every_quantiser = pytest.mark.parametrize("engine", QUANTISERS.values(), ids=list(QUANTISERS))


@every_quantiser
def test_a_code_costs_log_k_at_every_position(engine):
    latent = {**engine.latent, "prior": "uniform"}
    pair = pairs.declared(latent)
    for closed_form in (False, True):
        kl = pair.terms(pairs.rows(), closed_form=closed_form).kl["c"]
        positions = math.prod(pair.model.sites[0].event)
        torch.testing.assert_close(kl, torch.full((5,), positions * math.log(engine.latent["codes"])))


RESUMED = {name: QUANTISERS[name] for name in ("nearest_code, rotation", "simvq")}


@pytest.mark.parametrize(("engine", "shards"), [*zip(RESUMED.values(), [1, 4], strict=True)], ids=list(RESUMED))
def test_a_fit_goes_on_bit_for_bit(tmp_path, engine, shards):
    data = Dataset.from_tensors(pairs.rows(60), validation=pairs.rows(20), test=pairs.rows(20))
    what = pairs.small(engine.latent, checkpoint_seconds=0.0, shards=shards)
    whole = fit(what, tmp_path / "whole", data=data)
    with signalled_at(3), pytest.raises(pvae.PvaeError, match="SIGTERM"):
        fit(what, tmp_path / "part", data=data)
    (part,) = (tmp_path / "part").glob("*/*")
    assert pvae.Run.load(part, data=data).checkpoint.step < 6
    assert_same(whole, resume(part, data=data))


ERRORS = {
    "levels": ({"codes": 12, "posterior": {"kind": "finite_scalar"}}, "codes = 240, the product of posterior.levels"),
    "width of levels": (
        {"codes": 240, "embedding": 4, "posterior": {"kind": "finite_scalar"}},
        "embedding = 3, one for each level, or none; got 4",
    ),
    "two levels": (
        {"codes": 4, "posterior": {"kind": "finite_scalar", "levels": [2, 2]}},
        "levels.0: expected .*greater than 2",
    ),
    "signs": ({"codes": 12, "posterior": "lookup_free"}, r"codes = 16, 2\^embedding"),
    "width of signs": ({"codes": 16, "embedding": 5, "posterior": "lookup_free"}, r"codes = 32, 2\^embedding"),
    "no width": ({"codes": 16, "posterior": "simvq"}, "embedding, the width of the codebook, with the posterior simvq"),
    "no codes": ({"dim": 16, "posterior": "lookup_free"}, "latents.c.posterior: expected"),
}


@pytest.mark.parametrize(("latent", "message"), ERRORS.values(), ids=list(ERRORS))
def test_sizes_that_do_not_fit_are_refused(latent, message):
    with pytest.raises(DeclarationError, match=message):
        Experiment.from_dict({"latents": {"c": latent}})
