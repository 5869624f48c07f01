"""Terms of the ELBO of a batch (log-likelihood, KLs, penalties, score functions), from one trace of each program."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pvae.distributions import Event, log_density
from pvae.errors import DeclarationError, misdeclared
from pvae.pair.densities import closed_kl, full_size, log_prob, plate_scale, priced_kl, share, sum_over
from pvae.pair.enumeration import Expectations, eliminated, read_joint_states, require_expectable
from pvae.pair.layout import Layout, Traces, is_point, samples
from pvae.util import Record, field, replace

Nodes = Mapping[str, Mapping[str, Any]]
"""Sites of a trace by name."""


class Score(Record):
    """Ingredients of the score-function gradient of a latent, E[(gain - baseline) grad log q] for the ELBO."""

    log_q: Tensor
    """Log density log q of the sample, `(batch,)`, with gradient and without the scale of poutine.scale."""
    weighed: Tensor
    """Log density log q of the sample times the scale of its site (poutine.scale), as it enters the latent's KL."""
    own_kl: bool
    """True if the gain includes the latent's own KL term; False if that KL is in closed form."""
    baseline: Tensor | None
    """Baseline subtracted from the gain, `(batch,)` or a scalar; None without a baseline."""
    learns: bool
    """True if the baseline has parameters (a network), which are fitted to the gain."""
    note: Callable[[Tensor], None] = lambda _: None
    """Callback that receives the gain and updates a moving-average baseline, if there is one."""


class Terms(Record):
    """Terms of the ELBO of a batch, nats; with several samples per row they have a leading dimension `particles`."""

    reconstruction: Tensor
    """Log-likelihood log p(x | z) of every row, `(batch,)`."""
    kl: dict[str, Tensor]
    """KL of every latent by name, log q - log p or closed form, `(batch,)`; of a global one divided by n, `(1,)`."""
    penalties: dict[str, Tensor] = field(default_factory=dict)
    """Penalties added to the loss beside the ELBO, such as the commitment loss of VQ-VAE, `(batch,)`."""
    scores: dict[str, Score] = field(default_factory=dict)
    """Score-function terms of every latent whose sample carries no gradient."""

    closed: Callable[[str], Tensor | None] = lambda _: None
    """Function that returns the closed-form KL of a latent that `kl` estimates from samples; None if there is none."""
    of_model: "Terms | None" = None
    """Terms at the same samples whose gradient is that of log p(x, z) alone; None unless an estimator asks for them."""

    def figures(self, closed: Collection[str]) -> list[Tensor]:
        """Return `means` as metrics, without gradient: KLs of the latents `closed` in closed form where it exists."""
        with torch.no_grad():
            known = [self.closed(name) if name in closed else None for name in self.kl]
            pairs = zip(self.means[1:], known, strict=True)
            return [self.means[0], *(mean if value is None else _apart(value, mean) for mean, value in pairs)]

    @cached_property
    def means(self) -> list[Tensor]:
        """Batch means of the reconstruction, then of every KL; cached, as loss and metrics both use them."""
        return [self.reconstruction.mean(), *(kl.mean() for kl in self.kl.values())]


def _apart(kl: Tensor, estimate: Tensor) -> Tensor:
    """Return the mean of closed-form KLs, at least 0 despite rounding, or the estimate where they are infinite."""
    mean = kl.mean()
    return torch.where(mean < math.inf, mean.clamp(min=0), estimate)


