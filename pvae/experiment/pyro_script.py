"""Print a declaration as a plain Pyro script: networks, `model`, `guide`, and a loop of `SVI`.

Parts that torch or Pyro have are written out; others that stand alone are built by name from their classes in pvae. Where
a part reads the other side of the pair (a codebook, the model's prior, training data) all parts come from the pair that
pvae builds. The statements of `model` and `guide` are written out in any case.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from math import prod
from typing import TYPE_CHECKING, Any, final

import tomli_w
import torch
from torch import nn

from pvae.component import Component, Section, Shape
from pvae.errors import DeclarationError
from pvae.experiment.readback import formulas
from pvae.graph.site import OBSERVED, Link, MadeOfData, Moving, Site, embedded
from pvae.guides.posteriors.codes import Estimated, NearestModule
from pvae.nn.dense import MLP, ConvModule, Dense, Gated, Network, NetworkModule
from pvae.nn.schedules import Constant, Schedule, Scheduled
from pvae.pair.pair import Pair

if TYPE_CHECKING:
    from pvae.experiment.experiment import Experiment

Expression = tuple[list[str], str]
"""Statements, and an expression after them."""

ELBOS = {"trace_elbo": "Trace_ELBO", "trace_mean_field_elbo": "TraceMeanField_ELBO"}
USES = {
    "math": "import math",
    "pvae": "import pvae",
    "pyro": "import pyro",
    "dist": "import pyro.distributions as dist",
    "T": "import pyro.distributions.transforms as T",
    "torch": "import torch",
    "poutine": "from pyro import poutine",
    "nn": "from torch import nn",
    "F": "from torch.nn import functional as F",
}
LEFT_OUT = ("clip_norm", "average", "alternate", "patience")
"""Settings of training that a plain loop of SVI does not have."""


class NotPlainError(Exception):
    """A part cannot be written out, and cannot be built without the other side of the pair."""


def pyro_script(experiment: Experiment, x: Shape) -> str:
    """Return a declaration as a Python script for Pyro, for data of event shape `x`.

    Raises:
        DeclarationError: the objective is no ELBO that `pyro.infer.SVI` minimises.
    """
    objective = experiment.objective
    kind = objective.kind  # type: ignore[attr-defined]
    if kind not in ELBOS or objective.free_bits:
        found = f"{kind} with free_bits = {objective.free_bits:g}" if objective.free_bits else kind
        raise DeclarationError(
            f"objective: expected {' or '.join(ELBOS)}, without free bits, for a script that runs pyro.infer.SVI; got "
            f"{found}. Fit this declaration with pvae fit."
        )
    pair = experiment.build(x)
    try:
        return PlainScript(experiment, pair).text()
    except NotPlainError:
        return PairScript(experiment, pair).text()


class Script(ABC):
    """A script in the making: lines of `model` and `guide`, and the imports and parts that they use."""

    def __init__(self, experiment: Experiment, pair: Pair) -> None:
        self.experiment, self.pair = experiment, pair
        self.imports: dict[str, set[str]] = {}
        self.parts: dict[str, str] = {}
        """Modules of the script, each with the expression that makes it."""
        self.numbers: dict[str, Schedule] = {}
        beta = experiment.objective.beta
        value = beta.value if isinstance(beta, Constant) else None
        self.context = "poutine.mask(mask=False)" if value == 0 else "poutine.scale(scale=beta)"
        if value == 1:
            self.context = ""
        elif value != 0:
            self.numbers["beta"] = beta

    # ------------------------------------------------------------------ what the two kinds of script say themselves

    @property
    @abstractmethod
    def batch(self) -> dict[str, str]:
        """Arguments of both programs, each with its expression in the loop."""

    @abstractmethod
    def data(self) -> list[str]:
        """Return the statements that load the data."""

    @abstractmethod
    def model(self) -> Iterator[str]:
        """Yield the statements of the model inside the data plate."""

    @abstractmethod
    def guide(self) -> Iterator[str]:
        """Yield the statements of the guide inside the data plate."""

    @abstractmethod
    def around_step(self) -> tuple[list[str], list[str]]:
        """Return the statements before and after every step of SVI."""

    # ------------------------------------------------------------------ the page

    def text(self) -> str:
        """Return the whole script."""
        data = self.data()
        programs = [*self.program("model", self.model()), "", "", *self.program("guide", self.guide()), "", ""]
        parts = [f"{name} = {code}" for name, code in self.parts.items()]
        body = "\n".join([*data, *self.length(), *parts, "", "", *programs, *self.optimizer(), "", *self.loop()])
        said = formulas(self.experiment)
        title = f"{self.experiment.name}: {self.experiment.description}".removesuffix(": ")
        head = f'"""{title}\n\nmodel  {said["model"]}\nguide  {said["guide"]}\n"""\n'
        uses = [line for name, line in USES.items() if re.search(rf"\b{name}\.", body)]
        names = [f"from {module} import {', '.join(sorted(found))}" for module, found in sorted(self.imports.items())]
        return "\n".join([head, *uses, *names, "", body, ""])

    def program(self, name: str, statements: Iterable[str]) -> list[str]:
        """Return the lines of `model` or `guide`, which register the parts that they use."""
        lines = list(statements) or ["pass"]
        used = [part for part in self.parts if re.search(rf"\b{part}\b", "\n".join(lines))]
        rows = f"len({next(iter(self.batch))})"
        return [
            f"def {name}({', '.join([*self.batch, *(f'{number}=1.0' for number in self.numbers)])}):",
            *(f'    pyro.module("{part}", {part})' for part in used),
            f'    with pyro.plate("data", {rows}), poutine.scale(scale=1 / {rows}):',
            *(f"        {line}" for line in lines),
        ]

    def weighed(self, lines: Iterable[str]) -> Iterator[str]:
        """Yield statements on latents inside the weight of the KL."""
        if self.context:
            yield f"with {self.context}:" + ("  # beta = 0: no KL" if "mask" in self.context else "")
        yield from (f"    {line}" if self.context else line for line in lines)

    def length(self) -> list[str]:
        """Return the statements on the length of training and the seed."""
        train = self.experiment.train
        return [
            f"EPOCHS, BATCH = {train.epochs}, {train.batch_size}",
            "STEPS = -(-len(data.train) // BATCH)  # of an epoch",
            "",
            f"torch.manual_seed({self.experiment.seed})",
        ]

    def optimizer(self) -> Iterator[str]:
        """Yield the statements that make the optimiser and SVI."""
        train = self.experiment.train
        if left := ", ".join(f"{name} = {getattr(train, name)}" for name in LEFT_OUT if getattr(train, name)):
            yield f"# Left out of the declared training: {left}"
        built = type(train.optimizer.build([nn.Parameter(torch.zeros(1))])).__name__
        given = {"lr": train.optimizer.lr, **train.optimizer.model_dump(exclude={"kind"}, exclude_defaults=True)}
        rate = self.at(train.schedule, "step / STEPS")
        if train.warmup:
            rate = f"{rate} * min((step + 1) / ({train.warmup:g} * STEPS), 1)"
        loss, options = ELBOS[self.experiment.objective.kind], {}  # type: ignore[attr-defined]
        layout, particles = self.pair.layout, getattr(self.experiment.objective, "particles", 1)
        if layout.expected or layout.enumerated:
            loss, options = "TraceEnum_ELBO", {"max_plate_nesting": 1}
        elif layout.scored:
            loss = "TraceGraph_ELBO"
        if particles > 1:
            options = {"num_particles": particles, "vectorize_particles": True, "max_plate_nesting": 1}
        self.imports["pyro.infer"] = {"SVI", loss}
        yield f'optimizer = pyro.optim.LambdaLR({{"optimizer": torch.optim.{built}, "optim_args": {literal(given)},'
        yield f'                                "lr_lambda": lambda step: {rate}}})'
        yield f"svi = SVI(model, guide, optimizer, {loss}({', '.join(f'{k}={v}' for k, v in options.items())}))"

    def loop(self) -> Iterator[str]:
        """Yield the loop over epochs and batches."""
        before, after = self.around_step()
        given = ", ".join([*self.batch.values(), *(f"{name}={name}" for name in self.numbers)])
        changed = [f"{name} = {self.at(schedule, 't')}" for name, schedule in self.numbers.items()]
        changed = [line.replace("beta = ", "beta = max(1e-20, ") + ")" if "beta =" in line else line for line in changed]
        told = "t" in " ".join([*before, *changed]).replace("(", " ").replace(",", " ").split()
        moment = ["t = epoch + i / STEPS"] if told else []
        yield 'if __name__ == "__main__":'
        yield "    for epoch in range(EPOCHS):"
        yield "        loss = 0.0"
        yield "        for i, index in enumerate(torch.randperm(len(data.train)).split(BATCH)):"
        step = [f"loss += svi.step({given}) / STEPS", "optimizer.step()"]
        yield from (f"            {line}" for line in [*moment, *changed, *before, *step, *after])
        yield '        print(f"epoch {epoch + 1}: loss {loss:.2f} nats per datum")'

    # ------------------------------------------------------------------ expressions

    def at(self, schedule: Schedule, epoch: str) -> str:
        """Return the value of a schedule at a moment of training, in epochs, as an expression."""
        declared: Any = schedule
        span = getattr(schedule, "epochs", None)
        share = f"min({epoch} / {'EPOCHS' if span is None else f'{span:g}'}, 1)"
        match declared.kind:
            case "constant":
                return f"{declared.value:g}"
            case "linear":
                return between(declared.start, declared.end, share)
            case "cosine":
                return between(declared.end, declared.start, f"(1 + math.cos(math.pi * {share})) / 2")
            case "exponential":
                return f"{declared.start:g} * {declared.end / declared.start!r} ** {share}"
        return f"{self.construct(schedule)}.at({epoch}, EPOCHS)"

    def construct(self, part: Section) -> str:
        """Return the call that makes a declared part, with what differs from its defaults."""
        kind = type(part)
        self.imports.setdefault(kind.__module__, set()).add(kind.__name__)
        tag = part.tag if isinstance(part, Component) else None
        given = [
            f"{name}={self.value(getattr(part, name))}"
            for name, field in kind.model_fields.items()
            if name != tag and getattr(part, name) != field.get_default(call_default_factory=True)
        ]
        return f"{kind.__name__}({', '.join(given)})"

    def value(self, value: Any) -> str:
        """Return a value of a declaration as an expression."""
        if isinstance(value, dict):
            return f"{{{', '.join(f'{quoted(key)}: {self.value(item)}' for key, item in value.items())}}}"
        return self.construct(value) if isinstance(value, Section) else literal(value)


# ---------------------------------------------------------------------- parts written out


@final
class PlainScript(Script):
    """A script whose parts are written out, or built by name."""

    @property
    def batch(self) -> dict[str, str]:
        found = {OBSERVED: "data.train.draw(index)"}
        for name, covariate in self.experiment.covariates.items():
            if covariate.words is not None:
                raise NotPlainError
            found[name] = f"F.one_hot(data.train.y[index].long(), {covariate.codes}).float()"
        return found

    def data(self) -> list[str]:
        seed = f", seed={self.experiment.seed}" if self.experiment.seed else ""
        return [f"data = pvae.data.load({self.construct(self.experiment.data)}{seed})"]

    def around_step(self) -> tuple[list[str], list[str]]:
        return [], []

    def model(self) -> Iterator[str]:
        if self.pair.layout.scored or self.pair.guide.reader is not None:
            raise NotPlainError
        lines = []
        for site in self.experiment.sites():
            before, distribution = self.prior(site)
            lines += [*before, sampled(site.name, distribution, SUMMED if site.summed else "")]
        likelihood = self.likelihood()
        yield from self.weighed(lines)
        yield f'pyro.sample("x", {likelihood}, obs=x)'

    def guide(self) -> Iterator[str]:
        lines: list[str] = []
        for site in self.experiment.guide_sites():
            before, distribution = self.posterior(site, OBSERVED)
            infer = SUMMED if site.name in self.pair.layout.expected else ""
            lines += [*(line for line in before if line not in lines), sampled(site.name, distribution, infer)]
        yield from self.weighed(lines)

    # ------------------------------------------------------------------ parts

    def prior(self, site: Site) -> Expression:
        """Return p(site | parents)."""
        name, declared = f"prior_{site.name}", self.experiment.latents[site.name].prior
        module: Any = self.pair.model.priors[site.name]
        if written := PRIORS.get((declared.kind, site.values)):  # type: ignore[attr-defined]
            return written(self, name, site, declared, module)
        if site.values == "relaxed":  # Pyro's value is a relaxed one-hot, that of pvae its logarithm
            raise NotPlainError
        shapes = {above: self.shape(above) for above in site.given}
        self.build(name, f"{self.construct(declared)}.build({self.site(site)}, {literal(shapes)}, Link())", module)
        return [], f"{name}({named({above: self.seen(above) for above in site.given})})"

    def posterior(self, site: Site, x: str) -> Expression:
        """Return q(site | x, ...), with an expression for x."""
        name, declared = f"posterior_{site.name}", self.experiment.latents[site.name].posterior
        module: Any = self.pair.guide.posteriors[site.name]
        lines, inputs = self.encoded(site, x) if declared.reads_features else ([], {OBSERVED: x})
        if written := POSTERIORS.get((declared.kind, site.values)):  # type: ignore[attr-defined]
            before, distribution = written(self, name, site, declared, module, inputs)
            return [*lines, *before], distribution
        shapes = self.pair.guide.encoder.shapes[site.name] if declared.reads_features else {OBSERVED: self.pair.frame.x}
        self.build(name, f"{self.construct(declared)}.build({self.site(site)}, {literal(shapes)}, Link())", module)
        return lines, f"{name}({named(inputs)}, {{}})"

    def encoded(self, site: Site, x: str) -> tuple[list[str], dict[str, str]]:
        """Return the encoder's statements, and the expressions that the posterior of a latent reads, by name."""
        given = {name: x if name == OBSERVED else self.seen(name) for name in site.guide_given}
        encoder, module = self.experiment.encoder, self.pair.guide.encoder
        grids = [tuple(latent.grid) for latent in self.experiment.latents.values() if latent.grid]
        features = encoder.network.features_on(max(grids, key=prod)) if grids else None
        if encoder.kind == "shared":  # type: ignore[attr-defined]
            call = self.network("encoder", encoder.network, module.network, {OBSERVED: x}, features)
            return [f"h = {call}"], {name: "h" if name == OBSERVED else value for name, value in given.items()}
        if encoder.kind == "per_latent":  # type: ignore[attr-defined]
            own = module.networks[site.name]
            call = self.network(f"encoder_{site.name}", encoder.network, own, given, features)
            return [f"h = {call}"], {"features": "h"}
        raise NotPlainError

    def likelihood(self) -> str:
        """Return p(x | z)."""
        declared, module = self.experiment.decoder.likelihood, self.pair.model.decoder.likelihood
        network = self.pair.model.decoder.network
        given = {name: self.seen(name) for name in self.experiment.decoder_given()}
        h = self.network("decoder", self.experiment.decoder.network, network, given, network.output)
        event = len(self.pair.frame.x)
        kind = declared.kind, getattr(declared, "scale", "")  # type: ignore[attr-defined]
        if kind == ("bernoulli", ""):
            return f"dist.Bernoulli(logits={h}).to_event({event})"
        if kind == ("normal", "fixed"):
            return f"dist.Normal({h}, {declared.value:g}).to_event({event})"  # type: ignore[attr-defined]
        if kind == ("normal", "shared"):
            self.parts["likelihood"] = f'nn.ParameterDict({{"log_scale": torch.tensor({declared.value:g}).log()}})'  # type: ignore[attr-defined]
            floor = declared.floor  # type: ignore[attr-defined]
            return f'dist.Normal({h}, likelihood["log_scale"].exp().clamp(min={floor:g})).to_event({event})'
        self.build("likelihood", f"{self.construct(declared)}.build({literal(self.pair.frame.x)})", module)
        return f"likelihood({h})"

    def network(
        self, name: str, declared: Network, module: NetworkModule, given: Mapping[str, str], output: Shape | None
    ) -> str:
        """Add a network, of plain torch where that is a chain of layers; return its call."""
        if layers := layers_of(module):
            self.parts[name] = chain(layers)
            return f"{name}({next(iter(given.values()))})"
        self.build(name, f"{self.construct(declared)}.build({literal(module.inputs)}, {literal(output)})", module)
        return f"{name}({named(given)})"

    def build(self, name: str, code: str, module: nn.Module) -> None:
        """Add a part of pvae that stands alone.

        Raises:
            NotPlainError: it reads the other side of the pair, or the training data.
        """
        if any(isinstance(part, MadeOfData) or isinstance(vars(part).get("link"), Link) for part in module.modules()):
            raise NotPlainError
        self.parts[name] = code

    # ------------------------------------------------------------------ latents

    def site(self, site: Site) -> str:
        """Return the call that makes what a part knows of a latent."""
        self.imports.setdefault(Site.__module__, set()).update(("Link", "Site"))
        given = [(f.name, getattr(site, f.name), f.default) for f in fields(site)]
        return f"Site({', '.join(f'{name}={literal(value)}' for name, value, usual in given if value != usual)})"

    def shape(self, name: str) -> Shape:
        """Return the event shape of a latent or covariate as other parts see it."""
        known = {**self.pair.frame.shapes, **{site.name: site.features for site in self.experiment.sites()}}
        return known[name]

    def seen(self, name: str) -> str:
        """Return the expression of a latent or covariate as other parts see it."""
        latent = self.experiment.latents.get(name)
        if latent is None or latent.codes is None:
            return name
        if latent.embedding is not None or latent.sampled == "index" and latent.grid:
            raise NotPlainError
        if latent.sampled == "index":
            return f"F.one_hot({name}, {latent.codes}).float()"
        return f"{name}.movedim(-1, {-1 - len(latent.grid)})" if latent.grid else name

    def temperature(self, name: str) -> str:
        """Return the expression of the temperature of a relaxed latent."""
        schedule = self.experiment.latents[name].temperature or Constant(value=2 / 3)
        if isinstance(schedule, Constant):
            return f"torch.tensor({schedule.value!r})"
        self.numbers[f"tau_{name}"] = schedule
        return f"torch.tensor(tau_{name})"


