"""Results of sampling, encoding and decoding: named tensors that can be saved."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pvae.analysis.export.sites import numpy_of, safe_names
from pvae.errors import DeclarationError, near
from pvae.pair.densities import sum_over
from pvae.util.files import write_atomic


def known_name(name: str, names: Sequence[str] | Mapping[str, Any], what: str) -> str:
    """Return `name` if it is one of `names`; else raise a DeclarationError that suggests the most similar one."""
    if name not in names:
        raise DeclarationError(f"{what}: expected one of {', '.join(names)}; got {name!r}{near(name, names)}.")
    return name


class Generated(ABC):
    """Base class of results that consist of named tensors on the CPU and can be saved."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the result under the keys that `save` writes."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the tensors of the result as NumPy arrays, under the same keys."""
        return {key: numpy_of(t) for key, t in self.tensors().items()}

    def save(self, path: str | Path, **more: Tensor) -> Path:
        """Write the tensors to an `.npz` file atomically, for `numpy.load(path, allow_pickle=False)`; return its path.

        The keys are those of `arrays` and of `more`. Site names are reduced to ASCII letters, digits and `_`.
        """
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {**self.arrays(), **{key: numpy_of(t) for key, t in more.items()}}
        np.savez(buffer, **arrays)
        write_atomic(Path(path), buffer.getvalue())
        return Path(path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key} {list(t.shape)}' for key, t in self.tensors().items())})"


def named(what: str, values: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Return the tensors that are not None under keys `<what>/<name>`, with names of ASCII letters, digits and `_`."""
    names = safe_names({name: () for name in values})
    return {f"{what}/{names[name]}": t for name, t in values.items() if t is not None}


@dataclass(frozen=True, eq=False, repr=False)
class Samples(Generated):
    """Samples of a model; the result of `sample`. `save` has keys `x`, `latents/<name>` and `covariates/<name>`."""

    x: Tensor
    """Samples of p(x | z), or its means, `(n, *shape)`."""
    latents: dict[str, Tensor]
    """Sampled latents z by name, `(n, *event)`: all local latents of the model, which have one value per datum."""
    covariates: dict[str, Tensor]
    """Covariates by name that the samples are conditioned on, `(n,)`, int64; of a prompt `(n, length)`."""
    is_mean: bool
    """True if x are means of p(x | z)."""

    def tensors(self) -> dict[str, Tensor]:
        return {"x": self.x, **named("latents", self.latents), **named("covariates", self.covariates)}


@dataclass(frozen=True, eq=False)
class LatentCode:
    """Posterior of one latent for n data: a value, its log density, and the parameters of the posterior if known."""

    value: Tensor
    """Sample of q(z | x), or its centre (the mean; of a discrete latent the mode), `(n, *event)`."""
    log_q: Tensor
    """Log q of `value` given x and the latents that precede it in the guide, nats, `(n,)`, float64; exact."""
    loc: Tensor | None
    """Mean of a normal posterior, `(n, *event)`; None for other posteriors."""
    scale: Tensor | None
    """Standard deviations of a normal posterior, `(n, *event)`; None for other posteriors."""
    probs: Tensor | None
    """Probabilities of a discrete posterior, `(n, ...)`, or p(c | x, z), `(n, K)`, of a latent that the model sums out.
    None for other posteriors, for deterministic codes, and for more than 4096 probabilities per datum."""
    is_draw: bool
    """True if `value` is a sample of the posterior, False if it is its centre."""


@dataclass(frozen=True, eq=False, repr=False)
class Encoding(Generated):
    """Latents inferred from rows of data; the result of `encode`.

    `save` has keys `latents/<name>`, `log_q/<name>` and, where known, `loc/<name>`, `scale/<name>`, `probs/<name>`.
    """

    latents: dict[str, LatentCode]
    """Posterior of each latent by name: those of the guide in its order, then discrete ones that the model sums out."""

    @property
    def log_q(self) -> Tensor:
        """Joint log q(z | x) of all latents, nats, `(n,)`, float64."""
        return sum_over([code.log_q for code in self.latents.values()])

    def __getitem__(self, name: str) -> Tensor:
        """Return the value of a latent by its name, `(n, *event)`."""
        return self.latents[known_name(name, self.latents, "encode")].value

    def tensors(self) -> dict[str, Tensor]:
        parts = {"latents": "value", "log_q": "log_q", "loc": "loc", "scale": "scale", "probs": "probs"}
        found: dict[str, Tensor] = {}
        for what, field in parts.items():
            found |= named(what, {name: getattr(code, field) for name, code in self.latents.items()})
        return found


@dataclass(frozen=True, eq=False, repr=False)
class Reconstructions(Generated):
    """Data decoded from their latents; the result of `reconstruct`. `save` has keys `x`, `log_p`, `latents/<name>`."""

    x: Tensor
    """Means of p(x | z), or samples, `(n, *shape)`."""
    log_p: Tensor
    """log p(x | z) of the data, nats, `(n,)`, float64; exact at the given z."""
    latents: dict[str, Tensor]
    """Decoded latents z by name, sampled from q(z | x), `(n, *event)`."""
    is_mean: bool
    """True if x are means of p(x | z)."""

    def tensors(self) -> dict[str, Tensor]:
        return {"x": self.x, "log_p": self.log_p, **named("latents", self.latents)}
