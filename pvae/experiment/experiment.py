"""Experiment: the whole declaration; TOML in and out, dotted overrides, JSON Schema, and the pair it builds."""

from __future__ import annotations

import hashlib
import json
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, Union, get_args, get_origin

import tomli_w
import torch
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError
from torch import nn

from pvae.component import Component, Ints, Names, Section, Shape, Table, load_members
from pvae.data.sources.base import Data
from pvae.data.sources.digits import Digits
from pvae.errors import DeclarationError, is_refused_draw, near
from pvae.experiment import zoo
from pvae.experiment.rules import findings
from pvae.graph.frame import Frame
from pvae.graph.link import Link
from pvae.graph.prompts import Vocabulary, split
from pvae.graph.site import OBSERVED, Site, Values, topological
from pvae.guides.encoders import Encoder, SharedEncoder
from pvae.guides.graph import GraphGuide
from pvae.guides.posteriors.base import Posterior
from pvae.guides.posteriors.codes import BernoulliPosterior, CategoricalPosterior
from pvae.guides.posteriors.exact import ExactPosterior
from pvae.guides.posteriors.normal import NormalPosterior
from pvae.models.decoders import Decoder
from pvae.models.graph import GraphModel
from pvae.models.priors.base import Prior
from pvae.models.priors.codes import BernoulliPrior, CategoricalPrior, prior_of
from pvae.models.priors.normal import StandardNormal
from pvae.nn.optimizers import Adam, Optimizer
from pvae.nn.precision import Precision
from pvae.nn.schedules import Constant, Schedule, Scheduled
from pvae.objectives.base import Objective, TraceELBO
from pvae.pair.pair import Pair
from pvae.util import toml
from pvae.util.memory import weighed

if TYPE_CHECKING:
    from pvae.data import Dataset

NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
RESERVED = {OBSERVED, "data", "chain", "draw"}
for _package in ("pvae.models", "pvae.guides", "pvae.nn", "pvae.objectives"):
    load_members(_package)


