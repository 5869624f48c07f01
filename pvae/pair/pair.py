"""Pair: a Pyro model and guide as one Module; what its traces say, and what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from types import CellType
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pvae.errors import DataError, DeclarationError
from pvae.graph.frame import Frame
from pvae.graph.lifecycle import MadeOfData
from pvae.pair.densities import (
    Layout,
    closed_kl,
    full_size,
    is_enumerable,
    log_prob,
    moved,
    plate_scale,
    plates_of,
    priced_kl,
    read_layout,
    samples,
    sum_over,
)
from pvae.pair.enumeration import read_table, require_summable

PARTICLES = "_particles"


@dataclass(frozen=True)
class Terms:
    """The parts of a batch's ELBO, nats; a leading dimension `particles` where more than one draw was asked for."""

    reconstruction: Tensor
    """log p(x | z), `(batch,)`."""
    kl: dict[str, Tensor]
    """log q - log p (or its closed form) of every latent, `(batch,)`; a global latent's share per datum, `(1,)`."""
    penalties: dict[str, Tensor] = field(default_factory=dict)
    """What is added to the loss and is no part of the ELBO, `(batch,)`."""
    scores: dict[str, Score] = field(default_factory=dict)
    """Of every latent whose draw carries no gradient."""

    @cached_property
    def means(self) -> list[Tensor]:
        """Batch means of the reconstruction, then of every KL: taken once, for the loss and the metrics."""
        return [self.reconstruction.mean(), *(kl.mean() for kl in self.kl.values())]


@dataclass(frozen=True)
class Score:
    """What the gradient of a draw that carries none is made of: E[(gain - baseline) grad log q], or as `IWAE` says."""

    log_q: Tensor
    """log q of the draw, `(batch,)`, with its gradient: the law that it was drawn from, whatever weight it has."""
    weighed: Tensor
    """The same times the weight of its site (`poutine.scale`), as the latent's own KL holds it, without gradient."""
    own_kl: bool
    """Whether the gain of the draw holds the latent's KL: not where it is in closed form."""
    baseline: Tensor | None
    """What is taken off the gain, `(batch,)` or a number; None for nothing."""
    learns: bool
    """Whether the baseline has parameters, to be brought nearer to the gain."""
    note: Callable[[Tensor], None]
    """Told the gain, of which an average baseline is made."""


def _score(node: Mapping[str, Any], layout: Layout, particles: int, weighed: Tensor, own_kl: bool) -> Score:
    """Of a site, from what it says of itself in `infer`, as Pyro's `TraceGraph_ELBO` reads it."""
    infer, scale = node["infer"], plate_scale(node)
    usual = node["scale"].__class__ is float and node["scale"] == scale
    log_q = weighed if usual else log_prob({**node, "scale": scale}, layout, particles)
    told, average = infer.get("baseline", {}), infer.get("average")
    baseline = told.get("baseline_value")
    if "nn_baseline" in told:
        baseline = told["nn_baseline"](told["nn_baseline_input"].detach())
    learns = baseline is not None and baseline.requires_grad
    return Score(log_q, weighed, own_kl, baseline, learns, _forget if average is None else average.note)


def _forget(_gain: Tensor) -> None:
    """Nobody keeps an average."""


@dataclass(frozen=True)
class Problem:
    """One finding of `Pair.check`."""

    site: str
    message: str

    def __str__(self) -> str:
        return f"{self.site}: {self.message}"


