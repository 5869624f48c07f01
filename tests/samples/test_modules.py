"""Plain decoders and encoders: closed forms, the traces of the pair itself, and what is refused."""

# Programs of a pair have no types.
# mypy: disable-error-code="attr-defined"

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor

from pvae.analysis import encode
from pvae.analysis.samples.modules import PlainDecoder, PlainEncoder
from pvae.errors import DataError, DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.experiment.zoo import names
from pvae.pair.layout import samples
from pvae.pair.pair import Pair
from tests.samples.models import Linear
from tests.zoo_runs import declared

NO_MEAN = {"iaf_posterior", "flow_dequantised", "flow_variational", "relaxed_flow_prior"}
"""Entries whose posteriors have no known mean: flows, noise in cells, relaxed values without codes."""


def tiny_pair(name: str) -> Pair:
    experiment = declared(name)
    pair = experiment.build((2,) if name == "flow" else (1, 8, 8)).eval()
    return pair.attend(torch.rand(50, *pair.frame.row))


def inputs_of(pair: Pair, rows: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Rows, their data on grey levels, and their covariates."""
    x = torch.randint(17, (rows, *pair.frame.x)) / 16
    x = x.round() if pair.model.decoder.likelihood.__class__.__name__ == "ElementsModule" else x
    codes = {
        name: torch.randint(entry.codes, (rows, *entry.shape)) if entry.codes else x.flatten(1).sum(1, keepdim=True)
        for name, entry in pair.frame.covariates.items()
    }
    whole = pair.frame.blank(rows)  # in which no value of a latent is known
    if pair.frame.entries:
        given = [
            codes[name].reshape(rows, -1) if name in codes else t[:, None]
            for name, t in pair.frame.columns(whole).items()
        ]
        whole = torch.cat([x.flatten(1), *given], 1)
    else:
        whole = x
    return whole.to(next(pair.parameters())), x, codes


@pytest.mark.parametrize("name", names())
@torch.no_grad()
def test_every_decoder_and_encoder_is_that_of_the_pair(name):
    torch.manual_seed(0)
    pair = tiny_pair(name)
    rows, x, codes = inputs_of(pair, 5)
    decoder = PlainDecoder(pair)
    values = {
        key: torch.randint(count, (5, *shape)) if count else torch.rand(5, *shape).to(rows)
        for key, (shape, count) in decoder.inputs.items()
    } | {key: t for key, t in codes.items() if key in decoder.inputs}
    nodes = samples(pair.model_trace(rows, {key: t for key, t in values.items() if key not in codes}))
    assert decoder(**values).shape == (5, *pair.frame.x)
    torch.testing.assert_close(decoder(**values), nodes["x"]["fn"].mean)
    assert {t.data_ptr() for t in decoder.parameters()} <= {t.data_ptr() for t in pair.parameters()}
    if name == "gan":
        with pytest.raises(DeclarationError, match="GAN"):
            PlainEncoder(pair)
        return
    encoder = PlainEncoder(pair)
    given = {key: t for key, t in codes.items() if key in encoder.inputs}
    if name in NO_MEAN:
        with pytest.raises(DeclarationError, match="known mean"):
            encoder(x, **given)
        assert encoder.distribution(x, **given).sample().shape[0] == 5
        return
    found = encoder(x, **given)
    wanted = encode(pair, rows, mean=True)
    assert encoder.outputs == tuple(wanted.latents)
    for key, value in (found if isinstance(found, dict) else {encoder.outputs[0]: found}).items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-5, atol=1e-5, msg=key)


@torch.no_grad()
def test_a_linear_pair_has_linear_maps():
    pair = Experiment.from_dict({
        "name": "linear", "data": {"source": "toy"}, "latents": {"z": {"dim": 2}},
        "encoder": {"network": {"kind": "mlp", "hidden": []}},
        "decoder": {"network": {"kind": "mlp", "hidden": []}, "likelihood": {"kind": "normal"}},
    }).build((3,))  # fmt: skip
    decoder, encoder, z, x = PlainDecoder(pair), PlainEncoder(pair), torch.randn(4, 2), torch.randn(4, 3)
    weights = decoder.state_dict()
    expected = z @ weights["decoder.network.head.weight"].T + weights["decoder.network.head.bias"]
    torch.testing.assert_close(decoder(z), expected)
    torch.testing.assert_close(decoder(z=z), expected)
    weight, bias = (encoder.state_dict()[f"guide.posteriors.z.network.head.{key}"] for key in ("weight", "bias"))
    torch.testing.assert_close(encoder(x), x @ weight[:2].T + bias[:2])
    assert not decoder.training
    assert not encoder.model


@torch.no_grad()
def test_a_code_that_is_summed_out_follows_bayes():
    pair = declared("em_mixture").build((1, 8, 8))
    decoder, encoder, x = PlainDecoder(pair), PlainEncoder(pair), torch.rand(6, 64)
    fns = [decoder.distribution(torch.tensor([k])) for k in range(10)]
    scores = [multivariate_normal(fn.mean.flatten(), (fn.scale_tril @ fn.scale_tril.mT)[0]).logpdf(x) for fn in fns]
    prior = pair.model.prior("c", {}).probs.numpy()
    joint = np.log(prior)[:, None] + np.array(scores)
    exact = np.exp(joint - np.logaddexp.reduce(joint, 0)).T
    np.testing.assert_allclose(encoder.distribution(x.view(6, 1, 8, 8)).probs, exact, atol=1e-6)


def test_what_a_module_does_not_take_is_told():
    conditional, codes = (PlainDecoder(tiny_pair(name)) for name in ("conditional", "categorical_vae"))
    z = torch.zeros(3, 16)
    with pytest.raises(DataError, match=r"expected z \(n, 16\), y \(n\) of whole numbers 0 .. 9; got z\."):
        conditional(z)
    with pytest.raises(DataError, match=r"got z \[3, 4\]"):
        conditional(torch.zeros(3, 4), y=torch.zeros(3).long())
    with pytest.raises(DataError, match="got y from 0 to 10"):
        conditional(z, y=torch.tensor([0, 3, 10]))
    with pytest.raises(DataError, match=r"got c \[3\] of torch.float32"):
        codes(torch.zeros(3))
    with pytest.raises(DataError, match="got one tensor"):
        PlainDecoder(tiny_pair("hvae"))(z)
    with pytest.raises(DataError, match=r"features by name, z; got one tensor\. Call run.decoder\(z\)"):
        tiny_pair("vae").model.decoder(z)
    with pytest.raises(DeclarationError, match="hand-written"):
        PlainDecoder(Pair((own := Linear()).model, own.guide))


def test_a_negative_size_of_counts_is_refused():
    decoder = PlainDecoder(tiny_pair("cells"))
    size = decoder(torch.zeros(2, 10), library=torch.full((2, 1), 30.0)).flatten(1).sum(1)
    torch.testing.assert_close(size, torch.full((2,), 30.0))
    with pytest.raises(DataError, match="got library from -3 to -3"):
        decoder(torch.zeros(2, 10), library=torch.full((2, 1), -3.0))
