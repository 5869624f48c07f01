"""Class `Experiment`, the whole declaration of a model, its data and its fit; the Pyro pair that it builds."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from pydantic import Field, ValidationError, field_validator, model_validator

from pvae.component import Section, Shape, Table, load_members, problem
from pvae.data.dataset import Dataset, load
from pvae.data.rows.rows import labels_may_be_missing
from pvae.data.sources import base, collections
from pvae.data.split import Split, chosen_labels
from pvae.errors import DataError, DeclarationError, at, is_refused_draw, misdeclared, text
from pvae.experiment import captions, zoo
from pvae.experiment.plan import Covariate, Latent, Plan, Train, apply_overrides, side_columns
from pvae.experiment.rules import findings
from pvae.graph.frame import Entry, Frame
from pvae.graph.site import OBSERVED, Link, Site, topological
from pvae.guides.graph import Encoder, GraphGuide, SharedEncoder
from pvae.models.graph import Decoder, GraphModel
from pvae.models.likelihoods.counts import LIBRARY
from pvae.models.priors.base import Prior, prior_of
from pvae.nn.schedules import Constant, Scheduled
from pvae.objectives.base import weigh_step
from pvae.objectives.elbo import TraceELBO
from pvae.pair.pair import Pair
from pvae.util import toml
from pvae.util.memory import weighed

D = TypeVar("D", Dataset, Split)

NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
RESERVED = {OBSERVED, "data", "chain", "draw"}
for _package in ("pvae.models", "pvae.guides", "pvae.nn", "pvae.objectives"):
    load_members(_package)


class Refit(Section):
    """A second stage (table `refit`): new priors, fitted to the aggregated posterior with everything else frozen."""

    priors: dict[str, Prior] = Field(min_length=1)
    """New priors by latent, for the latents that get one."""
    train: Table[Train] = Train()
    """Settings of the fit of the new priors, by maximum likelihood of samples from the frozen guide."""


class Experiment(Plan):
    """A declared experiment: data, latents, encoder, decoder, objective, training.

    The latents form a graph: `given` names the parents of a latent in the model, `posterior.given` those in the guide.
    `build` makes the Pyro pair of model p(x, z) and guide q(z | x); `pvae.fit` fits it. A declaration is immutable;
    `with_overrides` returns a changed copy.

    Raises:
        pydantic.ValidationError: a keyword is wrong. `from_dict`, `from_toml` and `load` raise DeclarationError, which
            names every problem by its path.

    Example:
        >>> e = Experiment(latents={"z": {"dim": 2}})
        >>> Experiment.from_toml(e.to_toml()) == e
        True
        >>> pair = e.with_overrides("latents.z.prior.kind=vamp").build((1, 8, 8))
        >>> pair.layout.latents
        ('z',)
        >>> Experiment.from_toml("latents.z.dimm = 2")
        Traceback (most recent call last):
            ...
        pvae.errors.DeclarationError: toml: latents.z.dimm: expected one of ... (did you mean 'dim'?).
    """

    data: base.Data = collections.Digits()
    covariates: dict[str, Table[Covariate]] = {}
    """Values beside x of every datum, under names that `given` may list beside latents, in the order of a row."""
    latents: dict[str, Table[Latent]] = Field(min_length=1)
    encoder: Encoder = SharedEncoder()
    decoder: Table[Decoder] = Decoder()
    refit: Table[Refit] | None = None
    """Second stage, fitted in a run of its own after the first; none unless set."""

    @field_validator("latents", "covariates")
    @classmethod
    def _legal_names(cls, named: dict[str, Any]) -> dict[str, Any]:
        for name in named:
            if not NAME.fullmatch(name) or name in RESERVED or hasattr(torch.nn.ModuleDict, name):
                raise ValueError(text("experiment.experiment.names", reserved=sorted(RESERVED), name=name[:60]))
        return named

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if wrong := [problem("graph", tuple(path.split(".")), text, found) for path, text, found in findings(self)]:
            raise ValidationError.from_exception_data("Experiment", wrong)
        return self

    # ------------------------------------------------------------------ in and out

    @classmethod
    def load(cls, name_or_file: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Return the declaration of a zoo name or a TOML file, with dotted overrides such as `train.epochs=20`.

        Raises:
            DeclarationError: every problem of the file and the overrides, each with its path.
        """
        path = zoo.find(str(name_or_file))
        raw = toml.read(path)
        apply_overrides(raw, toml.parse_overrides(overrides), cls)
        raw.setdefault("name", path.stem)
        return cls.from_dict(raw, origin=str(name_or_file))

    @classmethod
    def of_run(cls, text: str, origin: str = "spec.toml") -> Self:
        """Return the declaration that a run keeps as TOML; fields that its version lacked mean what they did then."""
        raw = toml.parse(text, origin)
        likelihood = raw.get("decoder", {}).get("likelihood", {})
        if likelihood.get("kind") in ("poisson", "negative_binomial"):
            likelihood.setdefault("reads", "raw")
        return cls.from_dict(raw, origin)

    @classmethod
    def schema_json(cls) -> str:  # type: ignore[override]
        """Return the JSON Schema of declarations, for editors: a family is `oneOf` its kinds, each kind a `const`."""
        schema = cls.model_json_schema()
        schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
        return json.dumps(schema, indent=2)

    # ------------------------------------------------------------------ graph and pair

    def sites(self) -> tuple[Site, ...]:
        """Return the latents as nodes of the model's graph, parents first."""
        order = topological({name: latent.given for name, latent in self.latents.items()}, "latents")
        return tuple(self.latents[name].site(name) for name in order)

    def guide_sites(self) -> tuple[Site, ...]:
        """Return the latents that the guide samples as nodes of the guide's graph, parents first."""
        by_name = {site.name: site for site in self.sites() if not site.summed}
        order = topological({name: site.guide_given for name, site in by_name.items()}, "posteriors")
        return tuple(by_name[name] for name in order)

    def decoder_given(self) -> tuple[str, ...]:
        """Return the names that the decoder reads: those declared, else the latents that are no parents of others."""
        if self.decoder.given is not None:
            return self.decoder.given
        parents = {parent for latent in self.latents.values() for parent in latent.given}
        return tuple(name for name in self.latents if name not in parents)

    def observed(self) -> Decoder:
        """Return the decoder for the declared data.

        For tabular data its likelihood has a distribution for each column; others take missing elements, if declared.
        """
        return self.decoder.over([column.law(name) for name, column in self.data.table.items()], self.data.masked)

    def second_stage(self) -> Self:
        """Return the experiment that `refit` declares: this one with the new priors and the ELBO as its objective.

        The gradient of the ELBO with respect to a prior is that of the prior's mean log density under q_agg. Batches
        have the shards of the first stage.
        """
        assert self.refit is not None  # noqa: S101 - the caller has asked
        table = self.model_dump(exclude_none=True, exclude_unset=True)
        for name, prior in self.refit.priors.items():
            table["latents"].setdefault(name, {})["prior"] = prior
        del table["refit"]
        train = self.refit.train.model_copy(update={"shards": self.train.shards})
        changes = {"name": f"{self.name}_refit", "objective": TraceELBO(), "train": train}
        return type(self).from_dict({**table, **changes})

    def refitted(self, stage: Self) -> list[str]:
        """Return the names of the latents whose priors a second stage replaces.

        Raises:
            DeclarationError: no prior is replaced, or a posterior depends on the prior that is replaced.
        """
        names = [name for name, z in stage.latents.items() if z.prior != self.latents[name].prior]
        misdeclared(not names, "experiment.experiment.same_prior", name=next(iter(stage.latents)))
        moved = [name for name in names if stage.latents[name].posterior.follows_prior(stage.latents[name].given)]
        misdeclared(moved, "experiment.experiment.moved", names=moved, latents=stage.latents)
        return names

    def conditioned(self, data: D) -> D:
        """Return data as the pair takes them: with a covariate, every row ends with its label or prompt tokens."""
        side = data.transforms.side if isinstance(data, Dataset) and data.transforms is not None else None
        there: Mapping[str, Any] = {} if side is None else side.columns
        for name, column in side_columns(self.covariates).items():
            if (found := there.get(name, column).words) != column.words:
                raise DataError(f"{name}: expected data with the levels {column.words}; got {found}.")
        return data.conditioned(self.entries())

    @property
    def source(self) -> base.Data:
        """Declared data, read with the values beside x of which covariates and seen latents are made."""
        return self.data.with_side(side_columns(self.covariates, self.latents))

    def load_data(self, data_dir: Path | None = None) -> Dataset:
        """Return the declared data set as its source gives it, before `conditioned`; raises DataError."""
        with reading(self):
            return load(self.source, data_dir=data_dir, seed=self.seed)

    def entries(self) -> dict[str, Entry]:
        """Return the entries of a row behind its datum, by name: covariates, then latents that some rows observe.

        The sum of x is the first of them where the likelihood is given it.
        """
        owners, found = self.decoder.likelihood.conditions, self.observed_latents()
        summed = {LIBRARY: Entry(source="sum", size=True)} if LIBRARY in owners else {}
        return summed | {name: c.entry(is_owner=name in owners) for name, c in self.covariates.items()} | found

    def observed_latents(self) -> dict[str, Entry]:
        """Return the entries of the latents whose values some rows have, by name."""
        return {name: entry for name, latent in self.latents.items() if (entry := latent.entry()) is not None}

    def known(self, split: Split) -> dict[str, torch.Tensor]:
        """Return the values of observed latents in the rows of a split by name, `(n, width)`, NaN where unknown.

        Rows as `conditioned` returns them hide these values, so that analyses infer the latents from x; a fit shows
        them to the guide. Of the training rows they are those that it sees: `data.labelled` hides the others.

        Raises:
            DataError: a code is none of the latent's, or the data lack the value that a latent is declared to be.
        """
        entries = self.observed_latents()
        found = {name: split.values(self.latents[name].observed or "", e) for name, e in entries.items()}
        if found and split.name == "train" and self.data.labelled is not None:
            codes = torch.cat([v if entries[name].codes else 0 * v for name, v in found.items()], 1)
            kept = chosen_labels(codes, self.data.labelled, self.data.label_seed or 0)[:, None]
            return {name: value.masked_fill(~kept.to(value.device), torch.nan) for name, value in found.items()}
        return found

    def frame(self, x: Shape) -> Frame:
        """Return the layout of a row (the datum, then its entries), for data of event shape `x`."""
        return Frame(tuple(x), self.entries())

    def build(self, x: Shape, rows: int = 0, device: torch.device | None = None) -> Pair:
        """Return the Pyro pair of model and guide for data of event shape `x`.

        Its weights are a function of `seed`; the global random state stays unchanged.

        Arguments:
            x: event shape of a datum.
            rows: number of rows of a batch, 0 if the pair is not going to be trained.
            device: device of the training.

        Raises:
            DeclarationError: the pair, or a training step of it, would not fit into memory; nothing large has been
                allocated.
        """
        with torch.random.fork_rng():
            pair = build_pair(self, self.frame(x), rows, device)
        return pair if self.objective.dtype is None else pair.to(self.objective.dtype)

    def to_pyro(self, x: Shape | None = None) -> str:
        """Return the declaration as a plain Pyro script: networks, `model`, `guide`, and a loop of `SVI`.

        Arguments:
            x: event shape of a datum; by default the declared data are loaded for it.

        Raises:
            DeclarationError: the objective is no ELBO that `pyro.infer.SVI` can minimise (em, gan, iwae, free bits).

        Example:
            >>> script = Experiment.load("vae").to_pyro((1, 8, 8))
            >>> "SVI(model, guide, optimizer, Trace_ELBO())" in script
            True
        """
        from pvae.experiment.pyro_script.programs import pyro_script

        return pyro_script(self, self.load_data().shape if x is None else x)

    def _repr_html_(self) -> str:
        from pvae.experiment.readback import formulas

        return text("experiment.readback.html", experiment=self, formulas=formulas(self))


