"""Exact sums over discrete latents c of the model alone: p(c | x, z) by Bayes' rule, and expectations under it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pvae.distributions.codes import MAX_STATES
from pvae.distributions.exponential_codes import IMPOSSIBLE
from pvae.errors import DeclarationError
from pvae.pair.densities import log_prob, plate_scale, sum_over
from pvae.pair.layout import Layout


@dataclass(frozen=True)
class JointStates:
    """Log densities of a batch at every joint state of J enumerated sites, `(K_1, ..., K_J, [particles,] n)`, nats."""

    layout: Layout
    """Names of the sites of the pair, and position of the data plate."""
    sizes: tuple[int, ...]
    """Number of states K_j of each enumerated site, in the order of `layout.enumerated`."""
    logs: dict[str, Tensor]
    """Log density of every site of the model inside the data plate, by name, at every joint state."""

    @property
    def _states(self) -> list[int]:
        return list(range(len(self.sizes)))

    @cached_property
    def latent(self) -> Tensor:
        """Joint log density log p(z, c) of the latents, nats."""
        return sum_over([v for name, v in self.logs.items() if name not in self.layout.observed])

    @cached_property
    def joint(self) -> Tensor:
        """Joint log density log p(x, z, c) of data and latents, nats."""
        return sum_over([self.latent, *(self.logs[name] for name in self.layout.observed if name in self.logs)])

    @cached_property
    def weights(self) -> Tensor:
        """Posterior probabilities p(c | x, z) of the joint states."""
        joint = self.joint
        return joint.flatten(0, len(self.sizes) - 1).softmax(0).reshape(joint.shape)

    def expected(self, name: str) -> Tensor:
        """Return the expectation of a site's log density under p(c | x, z), `([particles,] n)`, nats."""
        return (self.weights * self.logs[name]).sum(self._states)

    def kl(self) -> dict[str, Tensor]:
        """Return the expected KL of p(c_j | x, z, c_<j) from the prior of every enumerated site j, nats.

        By the chain rule they add up to the KL of the joint posterior p(c | x, z).
        """
        out, before = {}, torch.zeros_like(self.weights[(slice(0, 1),) * len(self.sizes)])
        for j, name in enumerate(self.layout.enumerated):
            later = self._states[j + 1 :]
            mass = self.weights.sum(later, keepdim=True) if later else self.weights
            log_mass = mass.clamp(min=torch.finfo(mass.dtype).tiny).log()
            out[name] = (self.weights * (log_mass - before - self.logs[name])).sum(self._states)
            before = log_mass
        return out

    def log_sum(self, table: Tensor) -> Tensor:
        """Return log sum_c exp(table), the log-sum-exp of a table of log densities over all joint states."""
        return table.logsumexp(self._states)


def read_joint_states(nodes: Mapping[str, Any], layout: Layout, particles: int) -> JointStates:
    """Return the log densities of the model's sites at every joint state, from a trace under enumeration.

    Raises:
        DeclarationError: an enumerated site is in a plate besides the data plate, or there are too many states.
    """
    for name in layout.enumerated:
        require_summable(name, nodes[name], layout)
    sizes = tuple(int(nodes[name]["fn"].enumerate_support(expand=False).shape[0]) for name in layout.enumerated)
    if math.prod(sizes) > MAX_STATES:
        raise DeclarationError(
            f"{', '.join(layout.enumerated)}: expected at most {MAX_STATES} joint states to sum over; got "
            f"{math.prod(sizes)}. Give some of these sites a guide."
        )
    logs = {}
    for name, node in nodes.items():
        if not layout.holds(node):
            continue
        _require_plain(name, node)
        value = log_prob(node, layout, particles)
        lead = value.dim() - (2 if particles else 1)
        value = value.reshape((1,) * (len(sizes) - lead) + value.shape)
        # Pyro allocates from the right: the first site's states lie next to the plates.
        value = value.permute(*reversed(range(len(sizes))), *range(len(sizes), value.dim()))
        logs[name] = value.expand(*sizes, *value.shape[len(sizes) :]).clamp(min=IMPOSSIBLE)
    return JointStates(layout, sizes, logs)


def require_summable(name: str, node: Mapping[str, Any], layout: Layout) -> None:
    """Check that the states of a site can be summed over independently for each data point.

    Raises:
        DeclarationError: the site is global, is in a plate besides the data plate, or has a scale or a mask.
    """
    if not layout.holds(node):
        raise DeclarationError(f"{name}: expected a site to sum over inside the data plate; got a global one. Draw it.")
    plates = [f.name for f in node["cond_indep_stack"] if f.vectorized and not f.name.startswith("_")]
    if extra := [plate for plate in plates if plate not in layout.plates]:
        raise DeclarationError(
            f"{name}: expected an enumerated site in the data plate alone; got it inside {', '.join(extra)} too. "
            f"Write one site for each element."
        )
    _require_plain(name, node)
    if node["mask"] is not None:
        raise DeclarationError(f"{name}: expected a site to sum over without a mask; got one. Mask what is observed.")


def _require_plain(name: str, node: Mapping[str, Any]) -> None:
    """Check that a site inside the sum has no poutine.scale: p(c)^scale is not a distribution."""
    scale = node["scale"] / plate_scale(node)
    if not bool(torch.as_tensor(abs(scale - 1) < 1e-6).all()):
        raise DeclarationError(
            f"{name}: expected sites beside enumerated ones without poutine.scale; got a scale of {scale}. "
            f"Set objective.beta instead."
        )