class TracedBatch(Record):
    """Traces of guide and model on one batch, whose sites are scored per row of data, nats."""

    guide: Trace
    model: Trace
    layout: Layout
    particles: int
    """Number of samples per row; 0 without a particle plate."""
    size: int
    """Number of rows of the whole data set, by which the log densities of global sites are divided."""
    closed_form: bool = False
    """True to use KL(q || p) in closed form where torch knows it."""
    still: Nodes = field(default_factory=dict)
    """Sites of the guide at samples without a gradient, of latents whose log q has no score (`pathwise`)."""

    @property
    def latents(self) -> tuple[str, ...]:
        """Latents of the guide, local ones first; a batch may lack some."""
        return (*self.layout.latents, *self.layout.shared)

    def log_prob(self, node: Mapping[str, Any]) -> Tensor:
        """Return the log density of a site per row, `([particles,] batch)`."""
        return log_prob(node, self.layout, self.particles, self.size)

    def log_p(self, name: str) -> Tensor | float:
        """Return the log density of a site of the model per row; 0 if the model has no such site on this batch."""
        return self.log_prob(self.model.nodes[name]) if name in self.model.nodes else 0.0

    def observed(self) -> Tensor:
        """Return the log-likelihood of every row: the sum over the observed sites of the model that the batch has."""
        return sum_over([self.log_prob(self.model.nodes[n]) for n in self.layout.observed if n in self.model.nodes])

    def known_kl(self, name: str) -> Tensor | None:
        """Return the categorical KL of a relaxed latent, or a closed-form KL if asked for; None if neither exists."""
        q, p = self.guide.nodes[name], self.model.nodes.get(name)
        if p is None:
            return None
        if (priced := priced_kl(q, p, self.layout, self.particles)) is None and self.closed_form:
            return closed_kl(q, p, self.layout, self.particles, self.size)
        return priced

    def closed(self, name: str) -> Tensor | None:
        """Return the closed-form KL of a latent whose term is an estimate from samples; None if there is none."""
        q, p = self.guide.nodes.get(name), self.model.nodes.get(name)
        if self.closed_form or self.layout.enumerated or q is None or p is None or is_point(q["fn"]):
            return None  # the term itself is what there is
        if q["fn"].__class__ is Event and (plain := q["fn"].normal_kl(p["fn"])) is not None:
            return share(q, plain, self.layout, self.particles, self.size)
        if priced_kl(q, p, self.layout, self.particles) is not None:
            return None
        return closed_kl(q, p, self.layout, self.particles, self.size)

    def terms(self, reconstruction: Tensor, log_p: Callable[[str], Tensor | float]) -> Terms:
        """Return the ELBO terms with this log-likelihood of every row, and this log prior of each latent by name."""
        kl: dict[str, Tensor] = {}
        scores: dict[str, Score] = {}
        for name in self.latents:
            if name not in self.guide.nodes:  # a batch without this site
                kl[name] = torch.zeros_like(reconstruction)
                continue
            known = self.known_kl(name)
            if (scored := self.is_scored(name)) or known is None:
                log_q = self.log_prob(self.guide.nodes[name])
            if scored:
                scores[name] = self._score(self.guide.nodes[name], log_q, known is None)
                log_q = log_q.detach()
            if name in self.still:
                if known is not None:
                    against = {"reason": "closed", "names": [name], "kind": "stick_the_landing or partially"}
                    raise DeclarationError.of("pair.pathwise.refused", **against)
                score = self.log_prob(self.still[name])
                log_q = log_q - (score - score.detach())
            kl[name] = log_q - log_p(name) if known is None else known
        return Terms(reconstruction, kl, self.penalties(), scores | self.scores_of_factors(), self.closed)

    def is_scored(self, name: str) -> bool:
        """Return True for a latent whose sample has no pathwise gradient."""
        return name in self.layout.scored or name in self.layout.expected

    def _score(self, node: Mapping[str, Any], weighed: Tensor, own_kl: bool) -> Score:
        """Return the score-function term of a site, its baseline read from `infer` as in Pyro's `TraceGraph_ELBO`."""
        infer, scale = node["infer"], plate_scale(node)
        log_q = weighed
        if node["scale"].__class__ is not float or node["scale"] != scale or node["mask"] is not None:  # as in Pyro
            log_q = log_prob({**node, "scale": scale, "mask": None}, self.layout, self.particles)
        told, average = infer.get("baseline", {}), infer.get("average")
        baseline = told.get("baseline_value")
        if "nn_baseline" in told:
            baseline = told["nn_baseline"](told["nn_baseline_input"].detach())
        learns = baseline is not None and baseline.requires_grad
        return Score(log_q, weighed, own_kl, baseline, learns, *([] if average is None else [average.note]))

    def scores_of_factors(self) -> dict[str, Score]:
        """Return the score-function terms of the observed sites of a guide that have no pathwise gradient."""
        found = {name: self.log_prob({**self.guide.nodes[name], "mask": None}) for name in self.unreparametrised()}
        return {name: Score(log_q, log_q, True, None, False) for name, log_q in found.items()}

    def unreparametrised(self) -> list[str]:
        """Return the observed sites of the guide on this batch that have no pathwise gradient."""
        found: dict[str, Any] = {name: self.guide.nodes.get(name) for name in self.layout.factors}
        return [name for name, node in found.items() if node is not None and not node["fn"].has_rsample]

    def penalties(self) -> dict[str, Tensor]:
        """Return the penalties of a guide by name: those in `infer["penalties"]` of a site, and its observed sites.

        An observed site of the guide, such as `pyro.factor`, enters the loss of `Trace_ELBO` as log q, as here, but is
        no part of a bound on log p(x). Without `has_rsample` its gradient is that of a score function, again as there.
        """
        out: dict[str, Tensor] = {}
        for name, node in self.guide.nodes.items():
            infer: Any = node["infer"] if node["type"] == "sample" else {}
            if "penalties" in infer:
                out |= {f"{name.removesuffix('/embedded')}/{what}": v for what, v in infer["penalties"].items()}
        for name in self.layout.factors:
            factor: Any = self.guide.nodes.get(name)
            if factor is not None:
                value = self.log_prob(factor)
                out[name] = value if factor["fn"].has_rsample else value.detach()  # as in Trace_ELBO
        return out