SUMMED = ', infer={"enumerate": "parallel"}'


def sampled(name: str, distribution: str, infer: str = "") -> str:
    """Return the statement that samples a latent."""
    return f'{name} = pyro.sample("{name}", {distribution}{infer})'


def normal(parameters: str, bounds: tuple[float, float]) -> Expression:
    """Return a diagonal normal of parameters `(..., 2 dim)`."""
    low, high = bounds
    scale = f"(log_variance.clamp({low:g}, {high:g}) / 2).exp()"
    return [f"loc, log_variance = {parameters}.chunk(2, -1)"], f"dist.Normal(loc, {scale}).to_event(1)"


def standard_normal(_script: PlainScript, _name: str, site: Site, _declared: Any, _module: Any) -> Expression:
    """Return N(0, I)."""
    return [], f"dist.Normal(torch.zeros({site.event[0]}), 1.0).to_event(1)"


def conditional_normal(script: PlainScript, name: str, site: Site, declared: Any, module: Any) -> Expression:
    """Return N(mu(parents), diag sigma^2(parents))."""
    given = {above: script.seen(above) for above in site.given}
    return normal(script.network(name, declared.network, module.network, given, module.network.output), module.bounds)


def codes(script: PlainScript, name: str, site: Site, declared: Any, module: Any) -> Expression:
    """Return the categorical of a code, or its relaxation, with learned or equal weights."""
    logits = f"torch.zeros{tuple(module.logits.shape)}".replace(",)", ")")
    if declared.kind == "categorical":
        script.parts[name], logits = f'nn.ParameterDict({{"logits": {logits}}})', f'{name}["logits"]'
    if site.values == "relaxed":
        return [], relaxed(script, site, logits)
    if site.grid:
        raise NotPlainError
    return [], f"dist.Categorical(logits={logits})"


