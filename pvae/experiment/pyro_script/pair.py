"""Scripts whose components come from the pair that pvae builds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, final

import tomli_w
from torch import nn

from pvae.component import Section
from pvae.distributions.base import Determined
from pvae.distributions.relaxed import categorical_kl
from pvae.experiment.pyro_script.page import SUMMED, TIME, Script, named, quoted, sampled
from pvae.graph.lifecycle import Begun, MadeOfData, Moving
from pvae.graph.site import OBSERVED, Site, embedded
from pvae.guides.posteriors.codes import Estimated
from pvae.guides.posteriors.nearest import NearestModule
from pvae.nn.schedules import Scheduled


@final
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
        begun = f"\nbegin(pair, data.train, BATCH, {self.experiment.seed})" if self.has(Begun) else ""
        if begun:
            self.imports["pvae.training.begin"] = {"begin"}
        self.parts["pair"] = f"experiment.build(data.shape).attend(data.train.data){begun}"
        return [
            f"experiment = pvae.Experiment.from_toml('''\n{toml}''')",
            "data = experiment.conditioned(pvae.data.load(experiment.data, seed=experiment.seed))",
        ]

    def around_step(self) -> tuple[list[str], list[str]]:
        follow, start = self.each(Scheduled, f"follow({TIME}, EPOCHS)"), self.each(MadeOfData, "start(index)")
        return [*follow, *start], self.each(Moving, "after_step()")

    def each(self, kind: type, call: str) -> list[str]:
        """Return the loop that makes a call on every module of class `kind` in the pair; no lines if there is none."""
        if not self.has(kind):
            return []
        test = f"isinstance(part, {self.imported(kind)})"
        return [f"for part in filter(lambda part: {test}, pair.modules()):", f"    part.{call}"]

    def has(self, kind: type) -> bool:
        """Return True if the pair has a module of class `kind`."""
        return any(isinstance(part, kind) for part in self.pair.modules())

    def model(self) -> Iterator[str]:
        yield "x, seen = pair.frame.split(rows)"
        for site in self.modeller.sites:
            name = quoted(site.name)
            infer = SUMMED if site.summed else ""
            yield from self.latent(site, f"pair.model.prior({name}, seen)", infer)
            yield f"seen[{name}] = pair.model.see({self.known(site)}, {site.name}, x)"
            if site.carries:
                yield self.row(site, f"seen[{name}]")
        yield 'pyro.sample("x", pair.model.decoder(seen), obs=x)'

    def guide(self) -> Iterator[str]:
        guide = self.guider
        yield "x, seen = pair.frame.split(rows)"
        if guide.reader is not None:
            yield "x = pair.guide.reader(x)"
        if guide.encoder is not None:
            yield "features = pair.guide.encoder(x)"
        for site in guide.sites:
            name, posterior = quoted(site.name), f'pair.guide.posteriors["{site.name}"]'
            inputs = named(
                {given: "x" if given == OBSERVED else f"seen[{quoted(given)}]" for given in site.guide_given}
            )
            if guide.encoder is not None and site.name in guide.encoder.shapes:
                inputs = f"pair.guide.encoder.inputs_of({self.known(site)}, features, seen)"
            yield f"inputs = {inputs}"
            yield f"q = {posterior}(inputs, seen)"
            yield from self.latent(site, "q", self.estimator(guide.posteriors[site.name], f"{posterior}.infer(inputs)"))
            if self.prices_codes(site):
                kl = f"{self.imported(categorical_kl)}(q, pair.model.prior({name}, seen), {site.name})"
                yield from self.weighed([f'pyro.factor("{site.name}/kl", {kl}, has_rsample=True)'])
            yield f"seen[{name}] = pair.model.see({self.known(site)}, {site.name}, x)"
            if isinstance(guide.posteriors[site.name], NearestModule):
                yield f"row = seen[{name}]"
                yield "through = row.detach() + (q.point - q.point.detach())  # the gradient of the point"
                yield self.row(site, "through")
                yield f"for penalty, value in {posterior}.penalties(q, row).items():"
                yield f'    pyro.factor(f"{site.name}/{{penalty}}", value, has_rsample=True)'

    def estimator(self, posterior: nn.Module, told: str) -> str:
        """Return the `infer` argument of a sample site that selects its gradient estimator.

        A moving-average baseline is left to Pyro's own.
        """
        if not isinstance(posterior, Estimated):
            return ""
        if posterior.average is None:
            return f"infer={told}"
        decay = f'"use_decaying_avg_baseline": True, "baseline_beta": {posterior.average.decay:g}'
        return f'infer={{"baseline": {{{decay}}}}}'

    def latent(self, site: Site, distribution: str, infer: str) -> Iterator[str]:
        """Yield the statements that sample a latent.

        Its log density is masked if the KL is that of the categoricals.
        """
        statement = sampled(site.name, distribution, infer)
        if self.prices_codes(site):
            yield "with poutine.mask(mask=False):  # the KL of the codes is a factor of the guide"
            yield f"    {statement}"
        else:
            yield from self.weighed([statement])

    def prices_codes(self, site: Site) -> bool:
        """Return True for a relaxed latent whose KL is that of the categoricals with the same logits."""
        return getattr(self.experiment.latents[site.name].posterior, "kl", None) == "categorical"

    def known(self, site: Site) -> str:
        """Return the expression of the `Site` of a latent in the script's pair."""
        return f"pair.model.sites[{self.modeller.sites.index(site)}]"

    def row(self, site: Site, value: str) -> str:
        """Return the statement that samples the codebook row of a nearest code, a point mass in model and guide."""
        point = f"{self.imported(Determined)}({value}, event_dim={len(site.features)})"
        return f'seen[{quoted(site.name)}] = pyro.sample("{embedded(site.name)}", {point})'


def sections_of(value: Any) -> Iterator[Section]:
    """Yield every table (`Section`) inside a declaration, an outer one before those in it."""
    if isinstance(value, Section):
        yield value
        value = dict(value)
    if isinstance(value, Mapping | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from sections_of(item)