class Latent(Section):
    """One latent variable: its size, its place in the model's graph, its prior and posterior."""

    dim: int | None = Field(default=None, gt=0, le=100_000)
    """Number of coordinates of a real vector."""
    codes: int | None = Field(default=None, gt=1, le=1_000_000)
    """Number of values of a code; then prior and posterior are those of codes."""
    grid: Ints | None = Field(default=None, min_length=1, max_length=2)
    """Shape of a grid of codes, `[7, 7]` or `[20]`; a single code unless said."""
    embedding: int | None = Field(default=None, gt=0, le=100_000)
    """Numbers by which a code is seen: its row of a learned codebook. A one-hot unless said."""
    temperature: Schedule | None = None
    """Of a relaxed posterior and its prior, which share one; 2/3 unless said."""
    bits: int | None = Field(default=None, gt=0, le=100_000)
    """Number of elements of a vector of 0 and 1; then prior and posterior are those of bits."""
    given: Names = ()
    """Latents and covariates it depends on in the model."""
    prior: Prior = StandardNormal()
    posterior: Posterior = NormalPosterior()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_codes(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        if raw.get("codes") is not None:
            usual = ExactPosterior() if raw.get("grid") is None else CategoricalPosterior()
            return {"prior": CategoricalPrior(), "posterior": usual, **raw}
        if raw.get("bits") is not None:
            return {"prior": BernoulliPrior(), "posterior": BernoulliPosterior(), **raw}
        return raw

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        sizes = {"dim": self.dim, "codes": self.codes, "bits": self.bits}
        found = [name for name, size in sizes.items() if size is not None]
        if len(found) != 1:
            raise ValueError(
                f"one of dim (a real vector), codes (a discrete latent) and bits (a vector of 0 and 1); "
                f"got {' and '.join(found) or 'none'}"
            )
        for name in ("grid", "embedding"):
            if getattr(self, name) is not None and self.codes is None:
                raise ValueError(f"{name} with codes alone; got {name} with {found[0]}")
        if self.temperature is not None and not self.posterior.is_relaxed:
            raise ValueError("a temperature with a relaxed posterior alone (relaxed_onehot, straight_through); got one")
        if self.posterior.carries and self.codes is not None and self.embedding is None:
            raise ValueError("embedding, the width of the codebook, with the posterior nearest_code; got none")
        return self

    @property
    def values(self) -> Values:
        """What a latent is, before its posterior relaxes it."""
        return "real" if self.dim is not None else "index" if self.codes is not None else "binary"

    @property
    def sampled(self) -> Values:
        """What a sampled value is."""
        return "relaxed" if self.posterior.is_relaxed else self.values

    @property
    def log_states(self) -> float:
        """Logarithm of the number of joint states of a discrete latent; infinite for a vector."""
        if self.codes is not None:
            return prod(self.grid or ()) * math.log(self.codes)
        return math.inf if self.bits is None else self.bits * math.log(2)

    def site(self, name: str) -> Site:
        """What model and guide know of it."""
        grid = self.grid or ()
        size = (self.dim or self.bits or 0,)
        event = {"real": size, "binary": size, "index": grid, "relaxed": (*grid, self.codes or 0)}[self.sampled]
        return Site(
            name,
            event,
            size if self.codes is None else (self.embedding or self.codes, *grid),
            given=self.given,
            guide_given=self.guide_given,
            codes=self.codes,
            grid=grid,
            values=self.sampled,
            hard=self.posterior.is_hard,
            carries=self.posterior.carries,
            has_twin="index" in self.prior.values,
            summed=self.posterior.summed,
        )

    @property
    def guide_given(self) -> tuple[str, ...]:
        """What the posterior is conditioned on: as declared, and the model's parents where it asks for p(z | them)."""
        above = self.given if self.posterior.reads_prior else ()
        return tuple(dict.fromkeys((*self.posterior.given, *above)))


class Covariate(Section):
    """What is known of every datum beside x, and not modelled: its label, as a number or in words."""

    codes: int | None = Field(default=None, gt=1, le=100_000)
    """Number of values, 0 .. codes - 1."""
    words: Names | None = Field(default=None, min_length=2)
    """A text for each label: the model is given its words, a prompt, and may be given any others of the vocabulary."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.codes is None) == (self.words is None):
            found = "neither" if self.codes is None else "both"
            raise ValueError(f"either codes (a label) or words (a text for each label); got {found}")
        if self.words is not None and not all(map(split, self.words)):
            raise ValueError(f"words: at least one word or number in every text; got {list(self.words)}")
        return self

    @property
    def labels(self) -> int:
        """Number of labels."""
        return len(self.words) if self.words is not None else self.codes or 0

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The words, where there are some."""
        return None if self.words is None else Vocabulary.of(self.words)


class Train(Section):
    """How SVI runs."""

    epochs: int = Field(default=20, gt=0)
    batch_size: int = Field(default=100, gt=0)
    optimizer: Optimizer = Adam()
    schedule: Schedule = Constant()
    """Factor on the learning rate over training."""
    warmup: float = Field(default=0.0, ge=0)
    """Epochs during which the learning rate rises from zero."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Gradients with a larger global norm are scaled down to it."""
    average: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights; validation and analysis then use the average."""
    alternate: int = Field(default=0, ge=0)
    """Guide steps per model step (variational EM); 0 moves both at once."""
    validate_every: int = Field(default=1, gt=0)
    """Epochs between validations."""
    patience: int | None = Field(default=None, gt=0)
    """Stop after this many validations without a better ELBO."""
    keep: Literal["best", "last"] = "best"
    """Weights that the run keeps: of the best validation ELBO, or the last."""
    nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """What a NaN or infinite loss does: stop with a diagnosis, skip the step, or go back to the last checkpoint."""
    checkpoint_seconds: float = Field(default=30.0, ge=0)
    """Least time between two checkpoints; one is always written at the end."""
    precision: Precision = "float32"
    """What dense layers and convolutions multiply in while they learn: `bfloat16` is 1.1 to 1.6 times as fast where the
    machine has its instructions (avx512_bf16). All else, validation and analyses are float32 in any case."""
    engine: Literal["auto", "eager", "compiled"] = "auto"
    """How a step runs: `compiled` is export + Inductor, `auto` weighs compile time against the steps to come."""


class Watch(Section):
    """What is analysed while a fit goes on."""

    every: int = Field(default=0, ge=0)
    """Epochs between two surgeries of a few rows, kept in the metrics (split "analysis"); 0 makes none."""
    rows: int = Field(default=1000, gt=1)
    """Rows of each, drawn once by the seed; I_q is at most their logarithm."""
    samples: int = Field(default=1, gt=0)
    """Draws per datum of each."""
    split: Literal["train", "validation"] = "train"


class Plan(Section):
    """How a pair is fitted: all that a hand-written pair needs declared."""

    name: str = Field(default="experiment", min_length=1, max_length=300)
    description: str = ""
    seed: int = Field(default=0, ge=0, lt=2**32)
    objective: Objective = TraceELBO()
    train: Table[Train] = Train()
    analysis: Table[Watch] = Watch()

    @classmethod
    def from_toml(cls, text: str, origin: str = "toml") -> Self:
        """Parse a TOML document."""
        return cls.from_dict(toml.parse(text, origin), origin)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], origin: str = "experiment") -> Self:
        """Validate nested dicts; all problems are reported at once."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise DeclarationError([f"{origin}: {describe(e, raw)}" for e in error.errors()]) from None

    def with_overrides(self, *overrides: str) -> Self:
        """A copy with dotted overrides such as `"train.epochs=20"`."""
        raw = self.model_dump(exclude_none=True, exclude_unset=True)
        apply_overrides(raw, toml.parse_overrides(overrides))
        return type(self).from_dict(raw)

    def with_changes(self, changes: Mapping[str, Any]) -> Self:
        """A copy with other top-level values, validated."""
        return type(self).from_dict({**self.model_dump(exclude_none=True, exclude_unset=True), **changes})

    def to_toml(self) -> str:
        """The declaration with every default written out; reads back to an equal one."""
        table = self.model_dump(exclude_none=True)
        last = {key: table.pop(key) for key in ("objective", "train", "analysis")}
        return tomli_w.dumps({**table, **last})

    def digest(self) -> str:
        """SHA-256, in hex, of all that is declared but name and description: equal declarations, equal digests."""
        table = self.model_dump(mode="json", exclude={"name", "description"}, exclude_none=True)
        return hashlib.sha256(json.dumps(table).encode()).hexdigest()


class Refit(Section):
    """A second stage: all is frozen but some priors, which are fitted to the aggregated posterior."""

    priors: dict[str, Prior] = Field(min_length=1)
    """The new prior of each latent that gets one."""
    train: Table[Train] = Train()
    """How they are fitted: by maximum likelihood of draws of the frozen guide."""


class Experiment(Plan):
    """A declared experiment: data, latents, encoder, decoder, objective, training.

    Example:
        >>> e = Experiment(latents={"z": {"dim": 2}})
        >>> Experiment.from_toml(e.to_toml()) == e
        True
    """

    data: Data = Digits()
    covariates: dict[str, Table[Covariate]] = Field(default={}, max_length=1)
    """The label of every datum, under any name: what `given` may name beside latents."""
    latents: dict[str, Table[Latent]] = Field(min_length=1)
    encoder: Encoder = SharedEncoder()
    decoder: Table[Decoder] = Decoder()
    refit: Table[Refit] | None = None
    """A second stage, fitted in a run of its own when the first is done."""

    @field_validator("latents", "covariates")
    @classmethod
    def _legal_names(cls, named: dict[str, Any]) -> dict[str, Any]:
        for name in named:
            if not NAME.fullmatch(name) or name in RESERVED or hasattr(nn.ModuleDict, name):
                raise ValueError(
                    f"names in lower case, at most 40 letters, digits and _, none of "
                    f"{', '.join(sorted(RESERVED))} nor a method of torch's ModuleDict; got {name[:60]!r}"
                )
        return named

    @model_validator(mode="after")
    def _sound(self) -> Self:
        wrong = list(findings(self))
        if wrong:
            raise ValidationError.from_exception_data(
                "Experiment",
                [
                    InitErrorDetails(type=PydanticCustomError("graph", "{text}", {"text": text}), loc=loc, input=found)
                    for loc, text, found in wrong
                ],
            )
        return self

    # ------------------------------------------------------------------ in and out

    @classmethod
    def load(cls, name_or_file: str | Path, overrides: Sequence[str] = ()) -> Self:
        """A zoo entry by name, or a TOML file, with dotted overrides such as `train.epochs=20`.

        Raises:
            DeclarationError: every problem of the file and the overrides, each with its path.
        """
        path = zoo.find(str(name_or_file))
        raw = toml.read(path)
        apply_overrides(raw, toml.parse_overrides(overrides))
        raw.setdefault("name", path.stem)
        return cls.from_dict(raw, origin=str(name_or_file))

    @classmethod
    def schema_json(cls) -> str:  # type: ignore[override]
        """JSON Schema for editors: each family is `oneOf` its kinds, each kind a `const`."""
        schema = cls.model_json_schema()
        schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
        return json.dumps(schema, indent=2)

    # ------------------------------------------------------------------ graph and pair

    def sites(self) -> tuple[Site, ...]:
        """The latents in generative order."""
        order = topological({name: latent.given for name, latent in self.latents.items()}, "latents")
        return tuple(self.latents[name].site(name) for name in order)

    def guide_sites(self) -> tuple[Site, ...]:
        """The latents that the guide samples, in its order."""
        by_name = {site.name: site for site in self.sites() if not site.summed}
        order = topological({name: site.guide_given for name, site in by_name.items()}, "posteriors")
        return tuple(by_name[name] for name in order)

    def decoder_given(self) -> tuple[str, ...]:
        """Latents that the decoder reads: declared, or those that no other latent depends on."""
        if self.decoder.given is not None:
            return self.decoder.given
        parents = {parent for latent in self.latents.values() for parent in latent.given}
        return tuple(name for name in self.latents if name not in parents)

    def observed(self) -> Decoder:
        """The decoder of the declared data: of a table, with the distribution of each of its columns."""
        return self.decoder.over([column.law(name) for name, column in self.data.table.items()])

    def second_stage(self) -> Experiment:
        """What `refit` declares: this experiment with the new priors and the plain ELBO as the objective.

        Its gradient with respect to a prior is that of the prior's likelihood under q_agg.
        """
        assert self.refit is not None  # noqa: S101 - the caller has asked
        table = self.model_dump(exclude_none=True, exclude_unset=True)
        for name, prior in self.refit.priors.items():
            table["latents"].setdefault(name, {})["prior"] = prior
        del table["refit"]
        changes = {"name": f"{self.name}_refit", "objective": TraceELBO(), "train": self.refit.train}
        return type(self).from_dict({**table, **changes})

    def refitted(self, stage: Experiment) -> list[str]:
        """The latents whose priors a second stage replaces.

        Raises:
            DeclarationError: there are none, or a posterior is made of its prior and would move with it.
        """
        names = [name for name, z in stage.latents.items() if z.prior != self.latents[name].prior]
        if not names:
            raise DeclarationError(
                f"refit: expected another prior, e.g. latents.{next(iter(stage.latents))}.prior.kind=realnvp; got none."
            )
        moved = [name for name in names if stage.latents[name].posterior.follows_prior(stage.latents[name].given)]
        if moved:
            kinds = ", ".join(f"{name} ({stage.latents[name].posterior.kind})" for name in moved)  # type: ignore[attr-defined]
            raise DeclarationError(
                f"refit: expected posteriors that stay as they are; got {kinds}, made of the prior itself, which would "
                f"move with it. Fit the model anew."
            )
        return names

    def conditioned(self, data: Dataset) -> Dataset:
        """Data as the declared pair takes them: with covariates, the label stands in every row."""
        tokens = {}
        for name, covariate in self.covariates.items():
            if covariate.words is not None and (vocabulary := covariate.vocabulary) is not None:
                tokens[name] = [vocabulary.encode(text) for text in covariate.words]
        return data.conditioned({name: covariate.labels for name, covariate in self.covariates.items()}, tokens)

    def frame(self, x: Shape) -> Frame:
        """What a row of data holds, for data of event shape `x`."""
        found = {name: covariate.vocabulary for name, covariate in self.covariates.items()}
        prompts = {name: vocabulary for name, vocabulary in found.items() if vocabulary is not None}
        values = {n: len(prompts[n]) if n in prompts else covariate.labels for n, covariate in self.covariates.items()}
        return Frame(tuple(x), values, prompts)

    def build(self, x: Shape) -> Pair:
        """The Pyro pair for data of event shape `x`; weights drawn from `seed`, the global random state untouched.

        Raises:
            DeclarationError: it would not fit into memory; nothing large has been allocated.
        """
        with torch.random.fork_rng():
            pair = self._build(self.frame(x))
        return pair if self.objective.dtype is None else pair.to(self.objective.dtype)

    def _build(self, frame: Frame) -> Pair:
        link = weighed(lambda: self._parts(frame))
        link.building = True
        try:
            pair = Pair(link.model, link.guide).adopt(torch.zeros(2, *frame.row))
        except (RuntimeError, ValueError) as error:
            if not is_refused_draw(error):
                raise
            raise DeclarationError(
                f"Expected distributions that are finite before training; got: {str(error).splitlines()[0][:200]}. "
                f"Look at scales, log_variance bounds and temperatures."
            ) from error
        self.objective.attach(pair)
        link.building = False
        return pair

    def _parts(self, frame: Frame) -> Link:
        """Model and guide, made but never run; the same each time."""
        torch.manual_seed(self.seed)
        link, sites, guide_sites = Link(), self.sites(), self.guide_sites()
        link.frame, link.support = frame, self.observed().support
        known: dict[str, Shape] = {OBSERVED: frame.x, **frame.shapes}
        known |= {site.name: site.features for site in sites}
        priors = {}
        for site in sites:
            with at(f"latents.{site.name}.prior"):
                above = {name: known[name] for name in site.given}
                priors[site.name] = prior_of(self.latents[site.name].prior, site, above, link)
        with at("decoder"):
            declared = self.observed()
            decoder = declared.build({name: known[name] for name in self.decoder_given()}, frame.x)
        link.model = GraphModel(sites, priors, decoder, frame, *self._of_codes(sites))
        reader = declared.likelihood.reader()
        known[OBSERVED] = frame.x if reader is None else reader.output
        reading = [site for site in guide_sites if self.latents[site.name].posterior.reads_features]
        with at("encoder"):
            encoder = self.encoder.build(known, reading) if reading else None
        inputs = {site.name: {name: known[name] for name in site.guide_given} for site in guide_sites}
        inputs |= encoder.shapes if encoder is not None else {}
        posteriors = {}
        for site in guide_sites:
            with at(f"latents.{site.name}.posterior"):
                posteriors[site.name] = self.latents[site.name].posterior.build(site, inputs[site.name], link)
        link.guide = GraphGuide(guide_sites, encoder, posteriors, frame, link, reader)
        return link

    def _of_codes(self, sites: Sequence[Site]) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
        """The codebooks of latents with embeddings, and the temperatures of relaxed ones."""
        codebooks: dict[str, nn.Module] = {}
        temperatures: dict[str, nn.Module] = {}
        for site in sites:
            latent = self.latents[site.name]
            if site.codes is not None and latent.embedding is not None:
                codebooks[site.name] = latent.posterior.codebook(site.codes, latent.embedding)
            if latent.posterior.is_relaxed:
                temperatures[site.name] = Scheduled(latent.temperature or Constant(value=2 / 3))
        return codebooks, temperatures

    def to_pyro(self, x: Shape | None = None) -> str:
        """Return the declaration as a plain Pyro script: networks, `model`, `guide`, and a loop of `SVI`.

        Arguments:
            x: event shape of a datum; by default the declared data are loaded for it.

        Raises:
            DeclarationError: the objective is no ELBO that `pyro.infer.SVI` minimises (em, gan, iwae, free bits).

        Example:
            >>> script = Experiment.load("vae").to_pyro((1, 8, 8))
            >>> "SVI(model, guide, optimizer, Trace_ELBO())" in script
            True
        """
        from pvae.data import load
        from pvae.experiment.pyro_script.script import pyro_script

        return pyro_script(self, load(self.data, seed=self.seed).shape if x is None else x)

    def _repr_html_(self) -> str:
        from pvae.experiment.readback import experiment_html

        return experiment_html(self)


@contextmanager
def at(path: str) -> Iterator[None]:
    """Name the table whose part could not be built, in problems that name none."""
    try:
        yield
    except DeclarationError as error:
        raise DeclarationError([_located(problem, path) for problem in error.problems]) from None


def _located(problem: str, path: str) -> str:
    if problem.startswith("latents."):
        return problem
    return f"{path}.{problem}" if re.match(r"\w+: ", problem) else f"{path}: {problem}"


# ---------------------------------------------------------------------- walking the declaration's types


def _unwrap(annotation: Any) -> Any:
    """Strip Annotated and Optional."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _unwrap(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        rest = [a for a in get_args(annotation) if a is not type(None)]
        return _unwrap(rest[0])
    return annotation


def table_at(raw: Any, path: Sequence[Any], root: type[BaseModel] = Experiment) -> tuple[Any, type[BaseModel] | None]:
    """The raw value at `path` of a declaration and the class that would validate it, as far as both are known."""
    value: Any = raw
    kind: Any = root
    for part in path:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(str(part))
            kind = _unwrap(field.annotation) if field else None
        else:
            kind = _unwrap(get_args(kind)[-1]) if get_origin(kind) in (dict, tuple) else None
        value = value.get(part) if isinstance(value, dict) else None
        kind = _member(kind, value)
    return value, kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _member(kind: Any, value: Any) -> Any:
    """The member that a family's table names, if it names one."""
    if isinstance(kind, type) and issubclass(kind, Component) and kind.is_family():
        name = value.get(kind.tag, kind.default) if isinstance(value, dict) else value
        return kind.members.get(name, kind) if isinstance(name, str) else kind
    return kind


def apply_overrides(raw: dict[str, Any], overrides: Sequence[tuple[tuple[str, ...], Any]]) -> None:
    """Set dotted paths in nested dicts; a new kind keeps only the keys it knows."""
    for path, value in overrides:
        table = raw
        for depth, part in enumerate(path[:-1]):
            inner = table.get(part)
            if isinstance(inner, str):
                inner = {_tag(raw, path[: depth + 1]): inner}
            elif not isinstance(inner, dict):
                inner = _default_table(raw, path[: depth + 1])
            table[part] = inner
            table = inner
        table[path[-1]] = value
        _forget_foreign_keys(raw, path)


def _default_table(raw: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """What an override of one key starts from where nothing is written: the kind that is the default there."""
    _, parent = table_at(raw, path[:-1])
    field = parent.model_fields.get(path[-1]) if parent else None
    default = field.default if field else None
    return {default.tag: getattr(default, default.tag)} if isinstance(default, Component) else {}


def _tag(raw: dict[str, Any], path: Sequence[str]) -> str:
    _, kind = table_at(raw, path)
    return kind.tag if kind is not None and issubclass(kind, Component) else "kind"


def _forget_foreign_keys(raw: dict[str, Any], path: tuple[str, ...]) -> None:
    if path[-1] not in ("kind", "source", "type") or len(path) == 1:
        return
    table, kind = table_at(raw, path[:-1])
    if isinstance(table, dict) and kind is not None and not kind.is_family():  # type: ignore[attr-defined]
        for key in [key for key in table if key not in kind.model_fields]:
            del table[key]


def describe(error: ErrorDetails, raw: Any, root: type[BaseModel] = Experiment) -> str:
    """One pydantic finding as `dotted.path: expected ...; got ... (did you mean ...)`."""
    loc = tuple(part for part in error["loc"] if part != "[key]")
    path = ".".join(str(part) for part in loc) or "(the whole file)"
    if error["type"] == "extra_forbidden":
        _, kind = table_at(raw, loc[:-1], root)
        known = sorted(kind.model_fields) if kind else []
        wanted = f"one of {', '.join(known)}" if known else "no such key"
        hint = near(str(loc[-1]), known) or _elsewhere(str(loc[-1]))
        return f"{path}: expected {wanted}; got an unknown key{hint}."
    if error["type"] == "missing":
        return f"{path}: expected a value; got none."
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if "; got" in message:
        return f"{path}: expected {message}."
    return f"{path}: expected {message}; got {_short(error['input'])}{error.get('ctx', {}).get('near', '')}."


def _elsewhere(key: str) -> str:
    """Where a key of this name stands, when it was written one table too high."""
    places: dict[str, type[Section]] = {"train": Train, "decoder": Decoder, "train.optimizer": Adam}
    places |= {"objective": TraceELBO, "data": Digits}
    found = [f"{table}.{key}" for table, kind in places.items() if key in kind.model_fields]
    return f" (did you mean {found[0]!r}?)" if found else ""


def _short(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        return type(value).__name__
    text = json.dumps(value, default=str) if not isinstance(value, bytes) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