def relaxed(script: PlainScript, site: Site, logits: str) -> str:
    """Return Pyro's relaxed one-hot of some logits."""
    event = f".to_event({len(site.grid)})" if site.grid else ""
    return f"dist.RelaxedOneHotCategorical({script.temperature(site.name)}, logits={logits}){event}"


def mixture(script: PlainScript, name: str, site: Site, declared: Any, module: Any) -> Expression:
    """Return a mixture of learned normals."""
    (count, dim), (low, high) = module.loc.shape, declared.log_variance
    zeros = f'"log_variance": torch.zeros({count}, {dim}), "logits": torch.zeros({count})'
    script.parts[name] = f'nn.ParameterDict({{"loc": torch.randn({count}, {dim}), {zeros}}})'
    scale = f'({name}["log_variance"].clamp({low:g}, {high:g}) / 2).exp()'
    lines = [f'components = dist.Normal({name}["loc"], {scale}).to_event(1)']
    return lines, f'dist.MixtureSameFamily(dist.Categorical(logits={name}["logits"]), components)'


def vamp(script: PlainScript, name: str, site: Site, declared: Any, module: Any) -> Expression:
    """Return the mixture of the guide's posteriors at pseudo-inputs."""
    shape = ", ".join(map(str, module.pseudo_inputs.shape))
    script.parts[name] = f'nn.ParameterDict({{"pseudo_inputs": torch.rand({shape})}})'
    read = f'{name}["pseudo_inputs"]' + (".clamp(0, 1)" if module.bounded else "")
    lines, components = script.posterior(site, read)
    if not components.startswith("dist.Normal"):
        raise NotPlainError
    weights = f"dist.Categorical(logits=torch.zeros({len(module.pseudo_inputs)}))"
    return [*lines, f"components = {components}"], f"dist.MixtureSameFamily({weights}, components)"


