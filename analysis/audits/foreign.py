"""Encoder and decoder of somebody else as a Pyro pair: the forms that encodings take, and the programs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pvae.analysis.figures.estimate import refuse
from pvae.component import Shape
from pvae.distributions import Certain, base, code_grid
from pvae.pair import running, unwrapped
from pvae.util import Record

LikelihoodName = Literal["normal", "bernoulli", "discretized_logistic"]
"""Name of a likelihood around the mean that a decoder gives."""
ELEMENTS_AT_ONCE, ROWS_AT_ONCE = 2**22, 512
"""Largest numbers of elements of data (unless one row has more) and of rows in one call of encoder or decoder."""


class Encoded(Record):
    """Encodings of n rows, on the CPU: points, normals, or codes with or without the vectors they stand for."""

    loc: Tensor
    """Points, means or quantised vectors, `(n, *shape)`; where there are none, the codes."""
    scale: Tensor | None
    """Standard deviations, `(n, *shape)`; None for points and codes."""
    index: Tensor | None
    """Codes, `(n, *grid)`, int64; None for others."""

    @classmethod
    def read(cls, batches: Sequence[Any], noise: float | None) -> "Encoded":
        """Return what an encoder gave for batches of rows; points get the standard deviation `noise`, if it is given.

        Raises:
            DataError: it is of no known form, or not finite.
        """
        parts = [batch if isinstance(batch, tuple | list) else [batch] for batch in batches]
        if isinstance(unwrapped(batches[0]), torch.distributions.Normal):
            parts = [[batch.mean, 2 * batch.stddev.log()] for batch in batches]
        columns = [column for column in zip(*parts, strict=True) if isinstance(column[0], Tensor) and column[0].dim()]
        tensors = [torch.cat(column).detach().cpu() for column in columns]
        floats = [part.float() for part in tensors if part.is_floating_point()]
        codes = [part.long() for part in tensors if not part.is_floating_point()]
        refuse(not tensors or not all(part.isfinite().all() for part in floats), "audit.encoding", found=batches[0])
        if codes:
            return cls((floats or codes)[0], None, codes[0])
        loc, *log_variance = (part.reshape(len(part), *part.shape[1:] or (1,)) for part in floats)
        scale = (log_variance[0] / 2).exp().expand_as(loc) if log_variance else None
        return cls(loc, torch.full_like(loc, noise) if scale is None and noise is not None else scale, None)

    def sample(self) -> Tensor:
        """Return one sample of every posterior, `(n, *shape)`: points and quantised vectors are their own."""
        return self.loc if self.scale is None else torch.normal(self.loc, self.scale)


@dataclass
class Foreign:
    """Encoder and decoder as guide and model: an N(0, I) prior (of codes, a uniform one), a likelihood of the mean."""

    encode: Callable[[Tensor], Any]
    decode: Callable[[Tensor], Tensor]
    noise: float | None
    likelihood: LikelihoodName
    scale: float | None
    """Standard deviation of the normal, or scale of the logistic; None until it is fitted."""
    levels: int
    codes: int = 0
    """Number K of codes, 0 for other latents."""
    shape: Shape = ()
    """Shape of the latents, or of the grid of codes."""

    def chunks(self, call: Callable[[Tensor], Any], x: Tensor, like: Tensor) -> list[Any]:
        """Return what a function gives for chunks of rows, on the device of the parameters behind it."""
        parameters = [p for module in running.modules_within([call]) for p in module.parameters()]
        rows = max(1, min(ROWS_AT_ONCE, ELEMENTS_AT_ONCE // max(1, like[:1].numel())))
        return [call(part.to(parameters[0].device) if parameters else part) for part in x.split(rows)]

    def encoded(self, x: Tensor) -> Encoded:
        """Return the encodings of rows of data `(n, *event)`."""
        found = Encoded.read(self.chunks(self.encode, x, x), self.noise)
        refuse((n := len(found.loc)) != len(x), f"encode: expected one encoding for each of {len(x)} rows; got {n}.")
        return found

    def decoded(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the means of p(x | z) of latents, of the shape of the data `x`."""
        found = self.chunks(self.decode, z, x)
        is_wrong = not isinstance(found[0], Tensor) or torch.cat(found).shape != x.shape
        refuse(is_wrong, "refused.decoded", x=x, found=found[0])
        return torch.cat(found).detach().cpu().to(x)

    def law(self, mean: Tensor) -> dist.TorchDistribution:
        """Return the likelihood around means `(n, *event)`."""
        scale, event = torch.tensor(self.scale or 1.0, dtype=mean.dtype), mean.dim() - 1
        if self.likelihood == "bernoulli":
            return dist.Bernoulli(mean.clamp(1e-6, 1 - 1e-6)).to_event(event)
        if self.likelihood == "discretized_logistic":
            return base.DiscretizedLogistic(mean, scale.log(), self.levels).to_event(event)
        return dist.Normal(mean, scale).to_event(event)

    def guide(self, x: Tensor) -> None:
        """Sample q(z | x)."""
        found, event = self.encoded(x), len(self.shape)
        q: Any = dist.Delta(found.loc, event_dim=event)
        if found.scale is not None:
            q = dist.Normal(found.loc, found.scale).to_event(event)
        with pyro.plate("data", len(x)):
            pyro.sample("z", q if found.index is None else Certain(found.index, self.codes, event))

    def model(self, x: Tensor) -> None:
        """Sample p(z) and observe x; quantised vectors are those that the encoder gives for x."""
        prior: Any = dist.Normal(torch.zeros(self.shape), 1.0).to_event(len(self.shape))
        if self.codes:
            prior = code_grid(torch.zeros(*self.shape, self.codes), len(self.shape))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            z = self.encoded(x).loc if self.codes else z
            pyro.sample("x", self.law(self.decoded(z, x)), obs=x)
