"""Tables of a declaration: latents and covariates; training and analysis, with their plan; dotted overrides."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, Field, model_validator

from pvae.component import Component, Ints, Names, Section, Table, from_table, table_at
from pvae.data.rows.columns import CategoricalColumn, Column, ContinuousColumn, CountColumn, Levels
from pvae.errors import refuse, text
from pvae.graph.frame import PADDING, UNKNOWN, Entry, Vocabulary, split
from pvae.graph.site import Site, Space
from pvae.guides.posteriors.base import ExactPosterior, NormalPosterior, Posterior
from pvae.guides.posteriors.codes import BernoulliPosterior, CategoricalPosterior
from pvae.models.priors.base import BernoulliPrior, CategoricalPrior, Prior, StandardNormal
from pvae.nn.precision import Precision
from pvae.nn.schedules import Adam, Constant, Optimizer, Schedule
from pvae.objectives import base, elbo
from pvae.util import digest, toml


class Latent(Section):
    """One latent variable: its size, its place in the model's graph, its prior and posterior."""

    dim: int | None = Field(default=None, gt=0, le=100_000)
    """Number of coordinates of a real vector."""
    codes: int | None = Field(default=None, gt=1, le=1_000_000)
    """Number of values of a discrete latent (a code); its default prior and posterior are then discrete too."""
    grid: Ints | None = Field(default=None, min_length=1, max_length=2)
    """Shape of a grid of discrete codes, `[7, 7]` or `[20]`; a single code by default."""
    embedding: int | None = Field(default=None, gt=0, le=100_000)
    """Width of a learned codebook whose rows represent the codes in networks; one-hot vectors by default."""
    temperature: Schedule | None = None
    """Temperature of a relaxed (Concrete) posterior and of its prior, or its schedule; 2/3 by default."""
    bits: int | None = Field(default=None, gt=0, le=100_000)
    """Number of elements of a binary vector; its default prior and posterior are then Bernoulli."""
    given: Names = ()
    """Parents of the latent in the model: names of latents and covariates."""
    observed: str | None = None
    """Value of the data that is this latent where it is known: "label", or the name of a value beside x. Where it is
    NaN, -1 or missing, the latent is inferred from x, as it is for all rows of validation and test. Numbers are
    standardised by the training rows in which they are known, so that they suit a standard normal prior."""
    prior: Prior = StandardNormal()
    posterior: Posterior = NormalPosterior()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_codes(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("codes") is not None:
            plain = raw.get("grid") is None and raw.get("observed") is None
            usual = ExactPosterior() if plain else CategoricalPosterior()
            return {"prior": CategoricalPrior(), "posterior": usual, **raw}
        if isinstance(raw, dict) and raw.get("bits") is not None:
            return {"prior": BernoulliPrior(), "posterior": BernoulliPosterior(), **raw}
        return raw

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        sizes = {"dim": self.dim, "codes": self.codes, "bits": self.bits}
        found = [name for name, size in sizes.items() if size is not None]
        refuse(len(found) != 1, "experiment.plan.size", ValueError, found=found)
        for name in ("grid", "embedding"):
            if getattr(self, name) is not None and self.codes is None:
                raise ValueError(f"{name} with codes alone; got {name} with {found[0]}")
        refuse(self.temperature and self.sampled.values != "relaxed", "experiment.plan.temperature", ValueError)
        if self.posterior.carries and self.codes is not None:
            self.posterior.sampled(self.space)  # a ValueError, if sizes do not fit
        return self

    @property
    def space(self) -> Space:
        """Space of the values of the latent, before its posterior relaxes them."""
        if self.codes is not None:
            return Space.codes(self.codes, self.grid or (), self.embedding)
        return Space.real(self.dim) if self.dim is not None else Space.bits(self.bits or 0)

    @property
    def sampled(self) -> Space:
        """Space of the values that the posterior samples: `space`, or what the posterior makes of it."""
        if self.posterior.carries and self.codes is None:
            return self.space  # which the rules of a declaration refuse
        return self.posterior.sampled(self.space)

    def entry(self) -> Entry | None:
        """Return the entry of a row that holds the latent's value where it is known; None if it never is."""
        source: Any = "label" if self.observed == "label" else "side"
        return None if self.observed is None else Entry(self.codes or 0, self.dim or 1, source=source, latent=True)

    @property
    def column(self) -> Column | None:
        """Column of the values beside x that the latent is seen to have in some rows; None if they are labels."""
        if self.observed in (None, "label"):
            return None
        return CountColumn(missing="mask") if self.dim is None else ContinuousColumn(missing="mask")

    def site(self, name: str) -> Site:
        """Return the latent as a node of the graph that model and guide are built from."""
        q, twin = self.posterior, "index" in self.prior.values
        return Site(name, self.sampled, self.given, self.guide_given, q.carries, has_twin=twin, summed=q.summed)

    @property
    def guide_given(self) -> tuple[str, ...]:
        """Parents in the guide: those declared, and the model's parents if the posterior reads p(z | parents)."""
        return tuple(dict.fromkeys((*self.posterior.given, *(self.given if self.posterior.reads_prior else ()))))


class Covariate(Section):
    """A value that is observed for every datum and not modelled: a label, real numbers, or a text prompt.

    Networks read a label as a one-hot, or as a thermometer if it is ordinal, and numbers standardised.

    Example:
        >>> Covariate(levels=("low", "high"), of="dose").entry().codes
        2
    """

    of: str | None = None
    """Column of a table, array of an archive, key of `obs`, or entry of a dictionary that it is made of; by default the
    label of the data, which otherwise stays free for reports."""
    codes: int | None = Field(default=None, gt=1, le=100_000)
    """Number of values of the label, which are 0 .. codes - 1."""
    levels: Annotated[Levels, Field(min_length=2, max_length=10_000)] | None = None
    """All values of a label as the data write them, in their order, which the codes 0, 1, 2, ... stand for."""
    ordinal: bool = False
    """Networks read label k as a thermometer: k >= 1, .., k >= codes - 1."""
    dim: int | None = Field(default=None, gt=0, le=100_000)
    """Number of real numbers, standardised by mean and standard deviation of the training rows."""
    transform: Literal["none"] | None = None
    """`none`: real numbers as they are, as the size of counts needs them; by default they are standardised."""
    words: Names | None = Field(default=None, min_length=2)
    """A text (prompt) for each label; the model reads its words, and after training any prompt of the same
    vocabulary."""
    text: bool = False
    """A text (caption) for each row. The model reads its first `length` words, and the unknown word for those outside
    the vocabulary of the training rows."""
    length: int | None = Field(default=None, gt=0, le=10_000)
    """Number of words of a caption, 32 by default: shorter ones are padded, longer ones cut, which notes say."""
    vocabulary: int | None = Field(default=None, gt=2, le=100_000)
    """Largest number of words of captions, 1000 by default: the padding word, the unknown word, the most frequent."""
    scored: bool = False
    """Captions are data, as x is: a prior that reads them scores their words too, and log p(caption) is a term."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        forms = {name: getattr(self, name) or None for name in ("codes", "levels", "dim", "words", "text")}
        if len(found := [name for name, value in forms.items() if value is not None]) != 1:
            raise ValueError(text("experiment.plan.covariate", found=found))
        for name in () if self.text else ("length", "vocabulary", "scored"):
            refuse(getattr(self, name), f"{name} with text = true alone; got it with {found[0]}", ValueError)
        refuse(not self.of and (self.levels or self.dim or self.text), "experiment.plan.of", ValueError, found=found)
        refuse(self.ordinal and not (self.codes or self.levels), "experiment.plan.ordinal", ValueError, found=found)
        refuse(not all(map(split, self.words or ())), "experiment.plan.words", ValueError, words=self.words)
        return self

    @property
    def labels(self) -> int:
        """Number of different labels; 0 of real numbers."""
        return len(self.words or self.levels or ()) or self.codes or 0

    @property
    def column(self) -> Column | None:
        """Column of the values beside x that it is made of; None if it is the label of the data."""
        if self.of is None:
            return None
        if self.levels is not None:
            return CategoricalColumn(of=self.of, levels=self.levels)
        if self.text:
            return ContinuousColumn(of=self.of, transform="none", text=(self.length or 32, self.vocabulary or 1000))
        kept = self.transform or "standardise"
        return CountColumn(of=self.of) if self.dim is None else ContinuousColumn(of=self.of, transform=kept)

    def entry(self, *, is_owner: bool = False) -> Entry:
        """Return the covariate as an entry of a row; numbers are sizes of counts if it is owner of a likelihood's."""
        source: Literal["label", "side"] = "label" if self.of is None else "side"
        if isinstance(self.column, ContinuousColumn) and self.column.text is not None:
            length, size = self.column.text
            return Entry(size, length, Vocabulary((PADDING, UNKNOWN), length), source=source)
        if self.words is None:
            size = is_owner and self.dim is not None
            return Entry(self.labels, self.dim or 1, ordinal=self.ordinal, source=source, size=size)
        vocabulary = Vocabulary.of(self.words)
        tokens = tuple(tuple(vocabulary.encode(words)) for words in self.words)
        return Entry(len(vocabulary), vocabulary.length, vocabulary, tokens, source=source)


def side_columns(covariates: Mapping[str, Covariate], latents: Mapping[str, Latent] = {}) -> dict[str, Column]:
    """Return the columns beside x of which covariates are made, and that latents are seen to have in some rows."""
    known: dict[str, Column | None] = {name: covariate.column for name, covariate in covariates.items()}
    known |= {latent.observed or "": latent.column for latent in latents.values()}
    return {name: column for name, column in known.items() if column is not None}


class Train(Section):
    """Settings of training by SVI: epochs, batches, optimiser, early stopping, checkpoints, non-finite losses."""

    epochs: int = Field(default=20, gt=0)
    batch_size: int = Field(default=100, gt=0)
    shards: int = Field(default=1, gt=0, le=4096)
    """Number of parts of every batch, a power of two: as many processes can share out a fit (`torchrun`), or fewer that
    divide it. Noise belongs to the part, so that on a CPU the result has the same bits for any number of processes.
    `free_bits`, leave-one-out priors and whatever else is not linear in the batch are those of a part."""
    optimizer: Optimizer = Adam()
    labelled: float | None = Field(default=None, gt=0, le=1)
    """Proportion of every batch that is drawn from the rows in which a latent is observed, in place of as many others:
    where only few rows are labelled, most batches have none of them. Their weight in the loss is then more than their
    proportion of the data."""
    schedule: Schedule = Constant()
    """Schedule of a factor on the learning rate."""
    warmup: float = Field(default=0.0, ge=0)
    """Epochs during which the learning rate rises from zero."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest global norm of the gradient; larger gradients are scaled down to it."""
    average: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights; validation and analysis then use the average."""
    alternate: int = Field(default=0, ge=0)
    """Number of guide steps per model step (variational EM); 0 updates both in every step."""
    validate_every: int = Field(default=1, gt=0)
    """Number of epochs between two validations."""
    patience: int | None = Field(default=None, gt=0)
    """Number of validations without a better figure (see `keep`) after which training stops early; never unless set."""
    keep: Literal["best", "last"] = "best"
    """Weights that the run keeps: the last, or those of the best validation figure of the objective: ELBO, `iwae`,
    ... Under `em` the best are those that have converged on the training data."""
    nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """Response to a NaN or infinite loss: stop with a diagnosis, skip the step, or go back to the epoch's start (of
    every epoch a checkpoint is written)."""
    checkpoint_seconds: float = Field(default=30.0, ge=0)
    """Smallest number of seconds between two checkpoints; one is always written at the end."""
    precision: Precision = "float32"
    """Type in which dense layers and convolutions multiply in training: `bfloat16` is 1.1 to 1.6 times as fast where
    the processor has its instructions (avx512_bf16); elsewhere factors are rounded, and a step is no faster. `auto` is
    `bfloat16` where the processor has them, else `float32`. All other computations are in float32, validation and
    analyses too."""
    engine: Literal["auto", "eager", "compiled"] = "auto"
    """Execution of a step: `eager`; `compiled` by torch.export and Inductor; `auto` compiles if that should save
    time, sooner where an earlier fit of the same shapes was compiled."""

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.shards & (self.shards - 1) or self.shards > self.batch_size:
            raise ValueError(f"shards = a power of two, at most batch_size = {self.batch_size}; got {self.shards}")
        return self


class Watch(Section):
    """Settings of the ELBO surgeries during a fit (table `analysis`)."""

    every: int = Field(default=0, ge=0)
    """Number of epochs between two ELBO surgeries of a few rows, logged as metrics (split "analysis"); 0 for none."""
    rows: int = Field(default=1000, gt=1)
    """Number of rows in each surgery, chosen once by the seed; the mutual information I_q is at most log(rows)."""
    samples: int = Field(default=1, gt=0)
    """Number of samples of z per datum in each surgery."""
    split: Literal["train", "validation"] = "train"


class Plan(Section):
    """Declaration of a fit without model and data, sufficient for a hand-written pair: objective, training, seed."""

    name: str = Field(default="experiment", min_length=1, max_length=300)
    description: str = ""
    seed: int = Field(default=0, ge=0, lt=2**32)
    objective: base.Objective = elbo.TraceELBO()
    train: Table[Train] = Train()
    analysis: Table[Watch] = Watch()

    @classmethod
    def from_toml(cls, text: str, origin: str = "toml") -> Self:
        """Return the declaration that a TOML document contains."""
        return cls.from_dict(toml.parse(text, origin), origin)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], origin: str = "experiment") -> Self:
        """Return the declaration that nested dictionaries contain.

        Raises a DeclarationError that names every problem.
        """
        return from_table(cls, raw, origin)

    def with_overrides(self, *overrides: str) -> Self:
        """Return a copy of the declaration with dotted overrides such as `"train.epochs=20"` applied."""
        raw = self.model_dump(exclude_none=True, exclude_unset=True)
        apply_overrides(raw, toml.parse_overrides(overrides), type(self))
        return type(self).from_dict(raw)

    def with_changes(self, changes: Mapping[str, Any]) -> Self:
        """Return a validated copy of the declaration with other values for some of its top-level keys."""
        return type(self).from_dict({**self.model_dump(exclude_none=True, exclude_unset=True), **changes})

    def to_toml(self) -> str:
        """Return the declaration as TOML with every default written out; reading it gives an equal declaration."""
        table = self.model_dump(exclude_none=True)
        last = {key: table.pop(key) for key in ("objective", "train", "analysis")}
        return tomli_w.dumps({**table, **last})

    def digest(self) -> str:
        """Return the SHA-256 digest (hex) of the declaration without name and description."""
        table = self.model_dump(mode="json", exclude={"name", "description"}, exclude_none=True)
        return digest(json.dumps(table).encode())


def apply_overrides(raw: dict[str, Any], overrides: Sequence[toml.Override], root: type[BaseModel]) -> None:
    """Set dotted paths in the nested dictionaries of a declaration.

    A table whose `kind` is overridden loses the keys that the new kind does not have.

    Arguments:
        raw: the declaration, changed in place.
        overrides: pairs of path, as a tuple of keys, and value.
        root: class of the declaration.
    """
    for path, value in overrides:
        table = raw
        for depth, part in enumerate(path[:-1], 1):
            inner = table.get(part)
            table[part] = inner if isinstance(inner, dict) else _new_table(raw, path[:depth], root, inner)
            table = table[part]
        table[path[-1]] = value
        if path[-1] in ("kind", "source", "type") and len(path) > 1:  # keys that the new kind does not have go
            _, kind = table_at(raw, path[:-1], root)
            if kind is not None and not kind.is_family():  # type: ignore[attr-defined]
                for key in table.keys() - kind.model_fields.keys():
                    del table[key]


def _new_table(raw: dict[str, Any], path: Sequence[str], root: type[BaseModel], found: Any) -> dict[str, Any]:
    """Return the table for an overridden key where the declaration has none.

    It is that of the kind whose name is `found` in its place, else that of the default kind, or {}.
    """
    if isinstance(found, str):
        _, kind = table_at(raw, path, root)
        return {kind.tag if kind is not None and issubclass(kind, Component) else "kind": found}
    _, parent = table_at(raw, path[:-1], root)
    field = parent.model_fields.get(path[-1]) if parent else None
    default = field.default if field else None
    return {default.tag: getattr(default, default.tag)} if isinstance(default, Component) else {}