def flow(script: PlainScript, name: str, site: Site, declared: Any, module: Any) -> Expression:
    """Return N(0, I) pushed through Pyro's own transforms."""
    (dim,), hidden = site.event, list(declared.hidden)
    step = {
        "realnvp": f"affine_coupling({dim}, {hidden})",
        "spline_coupling": f"spline_coupling({dim}, {dim // 2}, {hidden}, {{}})",
    }.get(declared.kind, f"affine_autoregressive({dim}, {hidden})")
    if declared.kind == "spline_coupling":
        step = step.format(f"count_bins={declared.bins}, bound={declared.bound:g}")
    script.imports.setdefault("pvae.models.priors.flows", set()).add("near_identity")
    script.parts[name] = f"nn.ModuleList(near_identity(T.{step}) for _ in range({declared.layers}))"
    lines = [
        f"flip = T.Permute(torch.arange({dim}).flip(0))",
        f"steps = [move for step in {name} for move in (step{'.inv' if declared.inward else ''}, flip)]",
    ]
    return lines, f"dist.TransformedDistribution(dist.Normal(torch.zeros({dim}), 1.0).to_event(1), steps)"


def normal_posterior(
    script: PlainScript, name: str, site: Site, declared: Any, module: Any, inputs: Mapping[str, str]
) -> Expression:
    """Return N(mu(x), diag sigma^2(x))."""
    network = module.network
    return normal(script.network(name, declared.network or LINEAR, network, inputs, network.output), module.bounds)


