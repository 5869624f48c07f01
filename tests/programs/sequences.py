"""Programs in time: deep Markov models of ragged sequences, hidden Markov models, a linear one, an image of steps."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.transforms import affine_autoregressive
from pyro.infer import config_enumerate
from torch import Tensor, nn

from tests.programs.amortised import Encoder, decoder
from tests.programs.program import Program, bits, gaussian_log_p, normal

STEPS = 4


def ragged(rows: int, seed: int = 30) -> tuple[Tensor, Tensor]:
    """Sequences of 1 to 4 steps of two bits, padded, and their lengths."""
    lengths = 1 + torch.arange(rows) % STEPS
    present = (torch.arange(STEPS) < lengths[:, None]).float()
    return bits((rows, STEPS, 2), seed) * present[..., None], lengths


def deep_markov(with_flow: bool = False) -> Program:
    """Pyro's DMM: a gated transition, an emitter, a recurrent guide, masks of the lengths; T is the batch's longest."""
    transition, emitter = Encoder(2, 2), decoder(2, 2)
    rnn, combiner = nn.RNN(2, 4, batch_first=True), Encoder(6, 2)
    flow: Any = affine_autoregressive(2, [6]) if with_flow else None

    def model(x: Tensor, lengths: Tensor) -> None:
        pyro.module("transition", transition)
        pyro.module("emitter", emitter)
        z = pyro.param("z_0", torch.zeros(2)).expand(len(x), 2)
        with pyro.plate("z_minibatch", len(x)):
            for t in pyro.markov(range(int(lengths.max()))):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t + 1}", dist.Normal(*transition(z)).to_event(1))
                    pyro.sample(f"obs_x_{t + 1}", dist.Bernoulli(logits=emitter(z)).to_event(1), obs=x[:, t])

    def guide(x: Tensor, lengths: Tensor) -> None:
        for name, net in (("rnn", rnn), ("combiner", combiner), ("flow", flow)):
            if net is not None:
                pyro.module(name, net)
        h = rnn(x.flip(1))[0].flip(1)
        z = pyro.param("z_q_0", torch.zeros(2)).expand(len(x), 2)
        with pyro.plate("z_minibatch", len(x)):
            for t in pyro.markov(range(int(lengths.max()))):
                hidden = h[:, t].expand(*z.shape[:-1], 4)
                q = dist.Normal(*combiner(torch.cat([z, hidden], -1))).to_event(1)
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t + 1}", dist.TransformedDistribution(q, [flow]) if with_flow else q)

    return Program(model, guide, ragged(20))


def deep_markov_with_flow() -> Program:
    return deep_markov(with_flow=True)


def linear_state_space() -> Program:
    """z_t = 0.8 z_(t-1) + noise, x_t = z_t + noise, of three steps; log p(x) is that of one normal."""

    def model(x: Tensor) -> None:
        decay = pyro.param("decay", torch.tensor(0.8))
        with pyro.plate("data", len(x)):
            z: Any = 0.0
            for t in range(3):
                z = pyro.sample(f"z_{t}", dist.Normal(decay * z, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z, 0.5), obs=x[..., t])

    def guide(x: Tensor) -> None:
        a, b = pyro.param("a", torch.tensor(0.6)), pyro.param("b", torch.tensor(0.2))
        with pyro.plate("data", len(x)):
            z: Any = 0.0
            for t in range(3):
                z = pyro.sample(f"z_{t}", dist.Normal(a * x[..., t] + b * z, 0.5))

    step = torch.eye(3) - torch.diag(torch.tensor([0.8, 0.8]), -1)
    covariance = torch.linalg.inv(step) @ torch.linalg.inv(step).T + 0.25 * torch.eye(3)
    x = normal((20, 3), 31)
    return Program(model, guide, x, gaussian_log_p(x, covariance))


TRANSITION = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])
EMISSION = torch.tensor([[0.9, 0.2], [0.5, 0.7], [0.1, 0.4]])


def forward_algorithm(x: Tensor, lengths: Tensor) -> float:
    """Mean log p(x) of ragged sequences under the Markov chain above, which starts in state 0."""
    log_x = dist.Bernoulli(EMISSION).to_event(1).log_prob(x[:, :, None])  # (rows, steps, states)
    alpha = torch.tensor([0.0, -math.inf, -math.inf]).expand(len(x), 3)
    for t in range(int(lengths.max())):
        moved = (alpha[:, :, None] + TRANSITION.log()).logsumexp(1) + log_x[:, t]
        alpha = torch.where(t < lengths[:, None], moved, alpha)
    return float(alpha.logsumexp(1).mean())


def hidden_markov() -> Program:
    """Pyro's HMM of ragged sequences: states summed out along `pyro.markov`, a guide without latents."""

    @config_enumerate
    def model(x: Tensor, lengths: Tensor) -> None:
        start = pyro.param("transition", TRANSITION, constraint=dist.constraints.simplex)
        emission = pyro.param("emission", EMISSION, constraint=dist.constraints.unit_interval)
        with pyro.plate("sequences", len(x)):
            state: Any = 0
            for t in pyro.markov(range(int(lengths.max()))):
                with poutine.mask(mask=t < lengths):
                    state = pyro.sample(f"c_{t}", dist.Categorical(start[state]))
                    pyro.sample(f"x_{t}", dist.Bernoulli(emission[state]).to_event(1), obs=x[:, t])

    def guide(x: Tensor, lengths: Tensor) -> None:
        pass

    data = ragged(20, 32)
    log_p = forward_algorithm(*data)
    return Program(model, guide, data, log_p, elbo=lambda: log_p)


