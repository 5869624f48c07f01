"""Mixtures, topics and factorised counts: enumeration, AutoDelta, local and global latents, deep exponential family."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor, nn
from torch.distributions import constraints

from tests.programs.amortised import Encoder
from tests.programs.program import Program, counts, normal

CENTRES = torch.tensor([-1.5, 0.5, 2.0])
WORDS, TOPICS = 6, 3


def mixture_with_points() -> Program:
    """The tutorial's mixture: weights, centres and scale are points (AutoDelta), assignments are summed out."""

    @config_enumerate
    def model(x: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(3)))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
        with pyro.plate("components", 3):
            locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            c = pyro.sample("assignment", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(locs[c], scale), obs=x)

    start = {"weights": torch.ones(3) / 3, "scale": torch.tensor(0.8), "locs": CENTRES}
    guide = AutoDelta(
        poutine.block(model, expose=["weights", "scale", "locs"]), init_loc_fn=init_to_value(values=start)
    )
    x = normal(20, 40, 1.5)
    log_x = dist.Normal(CENTRES, 0.8).log_prob(x[:, None]).logsumexp(1) - torch.tensor(3.0).log()
    prior = dist.Dirichlet(0.5 * torch.ones(3)).log_prob(start["weights"])
    prior = prior + dist.LogNormal(0.0, 2.0).log_prob(start["scale"]) + dist.Normal(0.0, 10.0).log_prob(CENTRES).sum()
    # evidence is conditional on the points; the surgery's figure is the log joint at them
    return Program(model, guide, x, float(log_x.mean()), elbo=lambda: log_x.mean() + prior / 20)


def mixture_with_parameters() -> Program:
    """Components are parameters; assignments are summed out of the model, the guide is empty."""

    def model(x: Tensor) -> None:
        locs = pyro.param("locs", CENTRES.clone())
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(3) / 3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(locs[c], 0.8), obs=x)

    def guide(x: Tensor) -> None:
        pass

    x = normal(20, 41, 1.5)
    log_x = dist.Normal(CENTRES, 0.8).log_prob(x[:, None]).logsumexp(1) - torch.tensor(3.0).log()
    log_p = float(log_x.mean())
    return Program(model, guide, x, log_p, elbo=lambda: log_p)


def mixture_with_amortised_assignments() -> Program:
    """The guide's assignments are enumerated, so that its expectation is exact."""

    def model(x: Tensor) -> None:
        locs = pyro.param("locs", CENTRES.clone())
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Normal(locs[c], 0.8), obs=x)

    def guide(x: Tensor) -> None:
        sharp = pyro.param("sharp", torch.tensor(0.7), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            q = dist.Categorical(logits=-sharp * (x[:, None] - CENTRES) ** 2)
            pyro.sample("c", q, infer={"enumerate": "parallel"})

    x = normal(20, 42, 1.5)
    log_x = dist.Normal(CENTRES, 0.8).log_prob(x[:, None]).logsumexp(1) - torch.tensor(3.0).log()
    return Program(model, guide, x, float(log_x.mean()))


def mixture_with_normal_centres() -> Program:
    """Centres have a prior and an AutoNormal, assignments are summed out given them."""

    @config_enumerate
    def model(x: Tensor) -> None:
        with pyro.plate("components", 3):
            locs = pyro.sample("locs", dist.Normal(CENTRES, 1.0))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Normal(locs[c], 0.8), obs=x)

    return Program(model, AutoNormal(poutine.block(model, hide=["c"])), normal(20, 43, 1.5))


def prod_lda() -> Program:
    """Documents as counts of words; logistic-normal topics, a decoder with batch normalisation."""
    encoder, beta, norm = Encoder(WORDS, TOPICS), nn.Linear(TOPICS, WORDS, bias=False), nn.BatchNorm1d(WORDS)

    def model(docs: Tensor) -> None:
        pyro.module("beta", beta)
        pyro.module("norm", norm)
        with pyro.plate("documents", docs.shape[0]):
            theta = pyro.sample("logtheta", dist.Normal(docs.new_zeros(len(docs), TOPICS), 1.0).to_event(1)).softmax(-1)
            flat = beta(theta).reshape(-1, WORDS)
            probs = norm(flat).reshape(*theta.shape[:-1], WORDS).softmax(-1)
            total = int(docs.sum(-1).max())
            pyro.sample("obs", dist.Multinomial(total, probs, validate_args=False), obs=docs)

    def guide(docs: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("documents", docs.shape[0]):
            pyro.sample("logtheta", dist.Normal(*encoder(docs)).to_event(1))

    return Program(model, guide, counts((20, WORDS), 1.5, 44))


def lda() -> Program:
    """Topics are global, proportions local, the topic of every word summed out in a plate inside the documents."""
    encoder = nn.Linear(4, TOPICS)

    @config_enumerate
    def model(docs: Tensor) -> None:
        with pyro.plate("topics", TOPICS):
            topic_words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(WORDS)))
        with pyro.plate("documents", len(docs), dim=-2):
            theta = pyro.sample("theta", dist.Dirichlet(torch.ones(1, TOPICS)))
            with pyro.plate("words", docs.shape[1], dim=-1):
                topic = pyro.sample("topic", dist.Categorical(theta))
                words = topic_words.squeeze(-3) if topic_words.dim() > 3 else topic_words
                pyro.sample("word", dist.Categorical(words[..., topic, :]), obs=docs)

    def guide(docs: Tensor) -> None:
        pyro.module("encoder", encoder)
        start = 0.5 + torch.rand((TOPICS, WORDS), generator=torch.Generator().manual_seed(45))
        concentration = pyro.param("concentration", start, constraint=constraints.positive)
        with pyro.plate("topics", TOPICS):
            pyro.sample("topic_words", dist.Dirichlet(concentration))
        with pyro.plate("documents", len(docs), dim=-2):
            alpha = nn.functional.softplus(encoder(docs.float())) + 0.5
            pyro.sample("theta", dist.Dirichlet(alpha[:, None]))

    docs = torch.randint(WORDS, (12, 4), generator=torch.Generator().manual_seed(46))
    return Program(model, guide, docs, plates=2)