def point(
    script: PlainScript, name: str, site: Site, declared: Any, module: Any, inputs: Mapping[str, str]
) -> Expression:
    """Return the point of an autoencoder."""
    network = module.network
    call = script.network(name, declared.network or LINEAR, network, inputs, network.output)
    return [], f"dist.Delta({call}, event_dim={len(site.event)})"


def categorical(
    script: PlainScript, name: str, site: Site, declared: Any, module: Any, inputs: Mapping[str, str]
) -> Expression:
    """Return the categorical of a code, or its relaxation; a grid of codes has its values in the last dimension."""
    network = module.network
    if site.values == "index" and site.grid or getattr(declared, "kl", "relaxed") != "relaxed":
        raise NotPlainError
    logits = script.network(name, declared.network or LINEAR, network, inputs, network.output)
    if site.grid:
        logits = f"{logits}.movedim({-1 - len(site.grid)}, -1)"
    return [], relaxed(script, site, logits) if site.values == "relaxed" else f"dist.Categorical(logits={logits})"


LINEAR = MLP(hidden=())
PRIORS: dict[tuple[str, str], Callable[[PlainScript, str, Site, Any, Any], Expression]] = {
    ("standard_normal", "real"): standard_normal,
    ("conditional_normal", "real"): conditional_normal,
    ("mixture", "real"): mixture,
    ("vamp", "real"): vamp,
    ("categorical", "index"): codes,
    ("categorical", "relaxed"): codes,
    ("uniform", "index"): codes,
    ("uniform", "relaxed"): codes,
    ("realnvp", "real"): flow,
    ("spline_coupling", "real"): flow,
    ("maf", "real"): flow,
    ("iaf", "real"): flow,
}
"""Priors that are written out, by kind and values of the latent; any other is built by name."""
POSTERIORS: dict[tuple[str, str], Callable[[PlainScript, str, Site, Any, Any, Mapping[str, str]], Expression]] = {
    ("normal", "real"): normal_posterior,
    ("delta", "real"): point,
    ("categorical", "index"): categorical,
    ("relaxed_onehot", "relaxed"): categorical,
}
"""Posteriors that are written out, likewise."""


