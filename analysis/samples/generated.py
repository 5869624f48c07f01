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

from pvae.analysis.export.names import safe_names
from pvae.analysis.export.sites import numpy_of
from pvae.errors import DeclarationError, near
from pvae.pair.densities import sum_over
from pvae.util.files import write_atomic


def known_name(name: str, names: Sequence[str] | Mapping[str, Any], what: str) -> str:
    """Return the name if it is one of `names`; else raise DeclarationError with the nearest one."""
    if name not in names:
        raise DeclarationError(f"{what}: expected one of {', '.join(names)}; got {name!r}{near(name, names)}.")
    return name


class Generated(ABC):
    """Result made of named tensors on the CPU."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors, by the keys of `save`."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The tensors as NumPy arrays."""
        return {key: numpy_of(t) for key, t in self.tensors().items()}

    def save(self, path: str | Path, **more: Tensor) -> Path:
        """Write an `.npz` file atomically, for `numpy.load(path, allow_pickle=False)`; return its path.

        The keys are those of `arrays` and `more`. Site names are reduced to ASCII letters, digits and `_`.
        """
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {**self.arrays(), **{key: numpy_of(t) for key, t in more.items()}}
        np.savez(buffer, **arrays)
        write_atomic(Path(path), buffer.getvalue())
        return Path(path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key} {list(t.shape)}' for key, t in self.tensors().items())})"


def named(what: str, values: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Return the tensors that are not None under keys `<what>/<name>`, with safe names."""
    names = safe_names({name: () for name in values})
    return {f"{what}/{names[name]}": t for name, t in values.items() if t is not None}


@dataclass(frozen=True, eq=False, repr=False)
class Samples(Generated):
    """Samples of a model; the result of `sample`. `save` has keys `x`, `latents/<name>` and `covariates/<name>`."""

    x: Tensor
    """Samples of p(x | z), or its means, `(n, *shape)`."""
    latents: dict[str, Tensor]
    """Sampled latents z, `(n, *event)`: all latents of the model that belong to single data."""
    covariates: dict[str, Tensor]
    """Covariates that the samples are conditioned on, `(n,)`, int64."""
    is_mean: bool
    """True if x are means of p(x | z)."""

    def tensors(self) -> dict[str, Tensor]:
        return {"x": self.x, **named("latents", self.latents), **named("covariates", self.covariates)}


@dataclass(frozen=True, eq=False)
class LatentCode:
    """Posterior of one latent for rows of data."""

    value: Tensor
    """Sample of q(z | x), or its centre, `(n, *event)`."""
    log_q: Tensor
    """log q(value | x, latents before it), nats, `(n,)`, float64; exact."""
    loc: Tensor | None
    """Mean of a normal posterior, `(n, *event)`."""
    scale: Tensor | None
    """Standard deviations of a normal posterior, `(n, *event)`."""
    probs: Tensor | None
    """Probabilities of a discrete posterior, at most 4096 per datum, `(n, ...)`; p(c | x, z), `(n, K)`, where the model
    sums the site out; None for a deterministic code."""
    is_draw: bool
    """True if the value was sampled."""


@dataclass(frozen=True, eq=False, repr=False)
class Encoding(Generated):
    """Latents of rows of data; the result of `encode`.

    `save` has keys `latents/<name>`, `log_q/<name>` and, where known, `loc/<name>`, `scale/<name>`, `probs/<name>`.
    """

    latents: dict[str, LatentCode]
    """Latents of the guide in its order, then those that the model sums out."""

    @property
    def log_q(self) -> Tensor:
        """log q(z | x) of all latents together, nats, `(n,)`."""
        return sum_over([code.log_q for code in self.latents.values()])

    def __getitem__(self, name: str) -> Tensor:
        """The value of a latent, `(n, *event)`."""
        return self.latents[known_name(name, self.latents, "encode")].value

    def tensors(self) -> dict[str, Tensor]:
        parts = {"latents": "value", "log_q": "log_q", "loc": "loc", "scale": "scale", "probs": "probs"}
        found: dict[str, Tensor] = {}
        for what, field in parts.items():
            found |= named(what, {name: getattr(code, field) for name, code in self.latents.items()})
        return found


@dataclass(frozen=True, eq=False, repr=False)
class Reconstructions(Generated):
    """Data decoded from their codes; the result of `reconstruct`. `save` has keys `x`, `log_p` and `latents/<name>`."""

    x: Tensor
    """Means of p(x | z), or samples, `(n, *shape)`."""
    log_p: Tensor
    """log p(x | z) of the data, nats, `(n,)`, float64; exact at the given z."""
    latents: dict[str, Tensor]
    """Latents z that were decoded, `(n, *event)`."""
    is_mean: bool
    """True if x are means of p(x | z)."""

    def tensors(self) -> dict[str, Tensor]:
        return {"x": self.x, "log_p": self.log_p, **named("latents", self.latents)}