def hidden_markov_with_tones() -> Program:
    """The same with the bits of a step in a plate of their own, right of the sequences, as in Pyro's example."""

    @config_enumerate
    def model(x: Tensor, lengths: Tensor) -> None:
        start = pyro.param("transition", TRANSITION, constraint=dist.constraints.simplex)
        emission = pyro.param("emission", EMISSION, constraint=dist.constraints.unit_interval)
        tones = pyro.plate("tones", 2, dim=-1)
        with pyro.plate("sequences", len(x), dim=-2):
            state: Any = 0
            for t in pyro.markov(range(int(lengths.max()))):
                with poutine.mask(mask=(t < lengths)[:, None]):
                    state = pyro.sample(f"c_{t}", dist.Categorical(start[state]))
                    with tones as tone:
                        pyro.sample(f"x_{t}", dist.Bernoulli(emission[state, tone]), obs=x[:, t])

    def guide(x: Tensor, lengths: Tensor) -> None:
        pass

    data = ragged(20, 33)
    log_p = forward_algorithm(*data)
    return Program(model, guide, data, log_p, elbo=lambda: log_p, plates=2)


def attend_infer_repeat() -> Program:
    """AIR with two steps: while an object is present, where and what it is; a recurrent guide."""
    size, rnn, where, what, present = 5, nn.RNNCell(5 + 3, 6), Encoder(6, 1), Encoder(6, 1), nn.Linear(6, 1)
    draw = nn.Linear(1, 1)

    def drawn(z_where: Tensor, z_what: Tensor, z_present: Tensor) -> Tensor:
        bump = (-((torch.linspace(-1, 1, size) - z_where) ** 2) / 0.1).exp()
        return z_present * draw(z_what) * bump

    def model(x: Tensor) -> None:
        pyro.module("draw", draw)
        with pyro.plate("data", len(x)):
            canvas, alive = torch.zeros(len(x), size), torch.ones(len(x), 1)
            for t in range(2):
                alive = pyro.sample(f"z_pres_{t}", dist.Bernoulli(0.6 * alive).to_event(1))
                mask = alive.bool()
                z_where = pyro.sample(f"z_where_{t}", dist.Normal(torch.zeros(len(x), 1), 1.0).mask(mask).to_event(1))
                z_what = pyro.sample(f"z_what_{t}", dist.Normal(torch.zeros(len(x), 1), 1.0).mask(mask).to_event(1))
                canvas = canvas + drawn(z_where, z_what, alive)
            pyro.sample("obs", dist.Normal(canvas, 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        for name, net in (("rnn", rnn), ("where", where), ("what", what), ("present", present)):
            pyro.module(name, net)
        with pyro.plate("data", len(x)):
            h, last = torch.zeros(len(x), 6), torch.ones(len(x), 3)
            alive = torch.ones(len(x), 1)
            for t in range(2):
                h = rnn(torch.cat([x, last], -1), h)
                alive = pyro.sample(f"z_pres_{t}", dist.Bernoulli(present(h).sigmoid() * alive).to_event(1))
                mask = alive.bool()
                z_where = pyro.sample(f"z_where_{t}", dist.Normal(*where(h)).mask(mask).to_event(1))
                z_what = pyro.sample(f"z_what_{t}", dist.Normal(*what(h)).mask(mask).to_event(1))
                last = torch.cat([alive, z_where, z_what], -1)

    return Program(model, guide, normal((20, size), 34, 0.7))


def capture_recapture() -> Program:
    """Cormack-Jolly-Seber: animals that live on with probability 0.7 and are then seen with probability 0.4."""

    @config_enumerate
    def model(x: Tensor) -> None:
        phi = pyro.param("phi", torch.tensor(0.7), constraint=dist.constraints.unit_interval)
        rho = pyro.param("rho", torch.tensor(0.4), constraint=dist.constraints.unit_interval)
        with pyro.plate("animals", len(x)):
            z: Any = torch.ones(len(x))
            for t in pyro.markov(range(3)):
                z = pyro.sample(f"z_{t}", dist.Bernoulli(phi * z))
                pyro.sample(f"y_{t}", dist.Bernoulli(rho * z), obs=x[:, t])

    def guide(x: Tensor) -> None:
        pass

    x = bits((20, 3), 35)
    rows = []
    for row in x:  # died before step d, for d = 0 ... 3
        lived = [0.7**d * (0.3 if d < 3 else 1.0) for d in range(4)]
        seen = [math.prod([0.4 if y else 0.6 for y in row[:d]]) * float(row[d:].sum() == 0) for d in range(4)]
        rows.append(math.log(sum(a * b for a, b in zip(lived, seen, strict=True))))
    log_p = sum(rows) / len(rows)
    return Program(model, guide, x, log_p, elbo=lambda: log_p)
