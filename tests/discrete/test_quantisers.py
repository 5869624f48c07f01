"""Quantised codes against vector-quantize-pytorch: codes, gradients and penalties; KL, resumption, use, errors."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, typeddict-item, union-attr"

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, LFQ, GroupedResidualVQ, ResidualVQ, SimVQ, VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

import pvae
from pvae.analysis import collapse, surgery
from pvae.data import Dataset
from pvae.errors import DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.guides.posteriors.nearest import rotated
from pvae.nn.codebook import NearestCodebook
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

QUANTISERS = pairs.QUANTISERS
every_quantiser = pytest.mark.parametrize("engine", QUANTISERS.values(), ids=list(QUANTISERS))


@every_quantiser
def test_a_code_costs_log_k_at_every_position(engine):
    latent = {**engine.latent, "prior": "uniform"}
    pair = pairs.declared(latent)
    for closed_form in (False, True):
        kl = pair.terms(pairs.rows(), closed_form=closed_form).kl["c"]
        positions = math.prod(pair.model.sites[0].event)  # with the codes of a position
        torch.testing.assert_close(kl, torch.full((5,), positions * math.log(engine.latent["codes"])))


DROPPED = {**QUANTISERS["residual"].latent, "posterior": {"kind": "residual", "depth": 2, "dropout": 0.5}}
RESUMED = {**{name: engine.latent for name, engine in QUANTISERS.items()}, "residual, dropout": DROPPED}
FAST = [("nearest_code, rotation", 1), ("residual, dropout", 4)]
SLOW = [(name, shards) for name in RESUMED for shards in (1, 4) if (name, shards) not in FAST]


@pytest.mark.parametrize(("name", "shards"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_a_fit_goes_on_bit_for_bit(tmp_path, name, shards):
    data = Dataset.from_tensors(pairs.rows(60), validation=pairs.rows(20), test=pairs.rows(20))
    what = pairs.small(RESUMED[name], checkpoint_seconds=0.0, shards=shards)
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
    "parts": (
        {"codes": 8, "embedding": 5, "posterior": {"kind": "grouped", "groups": 2}},
        "embedding = a multiple of posterior.groups = 2; got 5",
    ),
    "one level": (
        {"codes": 4, "posterior": {"kind": "finite_scalar", "levels": [1, 4]}},
        r"^[^\n]*levels.0: expected greater than 2; got 1\.$",
    ),
    "a prior of codes over relaxed ones": (
        {"codes": 4, "grid": [4], "prior": "pixelcnn", "posterior": "relaxed_onehot"},
        "prior of relaxed codes.*posterior.kl = 'categorical' and a prior of codes",
    ),
    "no codes": ({"dim": 16, "posterior": "lookup_free"}, "latents.c.posterior: expected"),
}


@pytest.mark.parametrize(("latent", "message"), ERRORS.values(), ids=list(ERRORS))
def test_sizes_that_do_not_fit_are_refused(latent, message):
    with pytest.raises(DeclarationError, match=message):
        Experiment.from_dict({"latents": {"c": latent}})


# ---------------------------------------------------------------------- several codes that make one vector


def peers_rows(pair: Pair, layers: Any) -> None:
    """Set the codebooks to those of the peer's layers."""
    for book, layer in zip(pair.model.codebooks["c"].books, layers, strict=True):
        book.weight.data.copy_(layer._codebook.embed[0])
        if book.decay is not None:
            book.sums.copy_(book.weight)