class Pair(nn.Module):
    """Any two Pyro programs, `model(x)` and `guide(x)`, as one Module with terms, checks and a layout.

    Parameters of foreign programs (`pyro.param`, `pyro.module`, PyroModules, bound methods of a Module) are
    adopted on first use with data: they become this Module's parameters, and every later call runs in a param
    store of the pair's own, so that several pairs live in one process and the global store stays as it was.

    Arguments:
        model: a Pyro program of x `(batch, *event)` that observes it inside one data plate.
        guide: a Pyro program of x that samples the model's latents.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     scale = pyro.param("scale", torch.tensor(0.7))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, scale))
        >>> Pair(model=model, guide=guide).adopt(torch.zeros(3)).layout.latents
        ('z',)
    """

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.guide = guide
        self._layout: Layout | None = None
        self._event: tuple[int, ...] = ()
        self._store: Any = {"params": {}, "constraints": {}}
        self.implicit = False
        """Whether x can only be drawn: the pair has no likelihood, and nothing is inferred."""

    @property
    def layout(self) -> Layout:
        """What `adopt` read off the traces."""
        if self._layout is None:
            raise DeclarationError("pair: expected pair.adopt(x) before its layout is asked for; got no data yet.")
        return self._layout

    # ------------------------------------------------------------------ adoption

    def adopt(self, x: Tensor) -> Pair:
        """Run both programs once on a few rows of `x`, read the layout, take in their parameters; returns self.

        Leaves the random state as it found it.

        Raises:
            DeclarationError: nothing is observed inside a data plate, or the pair has no parameters.
        """
        if self._layout is not None:
            return self
        rows, more = (x[torch.arange(count, device=x.device) % len(x)] for count in (3, 5))
        with torch.random.fork_rng(), torch.no_grad(), pyro.get_param_store().scope(_current_store()) as store:
            guide_trace, model_trace = self._run(rows)
            follows = plates_of(model_trace, 3) & plates_of(self._run(more)[1], 5)
        layout = read_layout(guide_trace, model_trace, 3, follows)
        self._take_parameters(guide_trace, model_trace, store)
        self._layout, self._event = layout, tuple(x.shape[1:])
        if not any(True for _ in self.parameters()):
            raise DeclarationError(
                "pair: expected at least one parameter to learn; got none. Pass Modules, or use pyro.param or "
                "pyro.module in the programs."
            )
        return self

    def _take_parameters(self, guide_trace: Trace, model_trace: Trace, store: Mapping[str, Any]) -> None:
        """Register what the programs keep in the param store, and the Modules their methods are bound to."""
        kept = {id(value) for value in store["params"].values()}
        named = [m for m in self._named() if any(id(p) in kept for p in m.parameters())]
        for i, module in enumerate(dict.fromkeys([*self._owners(), *named])):
            self.add_module(f"owner_{i}", module)
        names = [n for t in (guide_trace, model_trace) for n, node in t.nodes.items() if node["type"] == "param"]
        known = {id(p) for p in self.parameters()}
        free = nn.ParameterDict()
        for name in dict.fromkeys(names):
            value = store["params"][name]
            self._store["constraints"][name] = store["constraints"][name]
            if id(value) not in known:
                value = value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach().clone())
                free[_attribute(name, free)] = value
            self._store["params"][name] = value
        if len(free):
            self.free = free

    def _owners(self) -> list[nn.Module]:
        """Modules whose methods the programs are."""
        owners = (getattr(program, "__self__", None) for program in (self.model, self.guide))
        return list(dict.fromkeys(owner for owner in owners if isinstance(owner, nn.Module)))

    def _named(self) -> list[nn.Module]:
        """Modules that the programs, plain functions, reach by name: what `pyro.module` may register."""
        found = []
        for program in (self.model, self.guide):
            code = getattr(program, "__code__", None)
            if code is not None:
                cells = [cell.cell_contents for cell in program.__closure__ or () if cell != CellType()]
                found += [*cells, *(program.__globals__.get(name) for name in code.co_names)]
        return [value for value in found if isinstance(value, nn.Module)]

    def accept(self, x: Any) -> Tensor:
        """Data as the pair's programs take them: a tensor `(n, *event)` of the parameters' type and device.

        Raises:
            DataError: no rows, or rows of another shape than the pair was made for.
        """
        parameters = (p for module in (self, *self._owners()) for p in module.parameters())
        parameter = next((p for p in parameters if p.is_floating_point()), None)
        try:
            x = torch.as_tensor(x)
        except (TypeError, ValueError, RuntimeError):
            hint = " Pass its .x." if isinstance(getattr(x, "x", None), Tensor) else ""
            raise DataError(f"x: expected a tensor or an array; got {type(x).__name__}.{hint}") from None
        x = x if parameter is None else x.to(parameter)
        if x.dim() and len(x):
            self.adopt(x)
        if not x.dim() or not len(x) or tuple(x.shape[1:]) != self._event:
            event = ", ".join(str(size) for size in self._event)
            raise DataError(f"x: expected at least one row, of shape ({event}); got a tensor of shape {list(x.shape)}.")
        return x

    def reads_itself(self, x: Tensor) -> set[str]:
        """Latents whose prior reads a latent that the guide infers from them (a bottom-up guide).

        E_q[log q - log p] of such a latent is no expectation of a closed-form KL. Found by moving one latent
        while all noise stays the same, and looking whether its own prior moves.
        """
        self.adopt(x)
        return {name for name in self.layout.latents if self._prior_follows(name, x[:4])}

    def _prior_follows(self, name: str, x: Tensor) -> bool:
        with quiet(self, x), self.own_store():
            first = samples(self._run(x)[0])[name]
            value, scores = first["value"], []
            for other in (value, moved(first)):
                torch.manual_seed(0)
                with poutine.condition(data={name: other}), TraceMessenger() as guide:
                    self.guide(x)
                guide.trace.nodes[name]["is_observed"] = False  # replay refuses observed sites
                site = samples(self._replay(x, guide.trace)).get(name)
                if site is None:
                    return False
                scores.append(site["fn"].log_prob(value))
        return not torch.equal(*scores)

    @contextmanager
    def own_store(self) -> Iterator[None]:
        """The param store of the pair: what its programs read while they run inside."""
        if not self._store["params"]:
            yield
            return
        with pyro.get_param_store().scope(self._store):
            yield

    def groups(self, x: Tensor) -> Tensor | None:
        """The joint value of the covariates of every row, numbered, `(n,)`; None for a pair without covariates."""
        return self.frame.groups(x)

    @property
    def frame(self) -> Frame:
        """What a row of data holds; of a hand-written pair, the datum alone."""
        frame = getattr(self.model, "frame", None)
        return frame if isinstance(frame, Frame) else Frame(self._event)

    # ------------------------------------------------------------------ life cycle

    def attend(self, x: Tensor) -> Pair:
        """Hand the training data `(n, *event)` to the parts that are made of them; returns self."""
        for part in self.made_of_data():
            part.attend(x)
        return self

    def made_of_data(self) -> list[MadeOfData]:
        """The parts that are made of the training data."""
        return [module for module in self.modules() if isinstance(module, MadeOfData)]

    # ------------------------------------------------------------------ running

    def _run(self, x: Tensor, particles: int = 1, dim: int = -2) -> tuple[Trace, Trace]:
        plate = pyro.plate(PARTICLES, particles, dim=dim) if particles > 1 else nullcontext()
        with plate:
            with TraceMessenger() as guide:
                self.guide(x)
            return guide.trace, self._replay(x, guide.trace, particles)

    def _run_expected(self, x: Tensor, particles: int) -> tuple[Trace, Trace]:
        """Traces in which every latent that asks for it takes all its values, left of all plates."""
        left = -1 - self.layout.nesting - (particles > 1)
        plate = pyro.plate(PARTICLES, particles, dim=-1 - self.layout.nesting) if particles > 1 else nullcontext()
        with self.own_store(), plate, EnumMessenger(left):
            with TraceMessenger() as guide:
                self.guide(x)
            with TraceMessenger() as model, ReplayMessenger(trace=guide.trace):
                self.model(x)
        return guide.trace, model.trace

    def _replay(self, x: Tensor, guide_trace: Trace, particles: int = 1) -> Trace:
        with TraceMessenger() as model, ReplayMessenger(trace=guide_trace), self._enumeration(particles):
            self.model(x)
        return model.trace

    def _enumeration(self, particles: int) -> AbstractContextManager[Any]:
        """Sites of the model alone that are marked for enumeration take all their values, left of all plates."""
        if self._layout is None or not self._layout.enumerated:
            return nullcontext()
        return EnumMessenger(-1 - self._layout.nesting - (particles > 1))

    def traces(self, x: Tensor, particles: int = 1) -> tuple[Trace, Trace]:
        """Guide trace and replayed model trace of a batch; draws differ along a leading plate of `particles`."""
        self.adopt(x)
        if not self._store["params"]:
            return self._run(x, particles, -1 - self.layout.nesting)
        with self.own_store():
            return self._run(x, particles, -1 - self.layout.nesting)

    def guide_trace(self, x: Tensor) -> Trace:
        """The guide's trace alone."""
        self.adopt(x)
        with self.own_store():
            return poutine.trace(self.guide).get_trace(x)

    def model_trace(self, x: Tensor, values: Mapping[str, Tensor] | None = None) -> Trace:
        """The model's trace with some sites set to `values`; the others are drawn from the model, x is observed."""
        self.adopt(x)
        with self.own_store():
            return poutine.trace(poutine.condition(self.model, data=dict(values or {}))).get_trace(x)

    def simulate(self, x: Tensor) -> Trace:
        """A trace of the model with its observations removed: prior draws, as many as `x` has rows."""
        self.adopt(x)
        with self.own_store():
            return poutine.trace(poutine.uncondition(self.model)).get_trace(x)

    def terms(
        self,
        x: Tensor,
        particles: int = 1,
        *,
        closed_form: bool = False,
        rows: int | None = None,
        expected: bool = False,
    ) -> Terms:
        """The parts of the ELBO of a batch; differentiable.

        Arguments:
            x: data `(batch, *event)`.
            particles: draws per datum, along a new leading dimension when more than one.
            closed_form: use KL(q || p) in closed form where torch knows it.
            rows: size of the whole data set, over which the KL of global latents is shared; default: as the data
                plate declares it.
            expected: take latents of the guide that are marked for enumeration in expectation, not by a draw.

        Returns:
            Terms, nats. Their combination `reconstruction - sum(kl)` is an unbiased estimate of the ELBO.
        """
        self.adopt(x)
        layout, count = self.layout, particles if particles > 1 else 0
        if expected and layout.expected:
            return self._expected_terms(*self._run_expected(x, particles), count, closed_form, rows)
        guide_trace, model_trace = self.traces(x, particles)
        size = full_size(model_trace, layout, rows)
        if layout.enumerated:
            return self._summed_terms(guide_trace, model_trace, count, size)
        reconstruction = sum_over([log_prob(model_trace.nodes[name], layout, count, size) for name in layout.observed])
        kl: dict[str, Tensor] = {}
        scores: dict[str, Score] = {}
        for name in (*layout.latents, *layout.shared):
            q, p = guide_trace.nodes[name], model_trace.nodes.get(name)
            known = self._known_kl(q, p, count, size, closed_form)
            scored = name in layout.scored or name in layout.expected
            if scored or known is None:
                log_q = log_prob(q, layout, count, size)
            if scored:
                scores[name] = _score(q, layout, count, log_q, known is None)
                log_q = log_q.detach()
            if known is None:
                known = log_q - (0.0 if p is None else log_prob(p, layout, count, size))
            kl[name] = known
        return Terms(reconstruction, kl, penalties_of(guide_trace), scores)

    def states(self, x: Tensor) -> int:
        """Joint states of the latents that a loss sums over, the guide's and the model's; 1 where there are none."""
        self.adopt(x)
        names = (*self.layout.expected, *self.layout.enumerated)
        if not names:
            return 1
        with quiet(self, x), self.own_store():
            guide, model = (samples(trace) for trace in (poutine.trace(self.guide).get_trace(x), self.model_trace(x)))
        sites = [(guide | model)[name]["fn"] for name in names]
        return prod(int(fn.enumerate_support(expand=False).shape[0]) for fn in sites)

    def _known_kl(
        self, q: Mapping[str, Any], p: Mapping[str, Any] | None, count: int, size: int, closed_form: bool
    ) -> Tensor | None:
        """The KL of a site where it is no matter of log q - log p at a draw."""
        if p is None:
            return None
        priced = priced_kl(q, p, self.layout, count)
        return closed_kl(q, p, self.layout, count, size) if priced is None and closed_form else priced

    def _expected_terms(
        self, guide_trace: Trace, model_trace: Trace, count: int, closed_form: bool, rows: int | None
    ) -> Terms:
        """E_q(c|x) of every term, by the sum over all joint states c of the latents that are marked for it."""
        layout = self.layout
        if layout.enumerated:
            raise DeclarationError(
                f"{', '.join(layout.expected)}: expected draws beside {', '.join(layout.enumerated)}, which the model "
                f"sums out given them; got a sum over their states too. Set estimator = 'score', or relax them."
            )
        for name in layout.expected:
            require_summable(name, guide_trace.nodes[name], layout)
        size = full_size(model_trace, layout, rows)
        log_q = [log_prob(guide_trace.nodes[name], layout, count) for name in layout.expected]
        weights = sum_over(log_q).exp()
        width = 2 if count else 1

        def mean(value: Tensor) -> Tensor:
            total = weights * value
            total = total.sum(tuple(range(total.dim() - width)))
            return total.expand(count, -1) if count else total

        observed = sum_over([log_prob(model_trace.nodes[name], layout, count, size) for name in layout.observed])
        kl: dict[str, Tensor] = {}
        for name in (*layout.latents, *layout.shared):
            q, p = guide_trace.nodes[name], model_trace.nodes.get(name)
            known = self._known_kl(q, p, count, size, closed_form)
            if name in layout.scored:
                raise DeclarationError(
                    f"{name}: expected a draw with a gradient, or a sum over its states too, beside "
                    f"{', '.join(layout.expected)}, which are summed over; got a score function."
                )
            if known is None:
                known = log_prob(q, layout, count, size) - (0.0 if p is None else log_prob(p, layout, count, size))
            kl[name] = mean(known) if name in layout.latents else known
        return Terms(mean(observed), kl, penalties_of(guide_trace))

    def _summed_terms(self, guide_trace: Trace, model_trace: Trace, count: int, size: int) -> Terms:
        """Terms in expectation under p(c | x, z) of the enumerated sites: their sum is log sum_c p(x, z, c) - log q.

        The KL of a relaxed latent that is priced by its codes stands in the place of its own part of the sum.
        """
        layout = self.layout
        table = read_table(model_trace, layout, count)
        kl, scores = {}, {}
        for name in layout.latents:
            log_q = log_prob(guide_trace.nodes[name], layout, count)
            if name in layout.scored:
                scores[name] = _score(guide_trace.nodes[name], layout, count, log_q, own_kl=True)
                log_q = log_q.detach()
            priced = self._known_kl(guide_trace.nodes[name], model_trace.nodes.get(name), count, size, False)
            if priced is None:
                priced = log_q - (table.expected(name) if name in table.logs else 0.0)
            kl[name] = priced
        for name in layout.shared:
            q, p = guide_trace.nodes[name], model_trace.nodes.get(name)
            kl[name] = log_prob(q, layout, count, size) - (0.0 if p is None else log_prob(p, layout, count, size))
        observed = [
            table.expected(name) if name in table.logs else log_prob(model_trace.nodes[name], layout, count, size)
            for name in layout.observed
        ]
        return Terms(sum_over(observed), {**kl, **table.kl()}, penalties_of(guide_trace), scores)

    def forward(self, x: Tensor) -> Tensor:
        """ELBO estimate of every datum, nats, `(batch,)`."""
        terms = self.terms(x, expected=True)
        return terms.reconstruction - sum_over(list(terms.kl.values()))

    # ------------------------------------------------------------------ checking

    def check(self, x: Tensor) -> list[Problem]:
        """What is wrong with the pair, found by running it on `x` (a few rows suffice).

        Finds sites that differ between model and guide, a missing data plate, a latent without `to_event`,
        a latent without a pathwise gradient, and parameters that no gradient reaches. Empty when all is well.
        """
        rows = x[: min(len(x), 3)]
        try:
            return list(dict.fromkeys(self._problems(rows)))
        except (ValueError, RuntimeError, DeclarationError) as error:
            return [explain(error)]

    def _problems(self, rows: Tensor) -> list[Problem]:
        with torch.random.fork_rng(), pyro.get_param_store().scope(_current_store()):
            guide_trace, model_trace = self._run(rows)
        problems = differing_sites(guide_trace, model_trace)
        problems += [p for t in (guide_trace, model_trace) for p in plate_problems(t, len(rows))]
        if problems or self.implicit:  # a pair without a likelihood has no ELBO, whose gradient could be looked at
            return problems
        return gradient_problems(self.adopt(rows), rows, guide_trace)