class ExpectedBatch(TracedBatch):
    """Traces of a batch whose enumerated latents c keep their states, with sites scored in expectation under q(c|x)."""

    @cached_property
    def states(self) -> Expectations:
        """Probabilities of the states of the enumerated latents."""
        return Expectations(self.guide, self.layout, self.particles)

    def log_prob(self, node: Mapping[str, Any]) -> Tensor:
        if node["name"] in self.layout.shared:
            return super().log_prob(node)
        value = self.states.mean(log_density(node["fn"], node["value"]), node["mask"], str(node["name"]))
        return self._wide(share({**node, "mask": None}, value, self.layout, self.particles, self.size))

    def known_kl(self, name: str) -> Tensor | None:
        found = super().known_kl(name)
        return found if found is None or name in self.layout.shared else self._wide(self.states.mean(found, None, name))

    def is_scored(self, name: str) -> bool:
        return False

    def _wide(self, value: Tensor) -> Tensor:
        return value.expand(self.particles, -1) if self.particles else value


def terms_of(
    traces: Traces, layout: Layout, particles: int, closed_form: bool, rows: int | None, still: Nodes | None = None
) -> Terms:
    """Return the ELBO terms of a batch from traces of guide and model; `particles` is 0 without a particle plate.

    With discrete sites c that the model sums out they are expectations under p(c | x, z). Their combination is
    log sum_c p(x, z, c) - log q(z | x), except that a relaxed latent with the categorical KL contributes that KL in
    place of log q - log p at its sample. Where c is summed out by elimination, the reconstruction holds log sum_c of
    all factors that depend on c; the KL of a latent whose prior is among them is log q alone.
    """
    model, size = traces[1], full_size(traces[1], layout, rows)
    batch = TracedBatch(*traces, layout, particles, size, closed_form and not layout.enumerated, still or {})
    if not layout.enumerated:
        return batch.terms(batch.observed(), batch.log_p)
    if layout.eliminated:
        total, names = eliminated(model, layout, particles)
        plain = [name for name in layout.observed if name not in names and name in model.nodes]
        observed = [total, *(batch.log_prob(model.nodes[name]) for name in plain)]
        return batch.terms(sum_over(observed), lambda name: 0.0 if name in names else batch.log_p(name))
    table = read_joint_states(samples(model), layout, particles)

    def expected(name: str) -> Tensor | float:
        return table.expected(name) if name in table.logs else batch.log_p(name)

    observed = [part for name in layout.observed if isinstance(part := expected(name), Tensor)]  # else it is absent
    found = batch.terms(sum_over(observed), expected)
    return replace(found, kl={**found.kl, **table.kl()})


def _require_expectations(batch: TracedBatch, summed: Sequence[str]) -> None:
    """Check that the expectation of a batch over the latents `summed` of the guide can be taken.

    Raises:
        DeclarationError: another site needs samples of these latents, or their states cannot be summed over.
    """
    layout = batch.layout
    misdeclared(layout.enumerated, "pair.terms.draws", names=layout.expected, summed=layout.enumerated)
    for name in summed:
        require_expectable(name, batch.guide.nodes[name], layout)
    for name in batch.unreparametrised():
        raise DeclarationError.of("pair.terms.factor", name=name, names=layout.expected)
    for name in [name for name in layout.scored if name in batch.guide.nodes]:
        raise DeclarationError.of("pair.terms.score", name=name, names=layout.expected)


def expected_terms(traces: Traces, layout: Layout, particles: int, closed_form: bool, rows: int | None) -> Terms:
    """Return the ELBO terms in expectation under q(c|x), summed over all joint states c of the enumerated latents.

    In rows where a mask hides c (a label that is known), it has no KL, but is drawn as in other rows: the states are
    weighed by q(c|x) there too.
    """
    summed = [name for name in layout.expected if name in traces[0].nodes]  # a batch may lack some
    if not summed and not layout.enumerated:
        return terms_of(traces, layout, particles, closed_form, rows)
    size = full_size(traces[1], layout, rows)
    batch = ExpectedBatch(*traces, layout, particles, size, closed_form and layout.nesting == 1)
    _require_expectations(batch, summed)
    return replace(batch.terms(batch.observed(), batch.log_p), closed=Terms.closed)
