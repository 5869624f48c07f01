"""Declarations of latent variables and of covariates."""

from typing import Any, Self

from pydantic import Field, model_validator

from pvae.component import Ints, Names, Section
from pvae.graph.site import Site, Space, Vocabulary, split
from pvae.guides.posteriors.base import Posterior
from pvae.guides.posteriors.codes import BernoulliPosterior, CategoricalPosterior
from pvae.guides.posteriors.normal import ExactPosterior, NormalPosterior
from pvae.models.priors.base import Prior
from pvae.models.priors.factorised import BernoulliPrior, CategoricalPrior, StandardNormal
from pvae.nn.schedules import Schedule


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
    prior: Prior = StandardNormal()
    posterior: Posterior = NormalPosterior()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_codes(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("codes") is not None:
            usual = ExactPosterior() if raw.get("grid") is None else CategoricalPosterior()
            return {"prior": CategoricalPrior(), "posterior": usual, **raw}
        if isinstance(raw, dict) and raw.get("bits") is not None:
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
        if self.temperature is not None and self.sampled.values != "relaxed":
            raise ValueError("a temperature with a relaxed posterior alone (relaxed_onehot, straight_through); got one")
        if self.posterior.carries and self.codes is not None and self.embedding is None:
            raise ValueError("embedding, the width of the codebook, with the posterior nearest_code; got none")
        return self

    @property
    def space(self) -> Space:
        """Space of the values of the latent, before its posterior relaxes them."""
        if self.codes is not None:
            return Space.codes(self.codes, self.grid or (), self.embedding)
        return Space.real(self.dim) if self.dim is not None else Space.bits(self.bits or 0)

    @property
    def sampled(self) -> Space:
        """Space of the values that the posterior samples: `space`, or its relaxation if the posterior relaxes codes."""
        return self.posterior.sampled(self.space)

    def site(self, name: str) -> Site:
        """Return the latent as a node of the graph that model and guide are built from."""
        return Site(
            name,
            self.sampled,
            given=self.given,
            guide_given=self.guide_given,
            carries=self.posterior.carries,
            has_twin="index" in self.prior.values,
            summed=self.posterior.summed,
        )

    @property
    def guide_given(self) -> tuple[str, ...]:
        """Parents in the guide: those declared, and the model's parents if the posterior reads p(z | parents)."""
        return tuple(dict.fromkeys((*self.posterior.given, *(self.given if self.posterior.reads_prior else ()))))


class Covariate(Section):
    """A label that is observed for every datum and not modelled: a class number, or a text prompt."""

    codes: int | None = Field(default=None, gt=1, le=100_000)
    """Number of values of the label, which are 0 .. codes - 1."""
    words: Names | None = Field(default=None, min_length=2)
    """A text (prompt) for each label; the model reads its words, and after training any prompt of the same
    vocabulary."""

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
        """Number of different labels."""
        return len(self.words) if self.words is not None else self.codes or 0

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Vocabulary of the prompts; None if the label is a number."""
        return None if self.words is None else Vocabulary.of(self.words)
