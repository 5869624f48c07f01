"""Exact sums over discrete latents c of the model alone: p(c | x, z) by Bayes' rule, and expectations under it."""

import math
from collections import OrderedDict
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.ops.contract import contract_to_tensor
from pyro.ops.packed import pack
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pvae.distributions import IMPOSSIBLE, MAX_STATES, log_density
from pvae.errors import DeclarationError, misdeclared
from pvae.pair.densities import log_prob, plate_scale, sum_over
from pvae.pair.layout import Layout, plates_around, samples
from pvae.util import Record


class JointStates(Record):
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
        misdeclared(nodes[name]["mask"] is not None, "pair.enumeration.masked", name=name)
    sizes = tuple(int(nodes[name]["fn"].enumerate_support(expand=False).shape[0]) for name in layout.enumerated)
    _require_few(layout, math.prod(sizes))
    logs = {}
    for name, node in ((name, node) for name, node in nodes.items() if layout.holds(node)):
        _require_plain(name, node)
        value = log_prob(node, layout, particles)
        lead = value.dim() - (2 if particles else 1)
        value = value.reshape((1,) * (len(sizes) - lead) + value.shape)
        # Pyro allocates from the right: the first site's states lie next to the plates.
        value = value.permute(*reversed(range(len(sizes))), *range(len(sizes), value.dim()))
        logs[name] = value.expand(*sizes, *value.shape[len(sizes) :]).clamp(min=IMPOSSIBLE)
    return JointStates(layout, sizes, logs)


def needs_elimination(model_trace: Trace, layout: Layout) -> bool:
    """Return whether a table of all joint states does not do, so that Pyro's elimination sums the sites out.

    That is so inside a nested plate, along `pyro.markov` (whose steps share dimensions), under a mask, and for too many
    joint states.
    """
    nodes: list[Any] = [model_trace.nodes[name] for name in layout.enumerated if name in model_trace.nodes]
    dims = [node["infer"].get("_enumerate_dim") for node in nodes]
    states = math.prod(int(node["fn"].enumerate_support(expand=False).shape[0]) for node in nodes)
    nested = any(not layout.is_data(f) for node in nodes for f in node["cond_indep_stack"] if f.vectorized)
    masked = any(node["mask"] is not None for node in nodes)
    in_a_row = dims == [-1 - layout.nesting - j for j in range(len(nodes))]
    return nested or masked or not in_a_row or states > MAX_STATES


def eliminated(model_trace: Trace, layout: Layout, particles: int) -> tuple[Tensor, frozenset[str]]:
    """Return log sum_c of the product of all factors that depend on enumerated sites, and the names of their sites.

    The sum runs by variable elimination over plates and Markov steps, as in Pyro's `TraceEnum_ELBO`, but is kept for
    every row. An enumerated site under a mask sums to one.

    Returns:
        The log sums `([particles,] n)`, nats, and the names of the sites in them.

    References:
        Tensor Variable Elimination for Plated Factor Graphs (Obermeyer et al., 2019), https://arxiv.org/abs/1902.03210

    Raises:
        DeclarationError: a factor that depends on an enumerated site is outside the data plate, or has a scale.
    """
    model_trace.symbolize_dims()
    plates, sums = set(model_trace.plate_to_symbol.values()), set()
    factors: list[tuple[frozenset[str], Any]] = []
    names, target, count = set(), set(), 1
    for name, node in samples(model_trace).items():
        value = log_density(node["fn"], node["value"])
        if name not in layout.enumerated:
            value = scale_and_mask(value, 1.0, node["mask"])
        factor = _packed(name, node, value, layout)
        if not (states := set(factor._pyro_dims) - plates):
            continue
        misdeclared(not layout.holds(node), "pair.enumeration.outside", name=name)
        _require_plain(name, node)
        sizes = dict(zip(factor._pyro_dims, factor.shape, strict=True))
        _require_few(layout, math.prod(sizes[symbol] for symbol in states))
        frames = {f: model_trace.plate_to_symbol[f.name] for f in node["cond_indep_stack"] if f.vectorized}
        factors.append((frozenset(frames.values()), factor))
        own = {f: s for f, s in frames.items() if layout.is_data(f) or (particles and f.dim == -1 - layout.nesting)}
        target |= {(f.dim or 0, symbol) for f, symbol in own.items()}
        count = next(size for f, size in plates_around(node) if layout.is_data(f))
        sums |= states
        names.add(name)
    if not factors:  # a batch without these sites
        return torch.zeros(()), frozenset()
    wanted = [symbol for _, symbol in sorted(target)]  # particles, then rows
    wide = {symbol for _, factor in factors for symbol in factor._pyro_dims}  # a plate of one row has no dimension
    tree: OrderedDict[frozenset[str], list[Any]] = OrderedDict()
    for around, factor in factors:
        tree.setdefault(around & wide, []).append(factor)
    total = contract_to_tensor(tree, sums, frozenset(wanted) & wide)
    missing = [symbol for symbol in wanted if symbol not in total._pyro_dims]
    order = [*missing, *total._pyro_dims]
    value = total.reshape((1,) * len(missing) + total.shape).permute([order.index(symbol) for symbol in wanted])
    return value.expand(*((particles,) if particles else ()), count), frozenset(names)