# ---------------------------------------------------------------------- parts of a pair


@final
class PairScript(Script):
    """A script whose parts come from the pair that pvae builds; its `model` and `guide` are written out."""

    @property
    def batch(self) -> dict[str, str]:
        return {"rows": "data.train.draw(index)"}

    def data(self) -> list[str]:
        table = self.experiment.model_dump(exclude_none=True, exclude_unset=True)
        toml = tomli_w.dumps({name: part for name, part in table.items() if name not in ("description", "refit")})
        self.parts["pair"] = "experiment.build(data.shape).attend(data.train.data)"
        return [
            f"experiment = pvae.Experiment.from_toml({TRIPLE}\n{toml}{TRIPLE})",
            "data = experiment.conditioned(pvae.data.load(experiment.data, seed=experiment.seed))",
        ]

    def around_step(self) -> tuple[list[str], list[str]]:
        def each(kind: type, call: str) -> list[str]:
            if not any(isinstance(part, kind) for part in self.pair.modules()):
                return []
            self.imports.setdefault(kind.__module__, set()).add(kind.__name__)
            return [
                f"for part in pair.modules():  # {(kind.__doc__ or '').splitlines()[0].rstrip('.')}",
                f"    if isinstance(part, {kind.__name__}):",
                f"        part.{call}",
            ]

        before = [*each(Scheduled, "follow(t, EPOCHS)"), *each(MadeOfData, "start(index)")]
        return before, each(Moving, "after_step()")

    def model(self) -> Iterator[str]:
        yield "x, seen = pair.frame.split(rows)"
        for site in self.pair.model.sites:
            name = quoted(site.name)
            infer = SUMMED if site.summed else ""
            yield from self.latent(site, f"pair.model.prior({name}, seen)", infer)
            yield f"seen[{name}] = pair.model.see({self.known(site)}, {site.name}, x)"
            if site.carries:
                yield self.row(site, f"seen[{name}]")
        yield 'pyro.sample("x", pair.model.decoder(seen), obs=x)'

    def guide(self) -> Iterator[str]:
        guide = self.pair.guide
        yield "x, seen = pair.frame.split(rows)"
        if guide.reader is not None:
            yield "x = pair.guide.reader(x)"
        if guide.encoder is not None:
            yield "features = pair.guide.encoder(x)"
        for site in guide.sites:
            name, posterior = quoted(site.name), f'pair.guide.posteriors["{site.name}"]'
            inputs = named({given: "x" if given == OBSERVED else f"seen[{quoted(given)}]" for given in site.guide_given})
            if guide.encoder is not None and site.name in guide.encoder.shapes:
                inputs = f"pair.guide.encoder.inputs_of({self.known(site)}, features, seen)"
            yield f"inputs = {inputs}"
            yield f"q = {posterior}(inputs, seen)"
            scored = isinstance(guide.posteriors[site.name], Estimated)
            yield from self.latent(site, "q", f", infer={posterior}.infer(inputs)" if scored else "")
            if self.prices_codes(site):
                self.imports.setdefault("pvae.distributions.codes", set()).add("categorical_kl")
                kl = f"categorical_kl(q, pair.model.prior({name}, seen), {site.name})"
                yield from self.weighed([f'pyro.factor("{site.name}/kl", {kl}, has_rsample=True)'])
            yield f"seen[{name}] = pair.model.see({self.known(site)}, {site.name}, x)"
            if isinstance(guide.posteriors[site.name], NearestModule):
                yield f"row = seen[{name}]"
                yield self.row(site, "row.detach() + (q.point - q.point.detach())") + "  # straight through"
                yield f"for penalty, value in {posterior}.penalties(q, row).items():"
                yield f'    pyro.factor(f"{site.name}/{{penalty}}", value, has_rsample=True)'

    def latent(self, site: Site, distribution: str, infer: str) -> Iterator[str]:
        """Yield the statement that samples a latent; without a density where its KL is that of its codes."""
        statement = sampled(site.name, distribution, infer)
        if self.prices_codes(site):
            yield "with poutine.mask(mask=False):  # the KL of the codes is a factor of the guide"
            yield f"    {statement}"
        else:
            yield from self.weighed([statement])

    def prices_codes(self, site: Site) -> bool:
        """True for a relaxed latent whose KL is that of the categoricals."""
        return getattr(self.experiment.latents[site.name].posterior, "kl", None) == "categorical"

    def known(self, site: Site) -> str:
        """Return the expression of what parts know of a latent."""
        return f"pair.model.sites[{self.pair.model.sites.index(site)}]"

    def row(self, site: Site, value: str) -> str:
        """Return the statement that samples the row of a nearest code, a point on both sides."""
        self.imports.setdefault("pvae.distributions.determined", set()).add("Determined")
        point = f"Determined({value}, event_dim={len(site.features)})"
        return f'seen[{quoted(site.name)}] = pyro.sample("{embedded(site.name)}", {point})'


