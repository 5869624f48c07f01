"""Pair of a Pyro model and guide as one Module, with the terms of its ELBO, its structure and its checks."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self, TypeVar

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pvae.errors import DeclarationError, instead, misdeclared, refuse
from pvae.graph.frame import Frame
from pvae.graph.lifecycle import MadeOfData
from pvae.pair import adoption, densities, pathwise, problems
from pvae.pair.dependencies import Dependencies, dependencies_without_asking, read_dependencies, weights_of
from pvae.pair.layout import Layout, Traces
from pvae.pair.running import Way, run, trace_of, way_of_particles, with_particles
from pvae.pair.structure import Arguments, Structure, is_several, unpack
from pvae.pair.terms import Terms, expected_terms, terms_of

T = TypeVar("T")
CHECKED_ROWS = 1000
"""Largest number of rows on which `Pair.check` runs hand-written programs."""


class Pair(nn.Module):
    """Pyro programs `model(x)` and `guide(x)` as one Module, which gives their ELBO terms, structure and checks.

    Parameters of foreign programs (`pyro.param`, `pyro.module`, PyroModules, bound methods of a Module) are
    adopted on first use with data: they become this Module's parameters, and every later call runs in a param
    store of the pair's own, so that several pairs live in one process and the global store stays as it was. Until a
    fit changes them, an analysis takes the values that Pyro's own SVI has put into the global store since. Pyro's own
    tools use the fitted values inside `with pair.own_store():`, such as `Predictive(model, guide=guide, ...)(x)`.

    Arguments:
        model: a Pyro program of x `(batch, *event)` that observes it inside one data plate. It may take several
            arguments, `model(x, y, lengths)`: data are then a tuple, or a dictionary of keyword arguments, of tensors.
        guide: a Pyro program of the same arguments that samples the model's latents.

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
        self.model, self.guide = model, guide
        self.declared = isinstance(getattr(model, "frame", None), Frame)
        """True for a pair built from a declaration, False for one of hand-written programs."""
        self._structure: Structure | None = None
        self._answers: dict[str, tuple[Any, Any]] = {}
        self._store: adoption.Store = {"params": {}, "constraints": {}}
        self._watch = adoption.StoreRecord()
        self.arguments: Arguments | None = None
        """Arguments of the programs, where they take several; found with the first data."""
        self.origin = ""
        """Options of the command line that name the file of a hand-written pair and its data; empty in Python."""
        self.implicit = False
        """True for an implicit model (GAN): x can only be sampled, without a likelihood or inference."""

    @property
    def structure(self) -> Structure:
        """Structure of the two programs (sites, plates, shapes), which `adopt` found by running them.

        Raises:
            DeclarationError: the pair has seen no data yet.
        """
        if self._structure is None:
            raise DeclarationError("pair: expected pair.adopt(x) before its layout is asked for; got no data yet.")
        return self._structure

    @property
    def layout(self) -> Layout:
        """Names of the latent and observed sites, and position of the data plate."""
        return self.structure.layout

    @property
    def relaxed(self) -> tuple[str, ...] | None:
        """Relaxed latents that analyses replace by discrete codes; None for a declared pair, whose sites tell."""
        return None if self.declared else self.layout.relaxed

    # ------------------------------------------------------------------ adoption

    def adopt(self, x: Tensor) -> Self:
        """Run both programs on rows of `x`, read their structure, register their parameters; return self.

        The random state is restored; a second call does nothing.

        Raises:
            DeclarationError: nothing is observed inside a data plate.
        """
        if self._structure is None:
            self._structure = adoption.adopted(self, x, self._store)
            self._watch.note(self._store)
        return self

    def owners(self) -> list[nn.Module]:
        """Return the Modules of which the model or the guide program is a bound method."""
        found = (getattr(program, "__self__", None) for program in (self.model, self.guide))
        return list(dict.fromkeys(owner for owner in found if isinstance(owner, nn.Module)))

    def accept(self, x: Any) -> Tensor:
        """Return data as input to the programs, a tensor `(n, *event)` of the type and device of the parameters.

        Integers and booleans stay so for hand-written programs, which may use them as indices.

        Raises:
            DataError: there are no rows, their shape differs from that of the pair's data, or the programs have
                parameters for every row and these are other rows.
        """
        parameter = next((p for m in (self, *self.owners()) for p in m.parameters() if p.is_floating_point()), None)
        x = self.pack(x)
        holds = isinstance(getattr(x, "x", None), Tensor)
        with instead((TypeError, ValueError, RuntimeError), "pair.pair.no_tensor", x=x, holds=holds):
            x = torch.as_tensor(x)
        if parameter is not None:
            x = x.to(parameter) if self.declared or x.is_floating_point() else x.to(parameter.device)
        if x.dim() and len(x):
            x = x if self.declared or x.is_floating_point() else adoption.whole_or_floats(self, x, parameter)
            self.adopt(x)
            if not self.declared:
                self._watch.follow(self._store)
        event = () if self._structure is None else self._structure.event
        refuse(not x.dim() or not len(x) or tuple(x.shape[1:]) != event, "pair.pair.no_rows", shape=event, x=x)
        refuse(problem := adoption.other_rows(self._structure, x), str(problem))
        return x

    def call(self, program: Callable[..., Any], x: Tensor) -> None:
        """Run a program of the pair, or one wrapped in a handler, on a batch; its errors are told in words.

        Raises:
            ProgramError: the program failed.
        """
        with problems.told("pair.guide" if program is self.guide else "pair.model", x):
            self.program(program)(x)

    def program(self, program: Callable[..., Any]) -> Callable[[Tensor], Any]:
        """Return a program of rows as a fit or an analysis holds them, which gives the user's its own arguments."""
        if self.declared or (self.arguments is None and (self._structure is None or self._structure.dtype is None)):
            return program

        def run(x: Tensor) -> Any:
            if self.arguments is None:
                return program(x.to(self.structure.dtype))
            args, named = self.arguments.unpack(x)
            return program(*args, **named)

        return run

    def pack(self, data: Any) -> Any:
        """Return several arguments (a tuple, list or dictionary of tensors) as rows of bytes, other data as they are.

        Raises:
            DataError: they are not those that the pair has had before.
        """
        if self.declared or not is_several(data):
            return data
        if self.arguments is None:
            self.arguments = Arguments.of(data)
        return self.arguments.pack(data)

    def dependencies(self, x: Tensor) -> Dependencies:
        """Return the latents that each conditional distribution depends on, found on a few rows of `x`.

        The result holds for the current weights and is cached until they change.
        """
        self.adopt(x)
        if (known := dependencies_without_asking(self.structure)) is not None:
            return known
        key = (weights_of(self), self.layout.latents)
        return self.remember("dependencies", key, lambda: read_dependencies(self, x))

    def remember(self, question: str, key: Any, ask: Callable[[], T]) -> T:
        """Return `ask()`, cached on the pair under the name `question` until `key` changes."""
        if question not in self._answers or self._answers[question][0] != key:
            self._answers[question] = (key, ask())
        return self._answers[question][1]

    def own_store(self) -> AbstractContextManager[Any]:
        """Return a context manager in which Pyro's param store holds the parameters that the pair has adopted."""
        return pyro.get_param_store().scope(self._store) if self._store["params"] else nullcontext()

    def groups(self, x: Tensor) -> Tensor | None:
        """Return an integer per row, `(n,)`, that identifies its joint covariate value; None without covariates."""
        return self.frame.groups(x)

    @property
    def frame(self) -> Frame:
        """Layout of a row of data: the data point and its covariates; hand-written pairs have no covariates."""
        frame = getattr(self.model, "frame", None)
        return frame if isinstance(frame, Frame) else Frame(() if self._structure is None else self._structure.event)

    def attend(self, x: Tensor) -> Self:
        """Pass the training data `(n, *event)` to the Modules that keep them (such as mixture priors); return self."""
        for part in self.made_of_data():
            part.attend(x)
        return self

    def made_of_data(self) -> list[MadeOfData]:
        """Return the submodules that keep the training data, such as priors that mix posteriors at training points."""
        return [module for module in self.modules() if isinstance(module, MadeOfData)]

    # ------------------------------------------------------------------ running

    def traces(self, x: Tensor, particles: int = 1) -> Traces:
        """Return traces of the guide and of the model replayed on it, with `particles` samples in a leading plate."""
        self.adopt(x)
        layout = self.layout
        with self.own_store():
            found = self.known(x, *run(self, x, layout, particles))
            if layout.enumerated != self.layout.enumerated:  # sites to be summed out, which no batch had before
                found = self.known(x, *run(self, x, self.layout, particles))
        return found

    def guide_trace(self, x: Tensor, values: Mapping[str, Tensor] | None = None) -> poutine.Trace:
        """Return a trace of the guide on a batch, with some sites set to `values`, without running the model."""
        self.adopt(x)
        with self.own_store(), poutine.condition(data=dict(values)) if values else nullcontext():
            found = unpack(trace_of(self, self.guide, x), self.structure.unpacked)
        if not self.structure.knows(found):
            self.traces(x)
        return found

    def model_trace(self, x: Tensor, values: Mapping[str, Tensor] | None = None) -> poutine.Trace:
        """Return a trace of the model with some sites set to `values`; other latents are sampled, x is observed."""
        return self._model_trace(poutine.condition(self.model, data=dict(values or {})), x)

    def simulate(self, x: Tensor) -> poutine.Trace:
        """Return a trace of the model that samples latents and x from the prior, one sample for each row of `x`.

        Captions that the model scores are those of the rows, or samples where they are unknown, NaN.
        """
        observed, columns = self.adopt(x).layout.observed, self.frame.columns(x)
        given = {name: t.long() for name, t in columns.items() if name in observed and not bool(t.isnan().any())}
        return self._model_trace(poutine.condition(poutine.uncondition(self.model), data=given), x)

    def _model_trace(self, model: Callable[..., Any], x: Tensor) -> poutine.Trace:
        self.adopt(x)
        with self.own_store():
            found = trace_of(self, model, x)
        if not self.structure.knows(None, found):
            self.traces(x)
        return found

    def known(self, x: Tensor, guide: poutine.Trace, model: poutine.Trace) -> Traces:
        """Return the traces of a batch with unpacked latents as one site; take in sites that no batch had before."""
        guide = unpack(guide, self.structure.unpacked)
        if not self.structure.knows(guide, model):
            self._structure = self.structure.joined(adoption.read_again(self.structure, guide, model, len(x)))
        return guide, model

    def terms(
        self, x: Tensor, particles: int = 1, *, closed_form: bool = False,
        rows: int | None = None, expected: bool = False, estimator: pathwise.Estimator | None = None,
    ) -> Terms:  # fmt: skip
        """Return the terms of the ELBO of a batch: log-likelihood, KL of every latent, penalties; differentiable.

        Arguments:
            x: data `(batch, *event)`.
            particles: samples per row, along a new leading dimension when more than one.
            closed_form: use KL(q || p) in closed form where torch knows it.
            rows: size n of the whole data set, by which the KL of global latents is divided; default: as the data
                plate declares it.
            expected: sum exactly over the guide's latents that are marked for enumeration instead of sampling them.
            estimator: estimator of the gradient, without effect on the values; None for that of the terms themselves.

        Returns:
            Terms, nats. Their combination `reconstruction - sum(kl)` is an unbiased estimate of the ELBO.
        """
        self.adopt(x)
        problems.require_bound(self.structure.guide_only)
        if particles > 1 and (way := self.way_of_particles(x)) != "plate":
            misdeclared(estimator and (estimator.passed is not None or estimator.apart), "pair.pathwise.plate", way=way)
            return with_particles(self, x, particles, way, closed_form=closed_form, rows=rows, estimator=estimator)
        if estimator is not None and torch.is_grad_enabled():
            return pathwise.pathwise_terms(self, x, particles, rows, estimator)
        count = particles if particles > 1 else 0
        if not expected or not self.layout.expected:
            return terms_of(self.traces(x, particles), self.layout, count, closed_form, rows)
        with self.own_store():
            traces = run(self, x, self.layout, particles, expected=True)
        return expected_terms(self.known(x, *traces), self.layout, count, closed_form, rows)

    def way_of_particles(self, x: Tensor) -> Way:
        """Return the way to run several samples per row of a batch: along a plate, as repeated rows, or one by one."""
        return way_of_particles(self.adopt(x), x)

    def forward(self, x: Tensor) -> Tensor:
        """Return a one-sample estimate of the ELBO of every row, nats, `(batch,)`; exact over enumerated latents."""
        terms = self.terms(x, expected=True)
        return terms.reconstruction - densities.sum_over(list(terms.kl.values()))

    # ------------------------------------------------------------------ checking

    def check(self, x: Tensor) -> list[problems.Problem]:
        """Return the problems found by running the pair on `x`, at most 1000 rows of it; empty if there are none.

        Finds sites that differ between model and guide, a missing data plate, a latent without `to_event`,
        a global latent without a pathwise gradient, and parameters that no gradient reaches. A copy of the pair is
        run, so that nothing changes: neither parameters, nor Pyro's param store, nor an AutoGuide not yet set up.
        """
        arguments = self.arguments
        x = torch.as_tensor(self.pack(x))
        if problem := adoption.other_rows(self._structure, x):
            return [problem]
        if self.declared or self._structure is not None:
            return problems.problems_of(self, x[:3] if self.declared else self.structure.few(x, CHECKED_ROWS))
        probe, store = adoption.copied(self)
        probe.arguments, self.arguments = self.arguments, arguments
        with pyro.get_param_store().scope(store):
            return problems.problems_of(probe, x[:CHECKED_ROWS])