def _current_store() -> Any:
    """A shallow copy of the global param store: values a user has already fitted are found and adopted."""
    state = pyro.get_param_store().get_state()
    return {"params": dict(state["params"]), "constraints": dict(state["constraints"])}


def _attribute(name: str, free: nn.ParameterDict) -> str:
    """A param's name as an attribute: `net$$$0.weight` as `net___0_weight`, with `_` appended while it is taken."""
    key = re.sub(r"[^0-9A-Za-z_]", "_", name)
    while hasattr(free, key):
        key += "_"
    return key


@contextmanager
def quiet(pair: Pair, x: Tensor) -> Iterator[None]:
    """Evaluation mode, no gradients, no validation, a random state of its own; all is put back as it was."""
    modes = [(module, module.training) for module in pair.modules()]
    pair.eval()
    devices = [x.device] if x.is_cuda else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices), pyro.validation_enabled(False):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def penalties_of(guide_trace: Trace) -> dict[str, Tensor]:
    """What sites of a guide add to the loss beside the ELBO, `<site>/<what>`: their `infer["penalties"]`."""
    out: dict[str, Tensor] = {}
    for name, node in guide_trace.nodes.items():
        infer: Any = node["infer"] if node["type"] == "sample" else {}
        if "penalties" in infer:
            out |= {f"{name.removesuffix('/embedded')}/{what}": v for what, v in infer["penalties"].items()}
    return out


