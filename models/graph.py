"""The Pyro model of a declared graph: walk the latents in generative order, then decode and observe x."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyro.distributions as dist
from pydantic import PrivateAttr
from pyro.poutine.runtime import InferDict
from torch import Tensor, nn

from pvae.component import Names, Section, Shape
from pvae.distributions import Determined, missing
from pvae.errors import DataError, misdeclared
from pvae.graph.frame import Frame
from pvae.graph.site import EMBEDDED, OBSERVED, Law, Site, embedded
from pvae.graph.statements import data_plate, sample
from pvae.models.likelihoods import base, standard
from pvae.models.priors.autoregressive import TransformerModule
from pvae.nn.network import MLP, Network


class Decoder(Section):
    """Declared decoder p(x | latents): a network and a likelihood."""

    network: Network = MLP()
    """Network from the latents' features to the parameters of the likelihood."""
    likelihood: base.Likelihood = standard.Bernoulli()
    given: Names | None = None
    """Names of the latents that the decoder reads; default: those that no other latent depends on."""
    missingness: Literal["random", "z"] = "random"
    """Elements that may be missing: at `random` (given the observed elements), so that the log density of x is that of
    the observed ones; or with a probability that the decoder gives for each element, so that which are missing is data
    too: p(x_observed, m | z) = p(x_observed | z) p(m | z), exactly.

    References:
        not-MIWAE: Deep Generative Modelling with Missing not at Random Data (Ipsen et al., 2021),
        https://arxiv.org/abs/2006.12871
    """
    _takes_missing: bool = PrivateAttr(default=False)

    def over(self, laws: Sequence[Law], masked: bool = False) -> "Decoder":
        """Return this decoder for the declared data.

        Arguments:
            laws: distributions of the columns of a table, to which a likelihood that scores tables is bound.
            masked: True if elements of x other than a table's may be missing.
        """
        bound = self.model_copy(update={"likelihood": self.likelihood.over(laws)})
        bound._takes_missing = masked or any(law.masked for law in laws)
        return bound

    @property
    def takes_missing(self) -> bool:
        """True if elements of x may be missing, NaN."""
        return self._takes_missing

    def reader(self, x: Shape) -> base.ReaderModule | None:
        """Return the module that prepares data of event shape `x` for the guide; None if it reads them as they are."""
        own = self.likelihood.reader(x)
        return base.IndicatorReader(x, own) if self._takes_missing and not self.likelihood.of_tables else own

    @property
    def support(self) -> dist.constraints.Constraint:
        """Constraint on each element of x: the likelihood's or, if z determines x, that of the network's output."""
        own = self.likelihood.support
        return own if own.is_discrete or not self.likelihood.is_point else self.network.support or own

    def build(self, known: Mapping[str, Shape], given: Sequence[str], x: Shape) -> "DecoderModule":
        """Return the module from the features `given`, of the shapes `known`, to a distribution of event shape `x`."""
        return DecoderModule(self, known, given, x)


