"""Checks of a pair: problems of its two programs, found by running them on a few rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pvae.errors import DeclarationError
from pvae.pair.adoption import current_store
from pvae.pair.densities import sum_over
from pvae.pair.layout import is_enumerable, samples
from pvae.pair.running import run

if TYPE_CHECKING:
    from pvae.pair.pair import Pair


@dataclass(frozen=True)
class Problem:
    """One problem found by `Pair.check`: the site and a message."""

    site: str
    message: str

    def __str__(self) -> str:
        return f"{self.site}: {self.message}"


def problems_of(pair: Pair, rows: Tensor) -> list[Problem]:
    """Return the problems of a pair, found by running it on the given rows; the body of `Pair.check`."""
    try:
        with torch.random.fork_rng(), pyro.get_param_store().scope(current_store()):
            guide_trace, model_trace = run(pair, rows)
        problems = differing_sites(guide_trace, model_trace)
        problems += [p for t in (guide_trace, model_trace) for p in plate_problems(t, len(rows))]
        if not problems and not pair.implicit:  # a pair without a likelihood has no ELBO, whose gradient could be seen
            problems = gradient_problems(pair.adopt(rows), rows, guide_trace)
    except (ValueError, RuntimeError, DeclarationError) as error:
        return [explain(error)]
    return list(dict.fromkeys(problems))


def explain(error: Exception) -> Problem:
    """Return an exception raised while a pair was run as a `Problem` with a plain message."""
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
    """Return a problem for each latent in only one program; enumerated latents of the model alone are allowed."""
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
    """Return a problem for each site with a batch dimension that no plate declares."""
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
    """Return a problem for each global latent without a pathwise gradient, and each parameter without a gradient."""
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