@pytest.mark.parametrize("shared", [False, True])
def test_residual_codes_are_vector_quantize_pytorch_s(shared):
    settings = {"shared_codebook": shared, "rotation_trick": False, "threshold_ema_dead_code": 0, "decay": 0.9}
    peer = ResidualVQ(dim=5, num_quantizers=3, codebook_size=12, commitment_weight=0.25, **settings)
    pair = of(12, [30], 5, kind="residual", depth=3, shared=shared, restart=0.0, decay=0.9)
    peers_rows(pair, peer.layers[:1] if shared else peer.layers)
    z = vectors(10, 30, 5)
    for layer in peer.layers:
        layer._codebook.embed_avg.copy_(layer._codebook.embed)
    index, rows, penalties = quantised(pair, z)
    theirs, codes, losses = peer(z)
    assert torch.equal(index, codes)
    torch.testing.assert_close(rows, theirs, rtol=1e-5, atol=1e-6)
    ours = penalties["commitment"].mean() / 30 / 5
    torch.testing.assert_close(ours, losses.sum(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope(ours, z), slope(losses.sum(), z), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(slope(rows, z), slope(z.clone(), z))  # straight through, once for the whole stack
    if shared:  # one step of the average for all depths, where the peer takes one for each
        assert float(pair.model.codebooks["c"].books[0].batch_counts.sum()) == 10 * 30 * 3
        return
    for book, layer in zip(pair.model.codebooks["c"].books, peer.layers, strict=True):
        book.after_step()
        torch.testing.assert_close(book.weight, layer._codebook.embed[0], rtol=1e-4, atol=1e-5)


def test_residual_codebooks_learn_by_gradients_from_what_is_left():
    pair, z = of(12, [30], 5, kind="residual", depth=3, gradient=True), vectors(10, 30, 5)
    book = pair.model.codebooks["c"]
    index, _, penalties = quantised(pair, z)
    rest, want = z.detach(), torch.zeros(10)
    for i, part in enumerate(book.books):
        row = part.weight[index[..., i]]
        want, rest = want + (rest - row).square().sum((1, 2)), rest - row.detach()
    torch.testing.assert_close(penalties["codebook"], want)
    torch.testing.assert_close(slope(penalties["codebook"], book.books[1].weight), slope(want, book.books[1].weight))


@pytest.mark.parametrize("passes", ["straight", "rotation"])
def test_grouped_codes_are_vector_quantize_pytorch_s(passes):
    peer = GroupedResidualVQ(
        dim=6, groups=3, num_quantizers=1, codebook_size=12, commitment_weight=0.25, rotation_trick=passes == "rotation"
    )
    pair = of(12, [30], 6, kind="grouped", groups=3, passes=passes)
    peers_rows(pair, [rvq.layers[0] for rvq in peer.rvqs])

    def grouped(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, codes, losses = peer(z)
        return rows, codes[..., 0].movedim(0, -1), losses.sum()

    penalties, loss = require_peer(pair, vectors(10, 30, 6), grouped)
    torch.testing.assert_close(penalties["commitment"].mean() / 30 / 2, loss, rtol=1e-5, atol=1e-6)


def test_dropped_codes_are_not_read_but_are_inferred():
    # Of 400 rows a half keep all three codes, and of the others a third each one, two or three; 4 standard errors.
    pair, z = of(12, [4], 5, kind="residual", depth=3, dropout=0.5), vectors(400, 4, 5)
    space, book = pair.model.sites[0].space, pair.model.codebooks["c"]
    index, rows, penalties = quantised(pair, z)
    sums = space.rows(index, book.table).cumsum(-2)
    which = torch.stack([(rows - sums[..., i, :]).abs().amax((1, 2)) < 1e-5 for i in range(3)])
    assert (which.sum(0) == 1).all()
    share = which.double().mean(1)
    for i, want in enumerate((1 / 6, 1 / 6, 2 / 3)):
        assert float(share[i]) == pytest.approx(want, abs=4 * (want * (1 - want) / 400) ** 0.5)
    torch.testing.assert_close(slope(rows, z), slope(z.clone(), z))
    pair.eval()
    whole, full, same = quantised(pair, z)
    assert torch.equal(whole, index)
    torch.testing.assert_close(full, sums[..., -1, :])
    assert torch.equal(same["commitment"], penalties["commitment"])
    pair.guide.posteriors["c"].network = Given()
    kl = pair.model.prior("c", {}).log_prob(index).neg()
    torch.testing.assert_close(kl, torch.full((400,), 12 * math.log(12)))


@pytest.mark.parametrize("shared", [False, True])
def test_stacks_start_at_k_means_of_what_is_left(shared):
    # Coarse centres far apart, each with the same four fine offsets.
    coarse = torch.tensor([[9.0, 0], [-9, 0], [0, 9], [0, -9]])
    fine = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    which = torch.arange(1600)
    z = coarse[which % 4] + fine[which // 4 % 4] + 0.01 * vectors(1600, 2).detach()
    codes = 8 if shared else 4
    pair = of(codes, [2], 2, kind="residual", depth=2, shared=shared)
    book = pair.model.codebooks["c"]
    book.start(z, 0, 200.0)
    index = book.eval().nearest(z)
    left = z - pair.model.sites[0].space.rows(index, book.table).sum(-2)
    assert float(left.square().sum(-1).mean()) < (1.0 if shared else 0.001)  # of 83
    assert float(book.books[0].counts.sum()) == pytest.approx(400 if shared else 200)


def test_use_and_surgery_go_by_code():
    pair, x = pairs.declared({**QUANTISERS["residual"].latent, "codes": 40, "prior": "categorical"}), pairs.rows(60)
    with torch.no_grad():
        index = pair.eval().guide_trace(x).nodes["c"]["value"]  # (60, 2, 2, 3)
    found, use = surgery(pair, x), collapse(pair, x).latents["c"].codes

    def entropy(codes: Tensor) -> float:
        return float(scipy.stats.entropy(np.unique(codes.flatten(1).numpy(), axis=0, return_counts=True)[1]))

    joint = [0.0, *(entropy(index[..., :i]) for i in (1, 2, 3))]
    latent = found.latents["c"]
    assert latent.information_by_code == pytest.approx(np.diff(joint).tolist(), abs=1e-9)
    assert sum(latent.information_by_code) == pytest.approx(found.mutual_information.value, abs=1e-9)
    assert sum(latent.marginal_kl_by_code) == pytest.approx(found.marginal_kl.value, abs=1e-6)
    assert len(use.parts) == 3
    for i, part in enumerate(use.parts):
        counts = index[..., i].flatten().bincount(minlength=40)
        assert part.used == int((counts > 0).sum())
        assert part.pooled_perplexity == pytest.approx(math.exp(scipy.stats.entropy(counts.numpy())))
        assert part.grid == (2, 2)
    assert use.used == sum(part.used for part in use.parts)
    assert use.tables == 3
    assert "at most 120;" in {name: words for name, _, words in found.rows()}["perplexity"]
    assert f"{120 - use.used} of 120 codes are dead" in collapse(pair, x).alerts[0]


def test_a_token_prior_reads_a_stack_coarse_to_fine():
    # p(c_p | ...) depends on codes before it in the order position by position, coarse to fine, and on no other.
    prior = {"kind": "transformer", "width": 8, "layers": 1, "heads": 2}
    pair = pairs.declared({**QUANTISERS["residual"].latent, "prior": prior}).eval()
    p = pair.model.prior("c", {})
    value = p.expand((1,)).sample()
    assert value.shape == (1, 2, 2, 3)
    before = p.conditional_logits(value).reshape(12, 6)
    for place in range(12):
        other = value.reshape(1, 12).clone()
        other[0, place] = (other[0, place] + 1) % 6
        moved = (p.conditional_logits(other.reshape(value.shape)).reshape(12, 6) - before).abs().amax(1) > 1e-7
        assert moved.tolist() == [i > place for i in range(12)]
    with pytest.raises(
        DeclarationError, match="c.prior: .* at most 2 axes for pixelcnn; got .*Take the prior transformer"
    ):
        pairs.declared({**QUANTISERS["residual"].latent, "prior": "pixelcnn"})


# ---------------------------------------------------------------------- collapse

REMEDIES: dict[str, tuple[int, dict[str, Any]]] = {
    "nothing": (8, {"kind": "nearest_code", "gradient": True, "restart": 0.0}),
    "averages and restarts": (8, {"kind": "nearest_code", "restart": 0.1, "decay": 0.9}),
    "a mapped codebook": (8, {"kind": "simvq"}),
    "levels": (3, {"kind": "finite_scalar"}),
    "signs": (0, {"kind": "lookup_free", "sharpness": 1.0}),
}


def perplexity_after(codes: int, remedy: str, steps: int, batch: int, lr: float, fresh: int) -> float:
    """Perplexity of `fresh` vectors of a normal distribution, after a codebook has followed batches of others."""
    width, posterior = REMEDIES[remedy]
    if "decay" in posterior:
        posterior = {**posterior, "decay": 0.9 if steps > 20 else 0.5}  # time for dead codes to be seen
    bits = codes.bit_length() - 1
    if posterior["kind"] == "finite_scalar":
        posterior = {**posterior, "levels": [8, 8, 8] if bits == 9 else [32, 32, 16]}
    torch.manual_seed(0)
    pair = of(codes, [16], width or bits, **posterior)
    book, width = pair.model.codebooks["c"], width or bits
    optimizer = torch.optim.Adam(list(book.parameters()), lr) if list(book.parameters()) else None
    for step in range(steps):
        penalties = quantised(pair, vectors(batch // 16, 16, width, seed=step))[2]
        if optimizer is not None:
            optimizer.zero_grad()
            penalties["codebook"].mean().backward()
            optimizer.step()
        if isinstance(book, NearestCodebook):
            book.after_step()
    others = vectors(fresh // 16, 16, width, seed=-1).detach()
    share = book.eval().nearest(book.place(others)).flatten().bincount(minlength=codes).double() / fresh
    return float(torch.special.entr(share).sum().exp())


@pytest.mark.parametrize("codes", [512, pytest.param(16_384, marks=pytest.mark.slow)])
def test_remedies_keep_codes_in_use(codes):
    sizes = (60, 2048, 3e-3, 4096) if codes == 512 else (12, codes // 2, 0.1, 4 * codes)
    found = {remedy: perplexity_after(codes, remedy, *sizes) / codes for remedy in REMEDIES}
    assert found.pop("nothing") < 0.2
    assert min(found.values()) > 0.4, found