# ---------------------------------------------------------------------- findings


def explain(error: Exception) -> Problem:
    """Pyro's shape errors in words."""
    text = str(error)
    if isinstance(error, DeclarationError):
        return Problem("pair", text)
    found = re.search(r"inside plate\('([^']*)'\) at site (\S+) dim (-\d+), (\d+) vs (\d+)", text)
    if found is None and "within the support" in text:
        support = re.search(r"within the support \((.*?)\) of the distribution (\w+)", text)
        what = f"{support[2]} scores only {support[1]}" if support else "the distribution cannot score it"
        return Problem(
            "pair", f"expected data in the support of the observed site; {what}. Transform x, or use another."
        )
    if found is None:
        return Problem("pair", f"expected both programs to run on a batch; got {text.splitlines()[0][:200]}")
    plate, site, dim, want, got = found.groups()
    return Problem(
        site,
        f"expected batch size {want} at dim {dim} inside plate {plate!r}; got {got}. Its event dimensions are not "
        f"declared: write `.to_event(1)` after the distribution.",
    )


def differing_sites(guide_trace: Trace, model_trace: Trace) -> list[Problem]:
    """Latents that only one side has; the model may keep discrete ones to itself that are marked for enumeration."""
    nodes = samples(model_trace)
    guide = {n for n, node in samples(guide_trace).items() if not node["infer"].get("is_auxiliary")}
    model = {n for n, node in samples(model_trace).items() if not node["is_observed"]}
    only_guide = [
        Problem(name, f"expected a latent of this name in the model; got {_names(model)}") for name in guide - model
    ]
    only_model = [
        Problem(name, f"expected a latent of this name in the guide; got {_names(guide)}{_or_enumerate(nodes[name])}")
        for name in model - guide
        if not is_enumerable(nodes[name])
    ]
    return sorted(only_guide + only_model, key=lambda problem: problem.site)


