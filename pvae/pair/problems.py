"""Problems of a pair in words: errors of a program with site, shapes and line, and what a run on a few rows shows."""

import re
import sysconfig
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import pyro
import torch
from pyro.poutine.trace_struct import Trace

from pvae.errors import DeclarationError, PvaeError, misdeclared, text
from pvae.pair.densities import sum_over
from pvae.pair.layout import is_enumerable, is_point, plates_around, samples
from pvae.pair.running import current_store, evaluating, run, whole_plates
from pvae.pair.structure import Unpacked, read_unpacked
from pvae.util import Record

if TYPE_CHECKING:
    from pvae.pair.pair import Pair


PASSED_ON = (PvaeError, pyro.poutine.NonlocalExit, MemoryError, torch.OutOfMemoryError, OSError)
"""Exceptions that say nothing about the program that raised them."""
HOUSES = (*torch.__path__, *pyro.__path__, str(Path(__file__).parents[1]), sysconfig.get_paths()["stdlib"])
"""Folders of the libraries, whose lines are not the user's."""


class Problem(Record):
    """One problem found by `Pair.check`: the site and a message."""

    site: str
    message: str

    def __str__(self) -> str:
        return f"{self.site}: {self.message}"


def guide_only(guide_trace: Trace, model_trace: Trace, unpacked: Unpacked | None = None) -> list[str]:
    """Return the latents that the guide samples and the model lacks, without the auxiliary sites of unpacked latents.

    An auxiliary site whose density another latent takes over (a Delta with a log density, as AutoGuides write) is not
    among them.
    """
    guide, model = samples(guide_trace), samples(model_trace)
    used = {made.auxiliary for made in (unpacked or {}).values()}
    known = {name for name, node in model.items() if not node["is_observed"]}
    alone = [n for n, node in guide.items() if not node["is_observed"] and n not in known and n not in used]
    packed = sum(node["value"].numel() for n, node in guide.items() if n in known and is_point(node["fn"]))
    joint = [n for n in alone if guide[n]["infer"].get("is_auxiliary")]
    # Where they are larger nothing unpacks them.
    return alone if sum(guide[n]["value"].numel() for n in joint) > packed else [n for n in alone if n not in joint]


def require_bound(alone: Collection[str]) -> None:
    """Refuse a guide with latents `alone` that the model lacks: log p(x, z) - log q(z, a | x) bounds nothing.

    Raises:
        DeclarationError: the message names the sites.
    """
    misdeclared(alone, "pair.problems.guide_only", sites=alone)


def differing_sites(guide_trace: Trace, model_trace: Trace, unpacked: Unpacked | None = None) -> list[Problem]:
    """Return a problem for each latent in only one program; enumerated latents of the model alone are allowed."""
    nodes, sites = samples(model_trace), samples(guide_trace)
    sampled, model = ({n for n, node in side.items() if not node["is_observed"]} for side in (sites, nodes))
    guide = {name for name in sampled if not sites[name]["infer"].get("is_auxiliary")}
    alone = guide_only(guide_trace, model_trace, unpacked)
    lost = {name: nodes[name]["fn"] for name in model - sampled if not is_enumerable(nodes[name])}
    problems = [Problem(name, text("pair.problems.not_in_model", names=sorted(model))) for name in alone]
    problems += [Problem(z, text("pair.problems.not_in_guide", names=sorted(guide), fn=fn)) for z, fn in lost.items()]
    return sorted(problems, key=lambda problem: problem.site)


class ProgramError(DeclarationError):
    """A program of a pair failed on a batch; `site` is the site at fault, or "pair.model" or "pair.guide"."""

    def __init__(self, problem: Problem) -> None:
        self.site, self.said = problem.site, problem.message
        super().__init__(str(problem))


@contextmanager
def told(side: str, x: torch.Tensor) -> Iterator[None]:
    """Context manager that turns an exception of a program into a `ProgramError` with a plain message."""
    try:
        yield
    except PASSED_ON:
        raise
    except Exception as error:
        raise ProgramError(explained(error, side, x)) from error


def explained(error: Exception, side: str, x: torch.Tensor) -> Problem:
    """Return an exception raised while a program ran on the batch `x` as a `Problem` with a plain message."""
    said, at = str(error), _line(error)
    if found := re.search(r"inside plate\('([^']*)'\) at site (\S+) dim (-\d+), (\d+) vs (\d+)", said):
        plate, site, dim, want, got = found.groups()
        sizes = {"want": want, "got": got, "whole": int(want) == len(x)}
        return Problem(site, text("pair.problems.batch_size", plate=plate, dim=dim, at=at, **sizes))
    if "within the support" in said:
        support = re.search(r"within the support \((.*?)\) of the distribution (\w+)", said)
        return Problem(side, text("pair.problems.support", support=support, at=at))
    first = said.splitlines()[0][:200] if said else "no message"
    return Problem(side, text("pair.problems.failed", shape=x.shape, error=error, first=first, at=at))


def _line(error: Exception) -> str:
    """Return the last line of the user's program in the traceback of an error, as ", at FILE:LINE `CODE`"."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(HOUSES)]
    if not frames:
        return ""
    last = frames[-1]
    return f", at {Path(last.filename).name}:{last.lineno}" + (f" `{last.line}`" if last.line else "")


# ---------------------------------------------------------------------- found by a run


def problems_of(pair: "Pair", x: torch.Tensor) -> list[Problem]:
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
        shape, dims = tuple(node["fn"].batch_shape), {f.dim for f, _ in plates_around(node)}
        stray = [d for d in range(-len(shape), 0) if shape[d] > 1 and d not in dims | enumerated]
        if stray:
            rows = count if not dims and shape[0] == count else None
            problems.append(Problem(name, text("pair.problems.stray", rows=rows, shape=shape, dim=stray[0])))
    return problems


def gradient_problems(pair: "Pair", x: torch.Tensor, guide_trace: Trace) -> list[Problem]:
    """Return a problem for each global latent without a pathwise gradient, and each parameter without a gradient."""
    scored = {n: guide_trace.nodes[n]["fn"] for n in pair.layout.shared if n in pair.layout.scored}
    problems = [Problem(name, text("pair.problems.score", fn=fn)) for name, fn in scored.items()]
    parameters = {name: p for name, p in pair.named_parameters() if p.requires_grad}
    learned = list(parameters.values())
    with torch.random.fork_rng(), torch.enable_grad():
        terms = pair.terms(x, expected=True)
        parts = [*terms.kl.values(), *terms.penalties.values(), *(s.log_q for s in terms.scores.values())]
        parts += [s.baseline for s in terms.scores.values() if s.learns and s.baseline is not None]
        loss = sum_over([part.sum() for part in (terms.reconstruction, *parts)])
        slopes = torch.autograd.grad(loss, learned, allow_unused=True) if loss.requires_grad else [None] * len(learned)
    unused = [name for name, slope in zip(parameters, slopes, strict=True) if slope is None]
    return problems + [Problem(name, text("pair.problems.unused")) for name in unused]