def reading(plan: Plan) -> AbstractContextManager[None]:
    """Return the context in which the data of a declaration are read: labels that a latent observes may be missing."""
    return labels_may_be_missing(isinstance(plan, Experiment) and bool(plan.observed_latents()))


def build_pair(experiment: Experiment, frame: Frame, rows: int = 0, device: torch.device | None = None) -> Pair:
    """Return the pair of model and guide of a declaration, ready to run, and to be trained in batches of `rows` rows.

    Its weights are initialised after `torch.manual_seed(experiment.seed)`.

    Raises:
        DeclarationError: it would not fit into memory, or a distribution is not finite before training.
    """

    def make() -> Pair:
        link = linked_parts(experiment, frame)
        link.building = True
        pair = Pair(link.model, link.guide).adopt(frame.blank(2))
        experiment.objective.attach(pair)
        link.building = False
        return pair

    def step(pair: Pair) -> None:
        weigh_step(experiment.objective, pair, frame.row, rows)

    try:
        return weighed(make, step if rows else None, rows * getattr(experiment.objective, "particles", 1), device)
    except (RuntimeError, ValueError) as error:
        if not is_refused_draw(error):
            raise
        raise DeclarationError.of("experiment.experiment.not_finite", found=str(error).splitlines()[0][:200]) from error