def lda_of_counts() -> Program:
    """Latent Dirichlet allocation with the topics of words summed by hand; local latents only."""
    topics = dist.Dirichlet(torch.ones(WORDS)).sample((TOPICS,))
    encoder = nn.Linear(WORDS, TOPICS)

    def model(docs: Tensor) -> None:
        words = pyro.param("topics", topics, constraint=constraints.simplex)
        with pyro.plate("documents", len(docs)):
            theta = pyro.sample("theta", dist.Dirichlet(torch.ones(TOPICS)))
            pyro.sample("docs", dist.Multinomial(9, theta @ words, validate_args=False), obs=docs)

    def guide(docs: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("documents", len(docs)):
            pyro.sample("theta", dist.Dirichlet(nn.functional.softplus(encoder(docs)) + 0.5))

    return Program(model, guide, counts((20, WORDS), 1.5, 47))


def poisson_factorisation() -> Program:
    """Gamma factors of rows (local) and of columns (global), Poisson counts."""

    def model(x: Tensor) -> None:
        with pyro.plate("columns", WORDS):
            items = pyro.sample("items", dist.Gamma(2 * torch.ones(2), 2.0).to_event(1))
        with pyro.plate("users", len(x)):
            taste = pyro.sample("taste", dist.Gamma(2 * torch.ones(2), 2.0).to_event(1))
            pyro.sample("x", dist.Poisson(taste @ items.transpose(-1, -2)).to_event(1), obs=x)

    encoder = Encoder(WORDS, 2)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        loc = pyro.param("loc", 0.3 * normal((WORDS, 2), 48))
        scale = pyro.param("scale", 0.3 * torch.ones(WORDS, 2), constraint=constraints.positive)
        with pyro.plate("columns", WORDS):
            pyro.sample("items", dist.LogNormal(loc, scale).to_event(1))
        with pyro.plate("users", len(x)):
            pyro.sample("taste", dist.LogNormal(*encoder(x)).to_event(1))

    return Program(model, guide, counts((20, WORDS), 1.5, 49))


def deep_exponential_family() -> Program:
    """Two layers of sparse gamma latents with global weights, as in Pyro's sparse gamma DEF, amortised by hand."""
    encoder = nn.Linear(WORDS, 4)

    def model(x: Tensor) -> None:
        with pyro.plate("w_top_plate", 2):
            top = pyro.sample("w_top", dist.Gamma(0.8 * torch.ones(2), 0.8).to_event(1))
        with pyro.plate("w_bottom_plate", 2):
            bottom = pyro.sample("w_bottom", dist.Gamma(0.8 * torch.ones(WORDS), 0.8).to_event(1))
        with pyro.plate("data", len(x)):
            z_top = pyro.sample("z_top", dist.Gamma(0.8 * torch.ones(2), 0.8).to_event(1))
            mean = z_top @ top
            z_bottom = pyro.sample("z_bottom", dist.Gamma(0.8 * torch.ones(2), 0.8 / mean).to_event(1))
            pyro.sample("obs", dist.Poisson(z_bottom @ bottom).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        for name, width in (("top", 2), ("bottom", WORDS)):
            shape = pyro.param(f"shape_{name}", 3 * torch.ones(2, width), constraint=constraints.positive)
            with pyro.plate(f"w_{name}_plate", 2):
                pyro.sample(f"w_{name}", dist.Gamma(shape, 3.0).to_event(1))
        shape = nn.functional.softplus(encoder(x)) + 1.0
        with pyro.plate("data", len(x)):
            pyro.sample("z_top", dist.Gamma(shape[..., :2], 2.0).to_event(1))
            pyro.sample("z_bottom", dist.Gamma(shape[..., 2:], 2.0).to_event(1))

    return Program(model, guide, counts((20, WORDS), 1.5, 50))