def _or_enumerate(node: Mapping[str, Any]) -> str:
    discrete = node["fn"].has_enumerate_support
    return '. Or have it summed over exactly: infer={"enumerate": "parallel"}' if discrete else ""


def _names(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def plate_problems(trace: Trace, count: int) -> list[Problem]:
    """Sites whose batch dimensions no plate declares."""
    problems = []
    enumerated = {node["infer"].get("_enumerate_dim") for node in samples(trace).values()}
    for name, node in samples(trace).items():
        shape = tuple(node["fn"].batch_shape)
        dims = {f.dim for f in node["cond_indep_stack"] if f.vectorized}
        stray = [d for d in range(-len(shape), 0) if shape[d] > 1 and d not in dims | enumerated]
        if not stray:
            continue
        if not dims and shape[0] == count:
            message = (
                f"expected a plate over the {count} rows of the batch; got batch shape {list(shape)} and no plate. "
                f'Write `with pyro.plate("data", len(x)):` around it.'
            )
        else:
            message = (
                f"expected only plates among its batch dimensions; got {list(shape)} where dim {stray[0]} is "
                f"no plate. Write `.to_event(...)` after the distribution."
            )
        problems.append(Problem(name, message))
    return problems


def gradient_problems(pair: Pair, x: Tensor, guide_trace: Trace) -> list[Problem]:
    """Global latents whose draw carries no gradient, and parameters that no gradient reaches."""
    problems = [
        Problem(
            name,
            f"expected a distribution with a pathwise gradient (rsample) outside the data plate; got "
            f"{type(guide_trace.nodes[name]['fn']).__name__}, whose score function would be that of all data at once.",
        )
        for name in pair.layout.shared
        if name in pair.layout.scored
    ]
    parameters = {name: p for name, p in pair.named_parameters() if p.requires_grad}
    with torch.random.fork_rng(), torch.enable_grad():
        terms = pair.terms(x, expected=True)
        parts = [*terms.kl.values(), *terms.penalties.values(), *(s.log_q for s in terms.scores.values())]
        parts += [s.baseline for s in terms.scores.values() if s.learns and s.baseline is not None]
        loss = sum_over([part.sum() for part in (terms.reconstruction, *parts)])
        gradients = (
            torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            if loss.requires_grad
            else [None] * len(parameters)
        )
    return problems + [
        Problem(name, "expected a gradient of the ELBO; got none: the parameter is used by neither program")
        for name, gradient in zip(parameters, gradients, strict=True)
        if gradient is None
    ]