def _packed(name: str, node: Mapping[str, Any], value: Tensor, layout: Layout) -> Any:
    """Return a log density with its dimensions named by plate and enumerated site."""
    try:
        return pack(value, node["infer"]["_dim_to_symbol"])
    except (ValueError, KeyError):
        found = {"name": name, "sites": layout.enumerated, "shape": value.shape}
        raise DeclarationError.of("pair.enumeration.shape", **found) from None


def _require_few(layout: Layout, states: int) -> None:
    """Check that a table of joint states of enumerated sites is not too large."""
    misdeclared(states > MAX_STATES, "pair.enumeration.states", sites=layout.enumerated, most=MAX_STATES, states=states)


class Expectations:
    """Probabilities q(c|x) of the states of enumerated latents of the guide, and expectations under them.

    Every site has its states along a dimension of its own, left of all plates; a log density is averaged over those
    that it depends on, element by element of its plates.
    """

    def __init__(self, guide_trace: Trace, layout: Layout, particles: int) -> None:
        found = samples(guide_trace)
        nodes = {name: found[name] for name in layout.expected if name in found}
        self.logs: dict[str, Tensor] = {name: log_density(node["fn"], node["value"]) for name, node in nodes.items()}
        self.dims: dict[str, int] = {name: node["infer"]["_enumerate_dim"] for name, node in nodes.items()}
        self.width = layout.nesting + (particles > 0)
        misdeclared(len({*self.dims.values()}) < len(self.dims), "pair.enumeration.markov", sites=self.dims)

    def mean(self, value: Tensor, mask: Any, name: str) -> Tensor:
        """Return the expectation of a log density of site `name` (masked), which keeps the dimensions of plates.

        Raises:
            DeclarationError: the site is outside a plate of an enumerated latent that it depends on.
        """
        value = scale_and_mask(value, 1.0, mask)
        needed, chosen = self._states(value), list[str]()
        while more := [z for z, dim in self.dims.items() if dim in needed and z not in chosen]:
            chosen += more
            needed = needed.union(*(self._states(self.logs[z]) for z in more))
        if not chosen:
            return value
        for z in chosen:
            log_q = self.logs[z]
            inside = [d for d in range(-min(self.width, log_q.dim()), 0) if log_q.shape[d] > 1]
            if any(value.dim() < -d or value.shape[d] == 1 for d in inside):
                raise DeclarationError.of("pair.enumeration.elements", name=name, z=z)
        total = (sum_over([self.logs[z] for z in chosen]).exp() * value).sum(sorted(needed), keepdim=True)
        return total.reshape(total.shape[-self.width :])

    def _states(self, value: Tensor) -> set[int]:
        """Return the dimensions left of all plates along which a log density differs."""
        return {d for d in range(-value.dim(), -self.width) if value.shape[d] > 1}


def require_summable(name: str, node: Mapping[str, Any], layout: Layout) -> None:
    """Check that the states of a site of the model can be summed over in one table for each data point.

    Raises:
        DeclarationError: the site is global, is in a plate besides the data plate, or has a scale.
    """
    require_expectable(name, node, layout)
    plates = [f.name for f in node["cond_indep_stack"] if f.vectorized and not f.name.startswith("_")]
    misdeclared(more := [p for p in plates if p not in layout.plates], "pair.enumeration.plates", name=name, more=more)


def require_expectable(name: str, node: Mapping[str, Any], layout: Layout) -> None:
    """Check that the states of a site of the guide can be summed over.

    Raises:
        DeclarationError: the site is global, or has a scale.
    """
    misdeclared(not layout.holds(node), "pair.enumeration.global", name=name)
    _require_plain(name, node)


def _require_plain(name: str, node: Mapping[str, Any]) -> None:
    """Check that a site inside the sum has no poutine.scale: p(c)^scale is not a distribution."""
    scale = node["scale"] / plate_scale(node)
    misdeclared(not torch.as_tensor(abs(scale - 1) < 1e-6).all(), "pair.enumeration.scale", name=name, scale=scale)