TRIPLE = "'''"

# ---------------------------------------------------------------------- expressions


def between(start: float, end: float, share: str) -> str:
    """Return a value on the way from start to end as an expression."""
    if (start, end) == (0, 1):
        return share
    return f"{start:g} + {end - start!r} * {share}"


def quoted(text: str) -> str:
    """Return a string as Python writes it in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def literal(value: Any) -> str:
    """Return plain data as a Python expression, strings in double quotes."""
    if isinstance(value, dict):
        return named({key: literal(item) for key, item in value.items()})
    if isinstance(value, tuple | list):
        inner = ", ".join(map(literal, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    return quoted(value) if isinstance(value, str) else repr(value)


def named(values: Mapping[str, str]) -> str:
    """Return a dictionary of expressions."""
    return f"{{{', '.join(f'{quoted(name)}: {value}' for name, value in values.items())}}}"


def layers_of(module: NetworkModule) -> list[str]:
    """Return the layers of a network that is a plain chain of them, from its one input to its output; else none."""
    if not isinstance(module, Dense | ConvModule) or len(module.inputs) != 1:
        return []
    ((name, shape),) = module.inputs.items()
    flat = [f"nn.Flatten({-len(shape)})"] if len(shape) > 1 else []
    unflat = [f"nn.Unflatten(-1, {module.output})"] if len(module.output) > 1 else []
    if isinstance(module, Dense):
        return [*flat, *leaves([*(module.branches or []), *module.trunk, module.head]), *unflat]
    if name not in module.encoders or len(module.output) > 1:
        return []
    return [*leaves([module.encoders[name].layers]), "nn.Flatten(-3)", *leaves([module.dense, module.head])]


def leaves(modules: Iterable[nn.Module]) -> Iterator[str]:
    """Yield the layers inside some modules, in order."""
    for module in modules:
        if isinstance(module, Gated):
            yield from (*leaves([module.both]), "nn.GLU()")
        elif isinstance(module, nn.Sequential):
            yield from leaves(module)
        elif isinstance(module, nn.Linear):
            yield f"nn.Linear({module.in_features}, {module.out_features})"
        elif not isinstance(module, nn.Identity):
            yield f"nn.{module!r}"


def chain(layers: Sequence[str]) -> str:
    """Return the expression of a chain of layers, an activation on the line of its layer."""
    if len(layers) == 1:
        return layers[0]
    lines: list[str] = []
    for layer in layers:
        follows = lines and "(" in lines[-1] and layer.endswith("()")
        lines = [*lines[:-1], f"{lines[-1]}, {layer}"] if follows else [*lines, layer]
    return "nn.Sequential(\n" + "".join(f"    {line},\n" for line in lines) + ")"
