"""Traversals: one coordinate at a time, what follows it, and what stays."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, union-attr"

from __future__ import annotations

import numpy as np
import pytest
import torch

from pvae.analysis import encode, traverse
from pvae.analysis.samples.traversal import PRIOR_DRAWS
from pvae.errors import DeclarationError
from tests.samples import models
from tests.samples.models import MEANS, array, command, is_png, pair_of, refused, rows


def test_a_traversal_moves_one_coordinate_at_a_time():
    module, x = models.Linear(), rows(400, 3)
    pair = pair_of(module, 3)
    found = traverse(pair, x[0], rows=x, steps=5, span=2.0)
    loc, scale = array(x) @ array(module.g).T + array(module.c), array(module.scale)
    kl = (0.5 * (scale**2 + loc**2 - 1) - np.log(scale)).mean(0)
    assert found.dims == tuple(np.argsort(-kl).tolist())
    assert found.order == "KL"
    np.testing.assert_allclose(array(found.values), np.tile([-2, -1, 0, 1, 2], (2, 1)), atol=1e-6)
    for i, d in enumerate(found.dims):
        z = np.tile(loc[0], (5, 1))
        z[:, d] = [-2, -1, 0, 1, 2]
        np.testing.assert_allclose(array(found.x[i]), z @ array(module.w).T + array(module.b), atol=1e-5)


def test_a_traversal_without_data_starts_at_the_priors_mean():
    module = models.Linear()
    found = traverse(pair_of(module, 3), None, "z", dims=[1], steps=3, span=1.0)
    expected = array(module.b) + np.array([-1, 0, 1])[:, None] * array(module.w)[:, 1]
    np.testing.assert_allclose(array(found.x[0]), expected, atol=1e-6)
    assert found.dims == (1,)


def test_other_priors_are_crossed_by_their_own_spread():
    found = traverse(pair_of(models.Skewed(), 1), None, steps=3, span=2.0)
    n = PRIOR_DRAWS
    assert float(found.values[0, 1]) == pytest.approx(2, abs=4 / np.sqrt(n))  # Gamma(4, 2): mean 2, deviation 1
    assert float(found.values[0, 2] - found.values[0, 0]) / 4 == pytest.approx(1, abs=8 / np.sqrt(n))
    torch.testing.assert_close(found.x[0, :, 0], found.values[0])


def test_latents_below_follow_and_others_stay():
    pair, x = pair_of(models.Hierarchy(), 1), torch.tensor([[6.0]])
    top = traverse(pair, x, "z2", steps=3, span=1.0)
    np.testing.assert_allclose(array(top.x).ravel(), 3 * (2 * np.array([-1, 0, 1]) + 1), atol=1e-5)
    bottom = traverse(pair, x, "z1", steps=3, span=1.0)
    np.testing.assert_allclose(array(bottom.x).ravel(), 3 * array(bottom.values).ravel(), atol=1e-5)
    assert float(bottom.values[0, 2] - bottom.values[0, 0]) / 2 == pytest.approx(4.25**0.5, rel=0.12)


def test_two_latents_side_by_side_stay_where_the_row_put_them():
    found = traverse(pair_of(models.Beside(), 2), torch.tensor([0.3, 0.8]), "a", steps=3, span=1.0)
    torch.testing.assert_close(found.x[0], torch.tensor([[-3.0, 0.8], [0.0, 0.8], [3.0, 0.8]]))


def test_a_code_takes_all_its_values():
    found = traverse(pair_of(models.Mixture()), torch.tensor([2.9]), "b")
    assert found.values.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(found.x[0], MEANS[0])  # x = 2.9 is most likely of a = 0
    torch.testing.assert_close(traverse(pair_of(models.Mixture()), None, "a").x[0], torch.tensor([3.0, 1.0]))


def test_a_traversal_keeps_the_label(moons):
    x = moons.data.test.x[:1]
    found = traverse(moons, x, steps=3)
    assert sorted(found.dims) == [0, 1]
    own = encode(moons, x, mean=True)["z"]
    z = own.repeat(3, 1)
    z[:, found.dims[0]] = torch.tensor([-3.0, 0.0, 3.0])
    label = torch.nn.functional.one_hot(x[:, 2].long(), 2).float().repeat(3, 1)
    torch.testing.assert_close(found.x[0], moons.pair.model.decoder({"z": z, "y": label}).mean.detach())
    other = traverse(moons, None, steps=3, given={"y": 0})
    assert not torch.allclose(other.x, traverse(moons, None, steps=3, given={"y": 1}).x, atol=0.05)


def test_what_is_traversed_is_checked(digits, moons):
    x = digits.data.test.x
    message = r"latent: expected one of z; got 'zz' \(did you mean 'z'"
    refused(message, traverse, digits, x[0], "zz", by=DeclarationError)
    refused(r"coordinates of z, 0 .. 2; got \[3\]", traverse, digits, x[0], dims=[0, 3], by=DeclarationError)
    refused("expected one row of data; got 2", traverse, digits, x[:2])
    refused("steps=0", traverse, digits, x[0], steps=0)
    refused("beside a row", traverse, moons, moons.data.test.x[0], given={"y": 1}, by=DeclarationError)


def test_cli_traverse(folder, digits):
    out = command(folder, "traverse digits --dims 2,0 --steps 4 --row 5")
    path = digits.files.analysis / "traverse-z.npz"
    assert f"npz: {path}" in out
    with np.load(path, allow_pickle=False) as file:
        assert file["dims"].tolist() == [2, 0]
        expected = traverse(digits, digits.data.test.x[5], dims=(2, 0), steps=4)
        np.testing.assert_allclose(file["x"], expected.x, atol=1e-6)
    assert is_png(str(path.with_suffix(".png")))
    record = command(folder, "traverse moons --prior --given y=0 --json")
    assert record["shapes"]["x"] == [2, 9, 2]
