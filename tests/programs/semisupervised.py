"""Programs with labels: known for all rows, for none, for some (-1 elsewhere), and SCANVI's classification term."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from torch import Tensor, nn

from tests.programs.amortised import Encoder, decoder
from tests.programs.program import Program, bits, counts, normal

CLASSES = 3


def joined(a: Tensor, b: Tensor) -> Tensor:
    """Two inputs of a network side by side, whatever batch dimensions a label that is summed over adds."""
    shape = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return torch.cat([a.expand(*shape, a.shape[-1]), b.expand(*shape, b.shape[-1])], -1)


def labelled(rows: int, known: int) -> Tensor:
    """Rows of four bits, then the label: -1 where it is unknown."""
    label = torch.where(torch.arange(rows) % rows < known, torch.arange(rows) % CLASSES, torch.tensor(-1))
    return torch.cat([bits((rows, 4), 20), label[:, None].float()], 1)


def m1_then_m2() -> Program:
    """Known labels are observed under a mask, unknown ones summed over: `obs_mask` in the model."""
    encoder, classify, net = Encoder(4 + CLASSES, 2), nn.Linear(4, CLASSES), decoder(2 + CLASSES, 4)

    def model(data: Tensor) -> None:
        pyro.module("net", net)
        x, label = data[..., :4], data[..., 4].long()
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            prior = dist.Categorical(torch.ones(CLASSES) / CLASSES)
            y = pyro.sample("y", prior, obs=label.clamp(min=0), obs_mask=label >= 0)
            one_hot = nn.functional.one_hot(y, CLASSES).float()
            pyro.sample("x", dist.Bernoulli(logits=net(joined(z, one_hot))).to_event(1), obs=x)

    def guide(data: Tensor) -> None:
        pyro.module("encoder", encoder)
        pyro.module("classify", classify)
        x, label = data[..., :4], data[..., 4].long()
        with pyro.plate("data", len(data)):
            with poutine.mask(mask=label < 0):
                q = dist.Categorical(logits=classify(x))
                y = pyro.sample("y_unobserved", q, infer={"enumerate": "parallel"})
            y = torch.where(label >= 0, label, y)
            one_hot = nn.functional.one_hot(y, CLASSES).float()
            pyro.sample("z", dist.Normal(*encoder(joined(x, one_hot))).to_event(1))

    return Program(model, guide, labelled(20, 12))


def m2(known: int, summed: bool) -> Program:
    """Kingma's M2 with a one-hot label: of all rows, or of none (then summed over or drawn)."""
    encoder, classify, net = Encoder(4 + CLASSES, 2), nn.Linear(4, CLASSES), decoder(2 + CLASSES, 4)
    observed = known > 0

    def model(data: Tensor) -> None:
        pyro.module("net", net)
        x = data[..., :4]
        label = nn.functional.one_hot(data[..., 4].long().clamp(min=0), CLASSES).float() if observed else None
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(len(x), CLASSES) / CLASSES), obs=label)
            pyro.sample("x", dist.Bernoulli(logits=net(joined(z, y))).to_event(1), obs=x)

    def guide(data: Tensor) -> None:
        pyro.module("encoder", encoder)
        x = data[..., :4]
        with pyro.plate("data", len(data)):
            if observed:
                y = nn.functional.one_hot(data[..., 4].long().clamp(min=0), CLASSES).float()
            else:
                pyro.module("classify", classify)
                y = pyro.sample("y", dist.OneHotCategorical(logits=classify(x)))
            pyro.sample("z", dist.Normal(*encoder(joined(x, y))).to_event(1))

    return Program(model, config_enumerate(guide) if summed else guide, labelled(20, known))


def m2_with_all_labels() -> Program:
    return m2(20, False)


def m2_without_labels_summed() -> Program:
    return m2(0, True)


def m2_without_labels_drawn() -> Program:
    return m2(0, False)


def m2_two_losses() -> Program:
    """Pyro's SS-VAE example: a supervised loss, and a classification term scaled by 0.5 in the guide."""
    encoder, classify, net = Encoder(4 + CLASSES, 2), nn.Linear(4, CLASSES), decoder(2 + CLASSES, 4)

    def one_hot(data: Tensor) -> Tensor:
        return nn.functional.one_hot(data[..., 4].long(), CLASSES).float()

    def model(data: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(CLASSES) / CLASSES), obs=one_hot(data))
            pyro.sample("x", dist.Bernoulli(logits=net(joined(z, y))).to_event(1), obs=data[..., :4])

    def guide(data: Tensor) -> None:
        pyro.module("encoder", encoder)
        pyro.module("classify", classify)
        with pyro.plate("data", len(data)):
            q = dist.OneHotCategorical(logits=classify(data[..., :4]))
            pyro.factor("classification", -0.5 * q.log_prob(one_hot(data)), has_rsample=False)
            pyro.sample("z", dist.Normal(*encoder(joined(data[..., :4], one_hot(data)))).to_event(1))

    return Program(model, guide, labelled(20, 20), bound=(model, poutine.block(guide, hide=["classification"])))


