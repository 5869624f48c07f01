"""Checks of a pair: problems of its two programs, found by running them on a few rows."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pvae.errors import DeclarationError
from pvae.pair.adoption import current_store
from pvae.pair.densities import sum_over
from pvae.pair.layout import plates_around, samples
from pvae.pair.problems import Problem, ProgramError, differing_sites, explained
from pvae.pair.running import evaluating, run, whole_plates
from pvae.pair.unpacking import read_unpacked

if TYPE_CHECKING:
    from pvae.pair.pair import Pair


def problems_of(pair: Pair, x: Tensor) -> list[Problem]:
    """Return the problems of a copy of a pair, found by running it on data; the body of `Pair.check`."""
    try:
        with nullcontext() if pair.declared else evaluating(pair):
            with torch.random.fork_rng(), pyro.get_param_store().scope(current_store()), whole_plates():
                guide_trace, model_trace = run(pair, x)
            unpacked = {} if pair.declared else read_unpacked(guide_trace, model_trace)
            problems = differing_sites(guide_trace, model_trace, unpacked)
            problems += [p for t in (guide_trace, model_trace) for p in plate_problems(t, len(x))]
            if not problems and not pair.implicit:  # a pair without a likelihood has no ELBO with a gradient
                problems = gradient_problems(pair.adopt(x), x, guide_trace)
    except ProgramError as error:
        return [Problem(error.site, error.said)]
    except DeclarationError as error:
        return [Problem(*_split(text)) for text in error.problems]
    except (ValueError, RuntimeError, TypeError, IndexError) as error:  # of a density, say at data outside its support
        return [explained(error, "pair", x)]
    return list(dict.fromkeys(problems))


def _split(text: str) -> tuple[str, str]:
    """Return the site that a message begins with, and the rest; "pair" where it begins with none."""
    site, colon, rest = text.partition(": ")
    return (site, rest) if colon and " " not in site else ("pair", text)


def plate_problems(trace: Trace, count: int) -> list[Problem]:
    """Return a problem for each site with a batch dimension that no plate declares."""
    problems = []
    enumerated = {node["infer"].get("_enumerate_dim") for node in samples(trace).values()}
    for name, node in samples(trace).items():
        shape = tuple(node["fn"].batch_shape)
        dims = {f.dim for f, _ in plates_around(node)}
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