def linked_parts(experiment: Experiment, frame: Frame) -> Link:
    """Return model and guide of a declaration, before their first run; their weights are a function of its seed."""
    torch.manual_seed(experiment.seed)
    link, latents, declared = Link(), experiment.latents, experiment.observed()
    sites, guide_sites = experiment.sites(), experiment.guide_sites()
    link.frame, link.support, link.scored = frame, declared.support, captions.scored(experiment)
    known = {OBSERVED: frame.x, **frame.shapes, **{site.name: site.features for site in sites}}
    priors = {}
    for site in sites:
        with at(f"latents.{site.name}.prior"):
            above = {name: known[name] for name in site.given}
            priors[site.name] = prior_of(latents[site.name].prior, site, above, link)
    with at("decoder"):
        decoder = declared.build(known, experiment.decoder_given(), frame.x)
    codebooks = {}
    for site in sites:
        if site.space.embedding is not None:
            codebooks[site.name] = latents[site.name].posterior.codebook(site.space)
    relaxed = [site.name for site in sites if site.space.values == "relaxed"]
    temperatures = {name: Scheduled(latents[name].temperature or Constant(value=2 / 3)) for name in relaxed}
    link.model = GraphModel(sites, priors, decoder, frame, codebooks, temperatures)
    reader = declared.reader(frame.x)
    known[OBSERVED] = frame.x if reader is None else reader.output
    reading = [site for site in guide_sites if latents[site.name].posterior.reads_features]
    with at("encoder"):
        encoder = experiment.encoder.build(known, reading) if reading else None
    posteriors = {}
    for site in guide_sites:
        inputs = {name: known[name] for name in site.guide_given}
        if encoder is not None:
            inputs = encoder.shapes.get(site.name, inputs)
        with at(f"latents.{site.name}.posterior"):
            posteriors[site.name] = latents[site.name].posterior.build(site, inputs, link)
    weight = experiment.objective.classification or 0.0
    link.guide = GraphGuide(guide_sites, encoder, posteriors, frame, link, reader, weight)
    return link
