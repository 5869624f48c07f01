"""Amortised programs: autoencoders of bits, conditional ones, flows, levels, relaxed codes, invariant ones."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.easyguide import easy_guide
from pyro.distributions.transforms import affine_autoregressive
from pyro.infer import config_enumerate
from torch import Tensor, nn

from tests.programs.program import Program, bits, counts, gaussian_log_p, normal


class Encoder(nn.Module):
    """Means and scales of a diagonal normal."""

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        self.hidden, self.loc, self.log_scale = nn.Linear(inputs, 8), nn.Linear(8, dim), nn.Linear(8, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.hidden(x).tanh()
        return self.loc(h), (0.3 * self.log_scale(h)).exp()


def decoder(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


class PlainVAE(nn.Module):
    """The first VAE of Pyro's tutorials: two methods of one Module."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(6, 2), decoder(2, 6)

    def model(self, x: Tensor) -> Tensor:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, z_scale = x.new_zeros(len(x), 2), x.new_ones(len(x), 2)
            z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))
            probs = self.decoder(z).sigmoid()
            pyro.sample("obs", dist.Bernoulli(probs, validate_args=False).to_event(1), obs=x)
        return probs

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, scale = self.encoder(x)
            pyro.sample("latent", dist.Normal(loc, scale).to_event(1))


def vae() -> Program:
    made = PlainVAE()
    return Program(made.model, made.guide, bits((20, 6)))


def factor_analysis() -> Program:
    w, noise = nn.Parameter(normal((2, 4), 1)), nn.Parameter(torch.tensor([0.5, 0.7, 0.9, 1.1]))

    def model(x: Tensor) -> None:
        loadings, scale = pyro.param("loadings", w), pyro.param("noise", noise, constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ loadings, scale).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        to_mean = pyro.param("to_mean", normal((4, 2), 2, 0.2))
        root = pyro.param("root", 0.6 * torch.eye(2), constraint=dist.constraints.lower_cholesky)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(x @ to_mean, scale_tril=root))

    x, loadings = normal((20, 4), 3, 1.4), normal((2, 4), 1)
    scale = torch.tensor([0.5, 0.7, 0.9, 1.1])
    return Program(model, guide, x, gaussian_log_p(x, loadings.T @ loadings + scale.pow(2).diag()))


def conditional_vae() -> Program:
    """The prior reads one half of an image, the decoder the latent, as in Pyro's CVAE."""
    nets = nn.ModuleDict({"prior": Encoder(3, 2), "recognition": Encoder(6, 2), "generation": decoder(2, 3)})

    def model(xs: Tensor, ys: Tensor) -> None:
        pyro.module("nets", nets)
        with pyro.plate("data", len(xs)):
            z = pyro.sample("z", dist.Normal(*nets["prior"](xs)).to_event(1))
            pyro.sample("y", dist.Bernoulli(logits=nets["generation"](z)).to_event(1), obs=ys)

    def guide(xs: Tensor, ys: Tensor) -> None:
        with pyro.plate("data", len(xs)):
            pyro.sample("z", dist.Normal(*nets["recognition"](torch.cat([xs, ys], -1))).to_event(1))

    return Program(model, guide, (bits((20, 3), 4), bits((20, 3), 5)))


def vae_with_labels() -> Program:
    """The label is given to decoder and encoder; the prior is one for all rows."""
    encoder, net = Encoder(7, 2), decoder(5, 4)

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            label = x[:, 4:].expand(*z.shape[:-1], 3)
            pyro.sample("x", dist.Bernoulli(logits=net(torch.cat([z, label], -1))).to_event(1), obs=x[:, :4])

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*encoder(x)).to_event(1))

    labels = torch.eye(3)[torch.arange(20) % 3]
    return Program(model, guide, torch.cat([bits((20, 4), 5), labels], 1))


def vae_with_flow() -> Program:
    """An inverse autoregressive flow on an amortised normal."""
    encoder, net, flow = Encoder(6, 2), decoder(2, 6), affine_autoregressive(2, [6])

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(*encoder(x)).to_event(1), [flow]))

    return Program(model, guide, bits((20, 6), 6))


def vae_of_two_levels() -> Program:
    """Top-down priors; the guide infers the upper level from the lower one."""
    net, prior, up, low = decoder(2, 5), Encoder(1, 2), Encoder(2, 1), Encoder(5, 2)

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        pyro.module("prior", prior)
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(*prior(z2)).to_event(1))
            pyro.sample("x", dist.Normal(net(z1), 0.6).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("low", low)
        pyro.module("up", up)
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(*low(x)).to_event(1))
            pyro.sample("z2", dist.Normal(*up(z1)).to_event(1))

    return Program(model, guide, normal((20, 5), 7))


