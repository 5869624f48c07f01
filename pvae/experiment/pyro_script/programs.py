"""The Pyro script of a declaration: its components written out or constructed one by one, or all from pvae's pair."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from math import prod
from typing import Any

import tomli_w
from torch import nn

from pvae.component import Section, Shape
from pvae.distributions.base import Determined
from pvae.distributions.relaxed import categorical_kl
from pvae.errors import DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.experiment.pyro_script import page, parts
from pvae.experiment.pyro_script.page import Script, literal, named, quoted, sampled
from pvae.graph.lifecycle import Begun, MadeOfData, Moving
from pvae.graph.site import OBSERVED, Link, Site, embedded
from pvae.guides.posteriors.codes import Estimated
from pvae.nn.network import Network, NetworkModule
from pvae.nn.schedules import Constant, Scheduled


def pyro_script(experiment: Experiment, x: Shape) -> str:
    """Return the source of a Python script that fits a declaration in Pyro, for data of event shape `x`.

    Raises:
        DeclarationError: the objective is not an ELBO that `pyro.infer.SVI` can minimise, or the values of a latent are
            known in some rows.
    """
    objective: Any = experiment.objective
    observed = sorted(experiment.observed_latents())
    if objective.kind not in page.ELBOS or objective.free_bits or objective.gradient != "reparameterised" or observed:
        found = {"elbos": page.ELBOS, "objective": objective, "observed": observed}
        raise DeclarationError.of("experiment.pyro_script.objective", **found)
    pair = experiment.build(x)
    try:
        return PlainScript(experiment, pair).text()
    except parts.NotPlainError:
        return PairScript(experiment, pair).text()


class PlainScript(Script):
    """Script whose components are each written out in torch and Pyro, or constructed from their pvae classes."""

    @property
    def batch(self) -> dict[str, str]:
        found = {OBSERVED: "data.train.draw(index)"}
        for name, covariate in self.experiment.covariates.items():
            if covariate.words is not None or covariate.of is not None or covariate.ordinal:
                raise parts.NotPlainError
            found[name] = f"F.one_hot(data.train.y[index].long(), {covariate.codes}).float()"
        return found

    def data(self) -> list[str]:
        seed = f", seed={self.experiment.seed}" if self.experiment.seed else ""
        self.imports["pvae.data"] = {"load"}
        return [f"data = load({self.construct(self.experiment.data)}{seed})"]

    def statements(self) -> dict[str, list[str]]:
        if self.pair.layout.scored or self.guider.reader is not None or self.modeller.decoder.conditions:
            raise parts.NotPlainError
        model: list[str] = []
        for site in self.experiment.sites():
            before, distribution = self.prior(site)
            model += [*before, sampled(site.name, distribution, page.SUMMED if site.summed else "")]
        observed = f'pyro.sample("x", {self.likelihood()}, obs=x)'
        guide: list[str] = []
        for site in self.experiment.guide_sites():
            before, distribution = self.posterior(site, OBSERVED)
            infer = page.SUMMED if site.name in self.pair.layout.expected else ""
            guide += [*(line for line in before if line not in guide), sampled(site.name, distribution, infer)]
        return {"model": [*self.weighed(model), observed], "guide": [*self.weighed(guide)], "before": [], "after": []}

    # ------------------------------------------------------------------ parts

    def prior(self, site: Site) -> parts.Expression:
        """Return statements and expression of the prior p(site | parents)."""
        declared = self.experiment.latents[site.name].prior
        given = {above: self.seen(above) for above in site.given}
        part = parts.Part(self, f"prior_{site.name}", site, declared, self.modeller.priors[site.name], given)
        shapes = {**self.pair.frame.shapes, **{latent.name: latent.features for latent in self.experiment.sites()}}
        return self.written(part, page.RULES.priors, {above: shapes[above] for above in site.given}, part.name + "({})")

    def posterior(self, site: Site, x: str) -> parts.Expression:
        """Return statements and expression of the posterior q(site | x, ...), where `x` is an expression."""
        declared = self.experiment.latents[site.name].posterior
        shapes: Mapping[str, Shape] = {OBSERVED: self.pair.frame.x}
        lines, inputs = self.encoded(site, x) if declared.reads_features else ([], {OBSERVED: x})
        if declared.reads_features:
            shapes = self.guider.encoder.shapes[site.name]
        part = parts.Part(self, f"posterior_{site.name}", site, declared, self.guider.posteriors[site.name], inputs)
        before, distribution = self.written(part, page.RULES.posteriors, shapes, part.name + "({}, {{}})")
        return [*lines, *before], distribution

    def written(self, part: parts.Part, rules: Any, shapes: Mapping[str, Shape], call: str) -> parts.Expression:
        """Return a prior or posterior as statements and expression: by its rule, else as a call of its pvae module."""
        if rule := rules.get((part.declared.kind, part.site.space.values)):
            return part.written(rule)
        if part.site.space.values == "relaxed":  # Pyro's value is a relaxed one-hot, that of pvae its logarithm
            raise parts.NotPlainError
        call_of = f"{self.construct(part.declared)}.build"
        code = f"{call_of}({self.instance(part.site)}, {literal(dict(shapes))}, {self.imported(Link)}())"
        self.build(part.name, code, part.module)
        return [], call.format(named(part.inputs))

    def encoded(self, site: Site, x: str) -> tuple[list[str], dict[str, str]]:
        """Return the statements of the encoder, and the expressions of the inputs of a latent's posterior, by name."""
        given = {name: x if name == OBSERVED else self.seen(name) for name in site.guide_given}
        encoder, module = self.experiment.encoder, self.guider.encoder
        grids = [tuple(latent.grid) for latent in self.experiment.latents.values() if latent.grid]
        features = encoder.network.features_on(max(grids, key=prod)) if grids else None
        if encoder.kind == "shared":
            call = self.network("encoder", encoder.network, module.network, {OBSERVED: x}, features)
            alone = len(self.guider.sites) == 1
            read = {**given, OBSERVED: call if alone else "h"} if OBSERVED in given else given
            return [] if alone else [f"h = {call}"], read
        if encoder.kind == "per_latent":
            call = self.network(f"encoder_{site.name}", encoder.network, module.networks[site.name], given, features)
            return [], {"features": call}
        raise parts.NotPlainError

    def likelihood(self) -> str:
        """Return the expression of the likelihood p(x | z)."""
        declared: Any = self.experiment.decoder.likelihood
        module, x = self.modeller.decoder, self.pair.frame.x
        given = {name: self.seen(name) for name in self.experiment.decoder_given()}
        h = self.network("decoder", self.experiment.decoder.network, module.network, given, module.network.output)
        if rule := page.RULES.likelihoods.get((declared.kind, getattr(declared, "scale", ""))):
            return f"{rule(h, declared, self)}.to_event({len(x)})"
        self.build("likelihood", f"{self.construct(declared)}.build({literal(x)})", module.likelihood)
        return f"likelihood({h})"

    def network(
        self, name: str, declared: Network, module: NetworkModule, given: Mapping[str, str], output: Shape | None
    ) -> str:
        """Add a network to the script, as plain torch layers if it is a sequence of them.

        Return its call on `given`.
        """
        if layers := parts.layers_of(module):
            self.parts[name] = parts.chain(layers)
            return f"{name}({next(iter(given.values()))})"
        self.build(name, f"{self.construct(declared)}.build({literal(module.inputs)}, {literal(output)})", module)
        return f"{name}({named(given)})"

    def parameters(self, part: str, /, **made: str) -> dict[str, str]:
        """Add learned tensors to the script, each with the expression of its first value; return their names."""
        self.parts[part] = f"nn.ParameterDict({named(made)})"
        return {key: f'{part}["{key}"]' for key in made}

    def build(self, name: str, code: str, module: nn.Module) -> None:
        """Add a pvae module to the script, given the expression that constructs it.

        Raises:
            NotPlainError: the module needs other components of the pair, or the training data.
        """
        if any(isinstance(part, MadeOfData) or isinstance(vars(part).get("link"), Link) for part in module.modules()):
            raise parts.NotPlainError
        self.parts[name] = code

    # ------------------------------------------------------------------ latents

    def instance(self, value: Any) -> str:
        """Return the constructor call of a dataclass, without arguments at their defaults; a literal for other data."""
        if not is_dataclass(value):
            return literal(value)
        given = {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != f.default}
        return f"{self.imported(type(value))}({', '.join(f'{k}={self.instance(v)}' for k, v in given.items())})"

    def seen(self, name: str) -> str:
        """Return the expression of the features of a latent or covariate that networks read (one-hots of codes)."""
        if (latent := self.experiment.latents.get(name)) is None or latent.codes is None:
            return name
        if latent.sampled.embedding is not None or latent.sampled.values == "index" and latent.grid:
            raise parts.NotPlainError
        if latent.sampled.values == "index":
            return f"F.one_hot({name}, {latent.codes}).float()"
        return f"{name}.movedim(-1, {-1 - len(latent.grid)})" if latent.grid else name

    def temperature(self, name: str) -> str:
        """Return the expression of the temperature of a relaxed latent."""
        if isinstance(schedule := self.experiment.latents[name].temperature or Constant(value=2 / 3), Constant):
            return f"torch.tensor({schedule.value!r})"
        self.numbers[f"tau_{name}"] = schedule
        return f"torch.tensor(tau_{name})"