def scanvi() -> Program:
    """Counts with a library size, two latents and a label, of which the guide has a classification term."""
    upper, lower, size = Encoder(1 + CLASSES, 1), Encoder(4, 1), Encoder(4, 1)
    prior, classify, net = Encoder(1 + CLASSES, 1), nn.Linear(1, CLASSES), decoder(1, 4)

    def one_hot(y: Tensor) -> Tensor:
        return nn.functional.one_hot(y, CLASSES).float()

    def model(x: Tensor, label: Tensor) -> None:
        pyro.module("net", net)
        pyro.module("prior", prior)
        with pyro.plate("batch", len(x)):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(logits=torch.zeros(CLASSES)), obs=one_hot(label))
            z2 = pyro.sample("z2", dist.Normal(*prior(joined(z1, y))).to_event(1))
            total = pyro.sample("l", dist.LogNormal(1.5, 0.5))
            rate = net(z2).softmax(-1) * total[..., None]
            pyro.sample("x", dist.NegativeBinomial(3.0, probs=rate / (rate + 3.0)).to_event(1), obs=x)

    def guide(x: Tensor, label: Tensor) -> None:
        for name, net in (("upper", upper), ("lower", lower), ("size", size), ("classify", classify)):
            pyro.module(name, net)
        seen = (1 + x).log()
        with pyro.plate("batch", len(x)):
            z2 = pyro.sample("z2", dist.Normal(*lower(seen)).to_event(1))
            loc, scale = size(seen)
            pyro.sample("l", dist.LogNormal(1.5 + loc[..., 0], scale[..., 0]))
            q = dist.OneHotCategorical(logits=classify(z2))
            pyro.factor("classification", -5.0 * q.log_prob(one_hot(label)), has_rsample=False)
            pyro.sample("z1", dist.Normal(*upper(joined(z2, one_hot(label)))).to_event(1))

    data = counts((20, 4), 1.5, 21), torch.arange(20) % CLASSES
    return Program(model, guide, data, bound=(model, poutine.block(guide, hide=["classification"])))


def ssivae() -> Program:
    """pyroVED's semi-supervised VAE on unlabelled rows: the class is summed over, plates have no size."""
    encoder, classify, net = Encoder(4 + CLASSES, 2), decoder(4, CLASSES), decoder(2 + CLASSES, 4)

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(x.new_ones(len(x), CLASSES) / CLASSES))
            loc = net(joined(z, y)).sigmoid()
            pyro.sample("x", dist.ContinuousBernoulli(loc).to_event(1), obs=x)

    @config_enumerate
    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        pyro.module("classify", classify)
        with pyro.plate("data"):
            y = pyro.sample("y", dist.OneHotCategorical(logits=classify(x)))
            pyro.sample("z", dist.Normal(*encoder(joined(x, y))).to_event(1))

    return Program(model, guide, normal((16, 4), 22).sigmoid())


def ss_regression_vae() -> Program:
    """pyroVED's semi-supervised regression VAE: a continuous property, known for the first rows, drawn for others."""
    encoder, regress, net = Encoder(5, 2), Encoder(4, 1), decoder(3, 4)

    def model(data: Tensor) -> None:
        pyro.module("net", net)
        x, y, known = data[..., :4], data[..., 4:5], data[..., 5] > 0
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            y = pyro.sample("y", dist.Normal(torch.zeros(1), 1.0).to_event(1), obs=y, obs_mask=known)
            pyro.sample("x", dist.Normal(net(joined(z, y)), 0.7).to_event(1), obs=x)

    def guide(data: Tensor) -> None:
        pyro.module("encoder", encoder)
        pyro.module("regress", regress)
        x, y, known = data[..., :4], data[..., 4:5], data[..., 5] > 0
        with pyro.plate("data", len(data)):
            with poutine.mask(mask=~known):
                drawn = pyro.sample("y_unobserved", dist.Normal(*regress(x)).to_event(1))
            y = torch.where(known[..., None], y, drawn)
            pyro.sample("z", dist.Normal(*encoder(joined(x, y))).to_event(1))

    known = (torch.arange(20)[:, None] < 8).float()
    return Program(model, guide, torch.cat([normal((20, 5), 23), known], 1))
