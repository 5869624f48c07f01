"""Small pairs with known posteriors that the tests of samples share."""

# Attributes of Modules have no types.
# mypy: disable-error-code="arg-type, attr-defined"

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pvae.errors import DataError
from pvae.experiment.experiment import Experiment
from pvae.pair.pair import Pair
from tests.cli_runner import run_cli

N = 20_000
NOISE = 0.4


class Linear(nn.Module):
    """x = W z + b + noise, z ~ N(0, I); q(z | x) = N(G x + c, diag scale^2)."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.w = nn.Parameter(torch.randn(3, 2, generator=generator))
        self.b = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        self.g = nn.Parameter(torch.randn(2, 3, generator=generator) * torch.tensor([[0.1], [1.0]]))
        self.c = nn.Parameter(torch.tensor([0.2, -0.1]))
        self.scale = nn.Parameter(torch.tensor([0.9, 0.3]))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.w.T + self.b, NOISE).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ self.g.T + self.c, self.scale).to_event(1))


class Hierarchy(nn.Module):
    """z2 ~ N(0, 1), z1 ~ N(2 z2 + 1, 0.5), x ~ N(3 z1, 1); q(z1 | x) = N(x / 3, 0.2), q(z2 | z1) = N(z1 - 1, 0.3)."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(2.0))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(self.slope * z2 + 1, 0.5).to_event(1))
            pyro.sample("x", dist.Normal(3 * z1, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x / 3, 0.2).to_event(1))
            pyro.sample("z2", dist.Normal(z1 - 1, 0.3).to_event(1))


class Beside(nn.Module):
    """Codes a = x[0] and b = x[1] side by side, each of prior N(0, 3) and read with an error of 0.1."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.tensor(1.0))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(1), 3.0).to_event(1))
            b = pyro.sample("b", dist.Normal(torch.zeros(1), 3.0).to_event(1))
            pyro.sample("x", dist.Normal(self.one * torch.cat([a, b], -1), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(x[:, :1], 0.1).to_event(1))
            pyro.sample("b", dist.Normal(x[:, 1:], 0.1).to_event(1))


P_A = torch.tensor([0.7, 0.3])
P_B = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]])
MEANS = torch.tensor([[0.0, 3.0, 5.0], [1.0, 4.0, -2.0]])


class Mixture(nn.Module):
    """Codes a and b given a, both summed out; x ~ N(MEANS[a, b], 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(P_A), infer={"enumerate": "parallel"})
            b = pyro.sample("b", dist.Categorical(P_B[a]), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(MEANS[a, b], self.scale), obs=x)

    def guide(self, x: Tensor) -> None:
        pass


class Patterns(nn.Module):
    """Code c of prior (0.3, 0.7), summed out; two bits of probabilities p[c]."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([[0.9, 0.8], [0.4, 0.1]]))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Bernoulli(self.p[c]).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pass


class Global(nn.Module):
    """One w ~ N(0, 1) for all data, found to be 5; x ~ N(w + z, 0.1)."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor(5.0))

    def model(self, x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 0.1).to_event(1))
            pyro.sample("x", dist.Normal(w + z, 0.1).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.sample("w", dist.Normal(self.at, 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0 * x, 0.1).to_event(1))


class Skewed(nn.Module):
    """z ~ Gamma(4, 2), a prior that is no normal; x ~ N(z, 1)."""

    def __init__(self, likelihood: Callable[..., dist.TorchDistribution] = dist.Normal) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.likelihood = likelihood

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.full((1,), 4.0), 2.0).to_event(1))
            pyro.sample("x", self.likelihood(z, self.scale).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(0.1 * x, 0.2).to_event(1))


class Table:
    """x = W z + b + noise of five continuous columns that may be missing, z ~ N(0, I) of two coordinates; float64."""

    def __init__(self) -> None:
        columns = {f"c{i}": {"type": "continuous", "transform": "none", "missing": "mask"} for i in range(5)}
        network = {"kind": "mlp", "hidden": []}
        likelihood = {"network": network, "likelihood": "columns"}
        raw = {"latents": {"z": {"dim": 2}}, "encoder": {"network": network}, "decoder": likelihood}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            plan = Experiment.from_dict({"data": {"source": "frame", "columns": columns}, **raw})
            self.pair = plan.build((5,)).double()
        decoder = self.pair.model.decoder
        with torch.no_grad():
            for parameter in self.pair.guide.parameters():
                parameter.zero_()  # q(z | x) is the prior
            decoder.likelihood.families["normal"].log_scale.copy_(torch.linspace(-1, 0.3, 5))
            self.b = decoder({"z": torch.zeros(1, 2).double()}).mean[0]
            self.w = torch.stack([decoder({"z": e[None]}).mean[0] - self.b for e in torch.eye(2).double()], 1)
        self.scale = torch.linspace(-1, 0.3, 5).double().exp()
        generator = torch.Generator().manual_seed(1)
        z, e = torch.randn(60, 2, generator=generator).double(), torch.randn(60, 5, generator=generator).double()
        self.complete = z @ self.w.T + self.b + self.scale * e
        self.x = self.complete.clone()
        self.x[:20, 1], self.x[20:40, :4], self.x[40:50, [0, 4]] = math.nan, math.nan, math.nan
        self.pair.adopt(self.complete)

    @property
    def covariance(self) -> Tensor:
        return self.w @ self.w.T + self.scale.square().diag()


def pair_of(module: nn.Module, *event: int) -> Pair:
    return Pair(module.model, module.guide).adopt(torch.zeros(3, *event))


def array(t: Tensor) -> np.ndarray:
    return t.detach().double().numpy()


def rows(n: int = 600, *event: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *event, generator=torch.Generator().manual_seed(seed))


def normals(n: int, d: int, seed: int, loc: float = 0.0) -> Tensor:
    return loc + torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def command(folder: Path, line: str, code: int = 0) -> Any:
    """Return the output of a command on the runs of a folder, parsed where it is JSON; its errors where it fails."""
    out, error = run_cli(*line.split(), "--run-dir", str(folder), code=code)
    return error if code else json.loads(out) if "--json" in line else out


def refused(message: str, function: Callable[..., object], *args: Any, by: type = DataError, **kwargs: Any) -> None:
    """Assert that a call is refused with a message."""
    with pytest.raises(by, match=message):
        function(*args, **kwargs)


def is_png(path: str) -> bool:
    return Path(path).read_bytes().startswith(b"\x89PNG")