def vae_with_mixture_prior() -> Program:
    encoder, net = Encoder(4, 2), decoder(2, 4)

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        centres, logits = pyro.param("centres", normal((3, 2), 8)), pyro.param("logits", torch.zeros(3))
        mixture = dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(centres, 0.7).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", mixture)
            pyro.sample("x", dist.Normal(net(z), 0.8).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*encoder(x)).to_event(1))

    return Program(model, guide, normal((20, 4), 9))


def relaxed_one_hot_vae() -> Program:
    """Straight-through codes of Pyro; the surgery's `elbo` is that of the discrete codes, here summed over them."""
    w, centres = 0.5 * normal((4, 3), 10), normal((3, 4), 11)
    temperature = torch.tensor(0.6)

    def model(x: Tensor) -> None:
        c0 = pyro.param("centres", centres)
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.RelaxedOneHotCategoricalStraightThrough(temperature, logits=torch.zeros(3)))
            pyro.sample("x", dist.Normal(c @ c0, 0.9).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        to_logits = pyro.param("to_logits", w)
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.RelaxedOneHotCategoricalStraightThrough(temperature, logits=x @ to_logits))

    x = normal((20, 4), 12)
    log_x = dist.Normal(centres, 0.9).to_event(1).log_prob(x[:, None])
    log_q = (x @ w).log_softmax(-1)
    elbo = (log_q.exp() * (log_x - math.log(3) - log_q)).sum(1).mean()
    log_p = (log_x - math.log(3)).logsumexp(1).mean()
    return Program(model, guide, x, float(log_p), elbo=lambda: elbo)


def easy_guide_of_rows() -> Program:
    """An EasyGuide of one group, whose sites are unpacked from one normal."""
    encoder = Encoder(3, 2)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.LogNormal(0.0, 0.5))
            pyro.sample("x", dist.Normal(a[..., None], b[..., None]).expand([*b.shape, 3]).to_event(1), obs=x)

    @easy_guide(model)
    def guide(self: Any, x: Tensor) -> None:
        pyro.module("encoder", encoder)
        group = self.group(match="a|b")
        with self.plate("data", len(x)):
            loc, scale = encoder(x)
            group.sample("ab", dist.Normal(loc, 0.3 * scale).to_event(1))

    return Program(model, guide, normal((20, 3), 13))


def poisson_vae() -> Program:
    """Counts with a gamma latent, whose posterior is a log-normal."""
    encoder, net = Encoder(4, 2), nn.Linear(2, 4)

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2 * torch.ones(2), 2.0).to_event(1))
            pyro.sample("x", dist.Poisson(nn.functional.softplus(net(z)) + 0.1).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(*encoder(x)).to_event(1))

    return Program(model, guide, counts((20, 4), 2.0, 14))


# ------------------------------------------------------------------ in the manner of pyroVED

GRID = torch.stack(torch.meshgrid(torch.linspace(-1, 1, 3), torch.linspace(-1, 1, 3), indexing="ij"), -1).reshape(-1, 2)


def turned(angle: Tensor) -> Tensor:
    """The nine points of the grid, turned by an angle, `(..., 9, 2)`."""
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)
    return GRID @ rotation


def spatial_logits(net: nn.Module, angle: Tensor, content: Tensor) -> Tensor:
    """Pixels of a decoder of coordinates, turned by the angle."""
    points = turned(angle)
    wide = content[..., None, :].expand(*points.shape[:-1], content.shape[-1])
    return net(torch.cat([points, wide], -1))[..., 0]


def invariant_vae() -> Program:
    """iVAE: the first coordinate of the latent turns the grid on which the decoder is evaluated."""
    encoder, net = Encoder(9, 3), decoder(4, 1)

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("latent", dist.Normal(torch.zeros(len(x), 3), 1.0).to_event(1))
            angle, content = z[..., 0], z[..., 1:]
            pyro.sample("obs", dist.Bernoulli(logits=spatial_logits(net, angle, content)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("latent", dist.Normal(*encoder(x)).to_event(1))

    return Program(model, guide, bits((16, 9), 15))


def joint_invariant_vae() -> Program:
    """jiVAE: continuous and one-hot latents, the latter summed over, in plates without a size."""
    encoder, to_class, net = Encoder(9, 2), nn.Linear(9, 3), decoder(6, 1)

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data"):
            z = pyro.sample("latent_cont", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            c = pyro.sample("latent_disc", dist.OneHotCategorical(torch.ones(len(x), 3) / 3))
            angle, content = torch.broadcast_tensors(z[..., :1], c)[0][..., 0], c
            shift = z[..., 1:].expand(*angle.shape, 1)
            logits = spatial_logits(net, angle, torch.cat([shift, content.expand(*angle.shape, 3)], -1))
            pyro.sample("obs", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    @config_enumerate
    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        pyro.module("to_class", to_class)
        with pyro.plate("data"):
            pyro.sample("latent_cont", dist.Normal(*encoder(x)).to_event(1))
            pyro.sample("latent_disc", dist.OneHotCategorical(logits=to_class(x)))

    return Program(model, guide, bits((16, 9), 16))