class PairScript(Script):
    """Script whose modules come from the pair that pvae builds; its `model` and `guide` are written out."""

    @property
    def batch(self) -> dict[str, str]:
        return {"rows": "data.train.draw(index)"}

    def data(self) -> list[str]:
        table = self.experiment.model_dump(exclude_none=True, exclude_unset=True)
        toml = tomli_w.dumps({name: part for name, part in table.items() if name not in ("description", "refit")})
        for part in sections_of(self.experiment):  # a plugin registers its kinds when it is imported
            if not type(part).__module__.startswith("pvae."):
                self.imported(type(part))
        if begun := f"\nbegin(pair, data.train, BATCH, {self.experiment.seed})" if self.has(Begun) else "":
            self.imports["pvae.training.begin"] = {"begin"}
        self.parts["pair"] = f"experiment.build(data.shape).attend(data.train.data){begun}"
        loaded = "data = experiment.conditioned(pvae.data.load(experiment.source, seed=experiment.seed))"
        return [f"experiment = pvae.Experiment.from_toml('''\n{toml}''')", loaded]

    def has(self, kind: type) -> bool:
        """Return True if the pair has a module of class `kind`."""
        return any(isinstance(part, kind) for part in self.pair.modules())

    def statements(self) -> dict[str, list[str]]:
        read: tuple[Any, ...] = (Determined, MadeOfData, Moving, Scheduled, categorical_kl, embedded, named, sampled)
        given = {"script": self, "imported": self.imported, "SUMMED": page.SUMMED, "TIME": page.TIME}
        given |= {part.__name__: part for part in read}
        made: Any = page.PAGE.get_template("pair.py.j2").make_module(given)
        return {part: list(filter(None, getattr(made, part)().splitlines())) for part in page.WRITTEN}

    def given(self, site: Site) -> dict[str, str]:
        """Return the expressions of the variables that the posterior of a latent is conditioned on, by name."""
        return {name: "x" if name == OBSERVED else f"seen[{quoted(name)}]" for name in site.guide_given}

    def estimator(self, site: Site, posterior: str) -> str:
        """Return the `infer` argument of a sample site that selects its gradient estimator.

        A moving-average baseline is left to Pyro's own.
        """
        if not isinstance(module := self.guider.posteriors[site.name], Estimated):
            return ""
        if module.average is None:
            return f"infer={posterior}.infer(inputs)"
        decay = f'"use_decaying_avg_baseline": True, "baseline_beta": {module.average.decay:g}'
        return f'infer={{"baseline": {{{decay}}}}}'

    def prices_codes(self, site: Site) -> bool:
        """Return True for a relaxed latent whose KL is that of the categoricals with the same logits."""
        return getattr(self.experiment.latents[site.name].posterior, "kl", None) == "categorical"


def sections_of(value: Any) -> Iterator[Section]:
    """Yield every table (`Section`) inside a declaration, an outer one before those in it."""
    if isinstance(value, Section):
        yield value
        value = dict(value)
    if isinstance(value, Mapping | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from sections_of(item)