class DecoderModule(nn.Module):
    """Module of a decoder: the network, then the likelihood of its output."""

    def __init__(self, declared: Decoder, known: Mapping[str, Shape], given: Sequence[str], x: Shape) -> None:
        super().__init__()
        self.conditions = declared.likelihood.conditions
        self.likelihood = declared.likelihood.within({name: known[name] for name in self.conditions}).build(x)
        self.takes_missing = declared.takes_missing
        self.parts, (first, *rest) = [], self.likelihood.inputs
        if declared.missingness == "z":
            misdeclared(rest != [*x[1:]], "models.graph.missingness", likelihood=declared.likelihood, x=x)
            self.parts, first = [first, x[0]], first + x[0]
        self.network = declared.network.build({name: known[name] for name in given}, (first, *rest))

    def forward(self, seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return p(x | features), with batch shape `(...)`, for features `name -> (..., *shape)`.

        Raises:
            DataError: the features are one tensor.
        """
        if isinstance(seen, Tensor):
            raise DataError.of("models.graph.names", inputs=self.network.inputs)
        h, absence = self.network(seen), None
        if self.parts:
            h, absence = h.split(self.parts, -len(self.likelihood.x))
        beside = ({name: seen[name] for name in self.conditions},) if self.conditions else ()
        fn = self.likelihood(h, *beside)
        return missing.partly_missing(fn, absence) if self.takes_missing else fn


ENUMERATED: InferDict = {"enumerate": "parallel"}


class GraphModel(nn.Module):
    """Pyro model p(x, z) = p(x | z) prod_l p(z_l | parents), conditional on the covariates of a row if there are any.

    A caption that a prior scores is observed like x: p(x, z, caption) = p(caption) p(x, z | caption).

    Arguments:
        sites: the latents, parents first.
        priors: one module per latent.
        decoder: from the latents to p(x | z).
        frame: the layout of a row of data: the datum x, then the covariates.
        codebooks: the tables of embeddings of codes, by the name of their latent.
        temperatures: the temperature of each relaxed latent, which its prior and posterior share.
    """

    def __init__(
        self, sites: tuple[Site, ...], priors: Mapping[str, nn.Module], decoder: DecoderModule, frame: Frame,
        codebooks: Mapping[str, nn.Module] | None = None, temperatures: Mapping[str, nn.Module] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.sites, self.frame = sites, frame
        self.codebooks, self.temperatures = nn.ModuleDict(codebooks or {}), nn.ModuleDict(temperatures or {})
        self.priors = nn.ModuleDict(priors)
        parts = [part for part in self.priors.modules() if isinstance(part, TransformerModule)]
        self.captions = {name: caption for part in parts for name, caption in part.captions.items()}
        self.decoder = decoder

    def see(self, site: Site, value: Tensor, like: Tensor) -> Tensor:
        """Return a latent's value as its children and the decoder read it, codes embedded, `(..., *site.features)`."""
        book: Any = self.codebooks[site.name] if site.space.is_code and site.name in self.codebooks else None
        return site.space.see(value, like, None if book is None else book.table)

    def temperature(self, name: str) -> Tensor:
        """Return the temperature tau of a relaxed latent, a scalar."""
        return self.temperatures[name].value  # type: ignore[return-value]

    def prior(self, name: str, seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return p(z_name | parents), given the features of the parents by name."""
        return self.priors[name](seen)

    def forward(self, rows: Tensor | None = None, size: int | None = None) -> Tensor:
        """Sample every latent from its prior and x from p(x | z); with `rows`, x is observed.

        Arguments:
            rows: rows of data `(batch, *row)`; None to sample from a model without covariates.
            size: batch size if there are no rows; default 1.

        Returns:
            x `(batch, *event)`.
        """
        x, seen = (None, {}) if rows is None else self.frame.split(rows)
        misdeclared(rows is None and self.frame.covariates, "models.graph.no_rows", covariates=self.frame.covariates)
        like = next(self.parameters()) if rows is None else rows
        with data_plate(size or 1 if rows is None else rows.shape[0]):
            for name, caption in self.captions.items():
                tokens = sample(name, caption(seen), obs=self.frame.columns(like)[name].long())
                seen[name] = self.frame.covariates[name].see(tokens, like)  # sampled where it is not given
            for site in self.sites:
                value = sample(site.name, self.prior(site.name, seen), infer=ENUMERATED if site.summed else None)
                seen[site.name] = self.see(site, value, like)
                if site.carries:
                    row = Determined(seen[site.name], event_dim=len(site.features))
                    seen[site.name] = sample(embedded(site.name), row, infer=EMBEDDED)
            if self.training and x is not None and self.decoder.likelihood.is_point:
                return sample(OBSERVED, Determined(x, event_dim=len(self.frame.x)), obs=x)  # no need to decode
            return sample(OBSERVED, self.decoder(seen), obs=x)
