"""Nearest codes: the codebook, its averages and restarts, and its gradients in a pair."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, typeddict-item, union-attr"

import copy
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

from pvae.data import Dataset
from pvae.guides.posteriors.nearest import NearestCodePosterior
from pvae.nn.codebook import SMOOTHING, NearestCodebook
from pvae.training.begin import begin
from pvae.training.evaluation import evaluate
from pvae.training.resume import refit
from tests.discrete import pairs
from tests.laws import require_gradients
from tests.runs_shared import assert_resumes_exactly, everything


def book(codes: int = 8, width: int = 3, **changes: Any) -> NearestCodebook:
    settings: dict[str, Any] = {"decay": 0.9, "restart": 0.0, "unit": False, **changes}
    return NearestCodebook(codes, width, **settings)


def drawn(n: int, width: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("unit", [False, True])
def test_the_nearest_code_is_brute_force_s(unit, monkeypatch):
    found = book(50, 4, unit=unit)
    with torch.no_grad():
        found.weight.copy_(drawn(50, 4, 1))
    z = found.place(drawn(600, 4)).reshape(20, 30, 4)
    want = (z[:, :, None].double() - found.table.double()).square().sum(-1).argmin(-1)
    assert torch.equal(found.nearest(z), want)
    if unit:
        assert torch.equal(torch.einsum("bie,ke->bik", z.double(), found.table.double()).argmax(-1), want)
        torch.testing.assert_close(found.table.norm(dim=1), torch.ones(50))
    monkeypatch.setattr("pvae.nn.codebook.BLOCK_DISTANCES", 50 * 7)  # in parts of seven vectors
    assert torch.equal(found.nearest(z), want)


def by_hand(rows: np.ndarray, counts: np.ndarray, sums: np.ndarray, z: np.ndarray, decay: float) -> tuple[Any, ...]:
    """One step of the averages."""
    index = ((z[:, None] - rows) ** 2).sum(-1).argmin(1)
    hit = np.eye(len(rows))[index]
    counts = decay * counts + (1 - decay) * hit.sum(0)
    sums = decay * sums + (1 - decay) * hit.T @ z
    smooth = (counts + SMOOTHING) / (counts.sum() + len(rows) * SMOOTHING) * counts.sum()
    return sums / smooth[:, None], counts, sums


def test_averages_follow_the_formula():
    found = book().double()
    rows, counts, sums = (t.numpy().copy() for t in (found.weight, found.counts, found.sums))
    for i in range(5):
        z = drawn(40, 3, i).double()
        before = found.weight.clone()
        found.nearest(z.reshape(4, 10, 3))
        assert torch.equal(found.weight, before)
        found.after_step()
        rows, counts, sums = by_hand(rows, counts, sums, z.numpy(), 0.9)
        for ours, want in ((found.weight, rows), (found.counts, counts), (found.sums, sums)):
            np.testing.assert_allclose(ours.numpy(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("unit", [False, True])
def test_averages_are_vector_quantize_pytorch_s(unit):
    settings = {"commitment_weight": 0.25, "threshold_ema_dead_code": 0, "kmeans_init": False, "eps": SMOOTHING}
    peer = VectorQuantize(5, 12, decay=0.9, use_cosine_sim=unit, rotation_trick=False, **settings)
    found = book(12, 5, unit=unit)
    start = found.place(drawn(12, 5, 1))
    for table in (found.weight, found.sums, peer._codebook.embed[0], peer._codebook.embed_avg[0]):
        table.copy_(start)
    for i in range(8):
        z = found.place(drawn(60, 5, i + 2)).reshape(4, 15, 5)
        rows = found.table.clone()
        through, index, commitment = peer(z)
        ours = found.nearest(z)
        assert torch.equal(ours, index)
        torch.testing.assert_close(rows[ours], through, rtol=1e-5, atol=1e-5)
        loss = 0.25 * (z - rows[ours]).square().mean()
        torch.testing.assert_close(loss, commitment.squeeze(), rtol=1e-5, atol=1e-6)
        found.after_step()
        torch.testing.assert_close(found.table, peer._codebook.embed[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.counts, peer._codebook.cluster_size[0], rtol=1e-5, atol=1e-5)
    assert (found.table - start).abs().max() > 0.05


@pytest.mark.parametrize("decay", [0.9, None])
def test_dead_rows_move_to_vectors_of_the_batch_and_no_other(decay):
    found, z = book(8, 3, decay=decay, restart=0.125), drawn(64)  # an even share is 8 vectors, an eighth of it 1
    with torch.no_grad():
        found.weight[:4] = z[:4]
        found.weight[4:] = 100.0 + drawn(4, 3, 1)  # too far to be found
        found.counts.copy_(torch.tensor([9.0, 9, 9, 9, 0.5, 9, 0.9, 9]))
        if decay is not None:
            found.sums.copy_(found.weight * found.counts[:, None])
    before = found.weight.detach().clone()
    alive = copy.deepcopy(found)
    alive.restart = 0.0
    for one in (found, alive):
        one.nearest(z)
        one.after_step()
    still = [0, 1, 2, 3, 5, 7]
    torch.testing.assert_close(found.weight[still], alive.weight[still], rtol=0, atol=0)
    for row in (4, 6):
        assert (found.weight[row] == z).all(1).any()
        assert (alive.weight[row] - before[row]).abs().max() < 0.01
        assert found.counts[row] == 8.0
        if decay is not None:
            torch.testing.assert_close(found.sums[row], 8 * found.weight[row])


def test_codes_stay_where_they_are_found_with_fewer_vectors_than_codes():
    centres = 3 * drawn(128, 8, 1)
    found = book(128, 8, decay=0.99, restart=NearestCodePosterior.model_fields["restart"].default)
    with torch.no_grad():
        found.weight.copy_(centres)
        found.counts.fill_(40 / 128)
        found.sums.copy_(centres * found.counts[:, None])
    for step in range(400):
        found.nearest(centres[(torch.arange(40) + 40 * step) % 128] + 0.01 * drawn(40, 8, step))
        found.after_step()
    torch.testing.assert_close(found.weight, centres, rtol=0, atol=0.02)


@pytest.mark.parametrize("decay", [0.9, None])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_batch_that_is_not_finite_moves_nothing(decay, bad):
    found, z = book(8, 3, decay=decay, restart=0.5), drawn(64)
    with torch.no_grad():
        found.counts.copy_(torch.tensor([0.01] * 4 + [0.5] * 4))  # four would be restarted
    before = {name: value.clone() for name, value in found.state_dict().items()}
    z[7, 1] = bad
    found.nearest(z)
    found.after_step()
    assert pairs.same(before, found.state_dict())
    found.nearest(drawn(64))
    found.after_step()
    assert not pairs.same(before, found.state_dict())
    assert all(value.isfinite().all() for value in found.state_dict().values())


def test_nothing_moves_without_a_batch():
    found = book(8, 3, restart=0.5)
    found.nearest(drawn(64))
    found.after_step()
    before = {name: value.clone() for name, value in found.state_dict().items()}
    found.after_step()  # the same batch does not count twice
    found.eval()
    found.nearest(drawn(64, 3, 1))
    found.after_step()
    assert pairs.same(before, found.state_dict())


@pytest.mark.parametrize("unit", [False, True])
def test_k_means_finds_the_centres(unit):
    centres = torch.tensor([[4.0, 0, 0], [0, 4, 0], [0, 0, 4], [-4, 0, 0]])
    which = torch.arange(400) % 4
    which = torch.where(torch.arange(400) < 100, 0, which)  # 175 of the first, 75 of each other
    z = centres[which] + 0.05 * drawn(400)
    found = book(4, 3, unit=unit)
    found.start(z, seed=0, batch=40)
    order = (centres[:, None] - 4 * found.table if unit else centres[:, None] - found.table).square().sum(-1).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    if not unit:
        want = torch.stack([z[which == k].mean(0) for k in range(4)])
        torch.testing.assert_close(found.table[order], want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.counts[order], torch.tensor([17.5, 7.5, 7.5, 7.5]))
    torch.testing.assert_close(found.sums, found.weight * found.counts[:, None])
    again = book(4, 3, unit=unit)
    again.start(z, seed=0, batch=40)
    assert torch.equal(again.table, found.table)


def test_the_gradient_at_z_is_the_decoder_s_at_its_code():
    pair, x = pairs.nearest(commitment=0.0), pairs.rows().double()
    guide, model = pair.traces(x)
    point = guide.nodes["c/embedded"]["infer"]["point"]
    (found,) = torch.autograd.grad(model.nodes["x"]["fn"].log_prob(x).sum(), point)
    index = guide.nodes["c"]["value"]
    row = pair.model.codebooks["c"].table[index].movedim(-1, 1).clone().requires_grad_()
    assert torch.equal(guide.nodes["c/embedded"]["value"], row)  # to the last bit
    (want,) = torch.autograd.grad(pair.model.decoder({"c": row}).log_prob(x).sum(), row)
    assert torch.equal(found, want)
    assert float(found.abs().min()) > 0
    z = point.movedim(1, -1)
    assert torch.equal(index, (z[..., None, :] - pair.model.codebooks["c"].table).square().sum(-1).argmin(-1))


def test_only_the_codebook_loss_moves_a_codebook_by_gradients():
    pair, x = pairs.nearest(gradient=True), pairs.rows().double()
    terms = pair.terms(x)
    guide, _ = pair.traces(x)
    weight = pair.model.codebooks["c"].weight
    encoder = next(pair.guide.parameters())
    z = guide.nodes["c/embedded"]["infer"]["point"]
    e = weight[guide.nodes["c"]["value"]].movedim(-1, 1)
    distance = (z - e).square().sum((1, 2, 3))
    assert set(terms.penalties) == {"c/commitment", "c/codebook"}
    torch.testing.assert_close(terms.penalties["c/commitment"], 0.25 * distance)
    torch.testing.assert_close(terms.penalties["c/codebook"], distance)

    def slope(value: Tensor, of: Tensor) -> Tensor | None:
        return torch.autograd.grad(value.sum(), of, retain_graph=True, allow_unused=True)[0]

    assert slope(terms.reconstruction, weight) is None
    assert slope(terms.penalties["c/commitment"], weight) is None
    assert slope(terms.penalties["c/codebook"], encoder) is None
    torch.testing.assert_close(slope(terms.penalties["c/codebook"], weight), slope(distance, weight))
    torch.testing.assert_close(slope(terms.penalties["c/commitment"], encoder), 0.25 * slope(distance, encoder))


def test_averages_have_no_codebook_loss():
    pair = pairs.nearest(commitment=0.5)
    assert set(pair.terms(pairs.rows().double()).penalties) == {"c/commitment"}
    assert "model.codebooks.c.weight" not in dict(pair.named_parameters())


@pytest.mark.parametrize("closed_form", [False, True])
def test_a_certain_code_costs_positions_times_log_k(closed_form):
    pair, x = pairs.nearest(), pairs.rows().double()
    kl = pair.terms(x, closed_form=closed_form).kl["c"]
    assert (kl == kl[0]).all()
    assert float(kl[0]) == pytest.approx(4 * math.log(6), abs=1e-6)
    assert evaluate(pair, x, 0)["kl/c"] == pytest.approx(4 * math.log(6), abs=1e-6)


def test_the_evenness_loss_is_that_of_mean_soft_assignments():
    pair, x = pairs.nearest(evenness=0.7, softness=0.3), pairs.rows().double()
    guide, _ = pair.traces(x)
    z = guide.nodes["c/embedded"]["infer"]["point"].movedim(1, -1).reshape(-1, 5).detach().numpy()
    table = pair.model.codebooks["c"].table.numpy()
    score = -((z[:, None] - table) ** 2).sum(-1) / (0.3 * (z**2).sum(1).mean())
    share = np.exp(score - score.max(1, keepdims=True))
    share = (share / share.sum(1, keepdims=True)).mean(0)
    want = 0.7 * 4 * (math.log(6) - scipy.stats.entropy(share))
    np.testing.assert_allclose(pair.terms(x).penalties["c/evenness"].detach().numpy(), want, rtol=1e-5)


def test_a_child_of_a_nearest_code_reads_its_row():
    latents = {
        "c": {**pairs.NEAREST, "posterior": "nearest_code"},
        "z": {
            "dim": 2,
            "given": ["c"],
            "prior": {"kind": "conditional_normal", **pairs.NETWORK},
            "posterior": {"kind": "normal", "given": ["x", "c"]},
        },
    }
    pair = pairs.built(latents, ["z"])
    assert pair.check(pairs.rows()) == []
    pairs.minus_elbo(pair, pairs.rows(100)).backward()
    require_gradients(pair)
    assert pair.terms(pairs.rows(), particles=3).kl["z"].shape == (3, 5)
    assert "c/embedded" not in pair.layout.latents


@pytest.mark.parametrize("gradient", [False, True])
def test_a_fit_goes_on_bit_for_bit_in_the_middle_of_an_epoch(tmp_path, gradient):
    latent = {**pairs.NEAREST, "posterior": {"kind": "nearest_code", "decay": 0.8, "gradient": gradient}}
    data = Dataset.from_tensors(pairs.rows(100), validation=pairs.rows(30), test=pairs.rows(30))
    done = assert_resumes_exactly(pairs.small(latent, checkpoint_seconds=0.0), tmp_path, 7, data=data)
    assert (everything(done)["weights/model.codebooks.c.counts"] != 1).any()


def test_a_fit_starts_at_k_means_and_moves_from_there(tmp_path):
    run = pairs.fitted(pairs.small({**pairs.NEAREST, "posterior": "nearest_code"}, keep="last"), tmp_path)
    first = min((run.path / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert first
    book = run.pair.model.codebooks["c"]
    start = NearestCodebook(6, 5, 0.99, 1.0, False)
    fresh = pairs.small({**pairs.NEAREST, "posterior": "nearest_code"}).build((pairs.X,))
    begin(fresh, run.data.train, 20, 0)
    assert not torch.equal(fresh.model.codebooks["c"].weight, book.weight)
    assert float(fresh.model.codebooks["c"].counts.sum()) == pytest.approx(80, abs=1e-3)
    guide = fresh.guide_trace(run.data.train.x)
    z = guide.nodes["c/embedded"]["infer"]["point"].movedim(1, -1).reshape(-1, 5)
    index = guide.nodes["c"]["value"].reshape(-1)
    for k in range(6):  # every row is the mean of what is nearest to it
        torch.testing.assert_close(fresh.model.codebooks["c"].weight[k], z[index == k].mean(0), rtol=1e-4, atol=1e-4)
    del start


def test_a_second_stage_leaves_the_codebook_alone(tmp_path):
    run = pairs.fitted(pairs.small({**pairs.NEAREST, "posterior": "nearest_code"}), tmp_path)
    second = refit(run, "latents.c.prior.kind=categorical", device="cpu", progress=False)
    one, two = pairs.state(run.pair), pairs.state(second.pair)
    moved = [name for name in one if not torch.equal(one[name], two[name])]
    assert moved == []
    assert "model.priors.c.logits" in two
    assert two["model.priors.c.logits"].abs().max() > 0
