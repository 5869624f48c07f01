"""Description of a declaration for its reader: formulas, graph, shapes and parameter counts."""

import re
from collections import Counter
from collections.abc import Iterable

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from pvae.component import Shape
from pvae.experiment.captions import scored
from pvae.experiment.experiment import Experiment
from pvae.graph.site import OBSERVED, Site
from pvae.pair.pair import Pair
from pvae.words import text


def factor(density: str, name: str, given: Iterable[str]) -> str:
    """Return a factor of a density as text, such as `p(z1 | z2)`."""
    return f"{density}({' | '.join(filter(None, (name, ', '.join(given))))})"


def latex(text: str) -> str:
    r"""Return a formula from `formulas` in LaTeX, with names such as `z_{1}` and `my\_code`."""
    text = re.sub(r"\b([a-z])_?(\d+)\b", r"\1_{\2}", text)
    text = re.sub(r"_(?!\{)", r"\\_", text)
    return re.sub(r"\) (?=[pq]\()", r")\\, ", text.replace(" | ", r" \mid "))


def formulas(experiment: Experiment) -> dict[str, str]:
    """Return the factorisations of model p(x, z) and guide q(z | x) as text and LaTeX.

    The keys are `model`, `guide`, `model_latex` and `guide_latex`.
    """
    sites, guide_sites = experiment.sites(), experiment.guide_sites()
    names = ", ".join(site.name for site in sites)
    given_of = {name: [n for n in experiment.latents[z].given if n != name] for name, z in scored(experiment).items()}
    factors = {**given_of, **{site.name: site.given for site in sites}, OBSERVED: decoded(experiment)}
    given = [name for name, entry in experiment.entries().items() if not entry.latent]
    absent = {"m": experiment.decoder_given()} if experiment.decoder.missingness == "z" else {}  # which are missing
    joint = factor("p", ", ".join((OBSERVED, *absent, *given_of, names)), [n for n in given if n not in given_of])
    model = f"{joint} = {' '.join(factor('p', *each) for each in (factors | absent).items())}"
    posteriors = [factor("q", site.name, site.guide_given) for site in guide_sites]
    posteriors += [factor("p", site.name, (OBSERVED, *site.given)) for site in sites if site.summed]  # by Bayes
    guide = f"{factor('q', names, (OBSERVED, *given))} = {' '.join(posteriors)}"
    return {"model": model, "guide": guide, "model_latex": latex(model), "guide_latex": latex(guide)}


def decoded(experiment: Experiment) -> list[str]:
    """Return the names of all that p(x | ...) is given: by the decoder's network, then by the likelihood."""
    return list(dict.fromkeys((*experiment.decoder_given(), *experiment.decoder.likelihood.conditions)))


def arrows(sites: Iterable[Site], data: Iterable[str]) -> list[str]:
    """Return the graph of the model, a line for each node: `z2 -> z1`, `z1, z2 -> x`."""
    lines = [f"{', '.join(site.given)} -> {site.name}" if site.given else site.name for site in sites]
    return [*lines, f"{', '.join(data)} -> {OBSERVED}"]


def counts(pair: Pair) -> dict[str, int]:
    """Return the number of parameters of each component of a pair, by name."""
    totals: Counter[str] = Counter()
    for name, parameter in pair.named_parameters():
        depth = 3 if ".priors." in name or ".posteriors." in name else 2
        totals[".".join(name.split(".")[:depth])] += parameter.numel()
    return dict(totals)


def size_of(site: Site) -> str:
    """Return the size of a latent as text: `[40]`, `32 codes`, `7 x 7 of 512 codes as [64]`, `200 bits`."""
    return text("experiment.readback.size", space=site.space)


def described(experiment: Experiment, x: Shape, pair: Pair) -> dict[str, object]:
    """Return formulas, graph, shapes and parameter counts of a declaration as a dictionary for JSON."""
    return {
        "name": experiment.name, "description": experiment.description, **formulas(experiment),
        "graph": arrows(experiment.sites(), decoded(experiment)), "x": list(x),
        "latents": {site.name: size_of(site) for site in experiment.sites()}, "parameters": counts(pair),
    }  # fmt: skip


def render(experiment: Experiment, x: Shape, pair: Pair) -> Group:
    """Return formulas, graph, shapes and parameter counts of a declaration for a terminal, as an object of rich."""
    found = formulas(experiment)
    latents = Table("name", "shape", "prior", "posterior", title="latents", title_justify="left")
    for site in experiment.sites():
        latent = experiment.latents[site.name]
        prior = f"{latent.prior.kind}: {factor('p', site.name, site.given)}"
        posterior = f"{latent.posterior.kind}: {factor('q', site.name, site.guide_given)}"
        latents.add_row(site.name, size_of(site), prior, posterior)
    observed = f"{experiment.decoder.likelihood.kind}: {factor('p', OBSERVED, decoded(experiment))}"
    latents.add_row(OBSERVED, str(list(x)), observed, "data")
    sizes = Table("part", Column("values", justify="right"), title="parameters", title_justify="left")
    for part, count in counts(pair).items():
        sizes.add_row(part, f"{count:,}")
    sizes.add_row("total", f"{sum(counts(pair).values()):,}", style="bold")
    graph = ";  ".join(arrows(experiment.sites(), decoded(experiment)))
    lines = [
        f"{experiment.name}  {experiment.description}".rstrip(), f"graph   {graph}", f"model   {found['model']}",
        f"guide   {found['guide']}", f"LaTeX   {found['model_latex']}", f"        {found['guide_latex']}",
    ]  # fmt: skip
    return Group(*(Text(line) for line in lines), latents, sizes)
