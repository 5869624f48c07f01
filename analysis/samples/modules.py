"""Decoder and encoder of a fitted pair as plain Modules of tensors, on which no Pyro handler acts."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, cast

import torch
from pyro.distributions import Categorical
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pvae.analysis.figures.estimate import misdeclared, refuse, text
from pvae.analysis.samples import running
from pvae.component import Shape
from pvae.distributions.relaxed import twin
from pvae.graph.frame import Entry
from pvae.graph.site import OBSERVED
from pvae.pair import Pair, unwrapped


class PlainModule(nn.Module):
    """Base of the plain Modules of a declared pair: they take tensors, and hold the weights of the pair, not copies.

    Data are as the model has them: those of a table are its transformed columns, NaN where missing. Numbers are taken
    in the type of the weights. Codes, labels and the tokens of prompts are whole numbers, bits 0 and 1.

    Raises:
        DeclarationError: the pair is hand-written.
    """

    inputs: dict[str, tuple[Shape, int]]
    """Event shape of every input by name, and the number of values of an element; 0 for real numbers and bits."""
    outputs: tuple[str, ...]
    """Names of the variables that the Module gives: a tensor if it is one, a dictionary of them if there are several.
    """

    def __init__(self, pair: Pair, side: str) -> None:
        super().__init__()
        misdeclared(not pair.declared, "refused.by_hand", side=side)
        self.side, self.frame = side, pair.frame
        self.covariates = {name: (entry.shape, entry.codes) for name, entry in self.frame.covariates.items()}

    @property
    def alone(self) -> str | None:
        """Name of the input that may be given without its name: the only one beside covariates; None if several."""
        own = [name for name in self.inputs if name not in self.covariates]
        return own[0] if len(own) == 1 else None

    @property
    def expected(self) -> str:
        """Inputs as text: names, shapes and, of codes and covariates, the values."""
        return text("modules.inputs", inputs=self.inputs)

    def example(self, rows: int) -> dict[str, Tensor]:
        """Return zeros of every input by name, `rows` of each."""
        like, long = next(self.parameters()), torch.long
        return {n: like.new_zeros(rows, *shape, dtype=long if k else None) for n, (shape, k) in self.inputs.items()}

    def named(self, first: Tensor | None, others: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the inputs by name, and the covariates as networks read them; raise DataError for other inputs."""
        given = dict(others) if first is None else {self.alone or "one tensor": first, **others}
        problem = "" if given.keys() == self.inputs.keys() else ", ".join(given) or "nothing"
        for name, (shape, count) in self.inputs.items() if not problem else ():
            value = given[name]
            checked = (count or name in self.covariates) and not torch.compiler.is_exporting()
            if not value.dim() or value.shape[1:] != shape or (count and value.is_floating_point()):
                problem = f"{name} {list(value.shape)} of {value.dtype}"
            elif checked and bool(self.frame.covariates.get(name, Entry(count)).wrong(value).any()):
                problem = f"{name} from {int(value.min())} to {int(value.max())}"
            given[name] = value if count else value.to(next(self.parameters()))
        refuse(problem, f"{self.side}: expected {self.expected}; got {problem}.")
        codes = {name: t for name, t in given.items() if name in self.covariates}
        return given, self.frame.features(codes, next(self.parameters()))

    @abstractmethod
    def distributions(self, given: Mapping[str, Tensor], seen: dict[str, Tensor]) -> dict[str, Any]:
        """Return the distributions of the outputs by name, for the inputs, and the covariates as networks read them."""

    @abstractmethod
    def centre(self, fn: Any) -> Tensor:
        """Return the value that stands for a distribution, `(n, *event)`."""

    def distribution(self, first: Tensor | None = None, /, **others: Tensor) -> Any:
        """Return p(x | z), or q(z | x), of batch shape `(n,)`; a dictionary by name of several latents.

        In a hierarchy each latent is given the means of those before it. For relaxed codes it is the distribution of
        the codes; for a code that the model sums out, p(c | x) by Bayes' rule. The arguments are those of `forward`.
        """
        found = self.distributions(*self.named(first, others))
        return found if len(found) > 1 else found[self.outputs[0]]

    def forward(self, first: Tensor | None = None, /, **others: Tensor) -> Any:
        """Return E[x | z], or the mean of q(z | x), `(n, *event)`; a dictionary by name of several latents; exact.

        An encoder gives the most probable codes and bits. In a hierarchy the means are passed down: each is given those
        of the latents before it.

        Arguments:
            first: the input, if it is one beside covariates, `(n, *event)`.
            others: several inputs by name, and covariates: labels `(n,)`, tokens of a prompt `(n, length)`.

        Raises:
            DataError: names, shapes or codes are not those expected, which the message lists.
            DeclarationError: a distribution has no known mean.
        """
        found = {name: self.centre(fn) for name, fn in self.distributions(*self.named(first, others)).items()}
        return found if len(found) > 1 else found[self.outputs[0]]


class PlainDecoder(PlainModule):
    """Decoder p(x | z) of a declared pair as a Module of tensors.

    Example:
        >>> from pvae.experiment.experiment import Experiment
        >>> decoder = PlainDecoder(Experiment.load("conditional").build((1, 8, 8)))
        >>> decoder(torch.zeros(3, 16), y=torch.tensor([0, 5, 9])).shape
        torch.Size([3, 1, 8, 8])
    """

    outputs = (OBSERVED,)
    centre = staticmethod(running.distribution_mean)

    def __init__(self, pair: Pair) -> None:
        super().__init__(pair, "decoder")
        model = cast(Any, pair.model)
        reads = {*model.decoder.network.inputs, *model.decoder.conditions}
        self.see, self.sites = model.see, [site for site in model.sites if site.name in reads]
        codes = {s.name: (s.space.shape, s.space.states) for s in self.sites if s.space.is_code and s.has_twin}
        values = {s.name: (s.event, 0) for s in self.sites}  # of relaxed values without codes, logarithms
        self.inputs = values | codes | {name: v for name, v in self.covariates.items() if name in reads}
        self.decoder = model.decoder
        self.codebooks = nn.ModuleDict({name: book for name, book in model.codebooks.items() if name in reads})
        self.eval()

    def distributions(self, given: Mapping[str, Tensor], seen: dict[str, Tensor]) -> dict[str, Any]:
        values = {site.name: self.see(site, given[site.name], next(self.parameters())) for site in self.sites}
        return {OBSERVED: self.decoder({**seen, **values})}


class Reads(TorchFunctionMode):
    """Context that notes the tensors which torch's functions are called with, by `id`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.update(map(id, tree_leaves((args, kwargs))))
        return func(*args, **(kwargs or {}))


class PlainEncoder(PlainModule):
    """Encoder q(z | x) of a declared pair as a Module of tensors.

    It holds the guide, and what the guide reads of the model, such as codebooks.

    Raises:
        DeclarationError: the pair is hand-written, or its guide infers nothing (a GAN).

    Example:
        >>> from pvae.experiment.experiment import Experiment
        >>> encoder = PlainEncoder(Experiment.load("hvae").build((1, 8, 8)))
        >>> {name: list(mean.shape) for name, mean in encoder(torch.zeros(3, 1, 8, 8)).items()}
        {'z2': [3, 8], 'z1': [3, 16]}
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__(pair, "encoder")
        misdeclared(pair.implicit, "run.encoder: expected a guide that infers z; got that of a GAN, which infers none.")
        self.guide = cast(Any, pair.guide)
        model, sites = self.guide.link.model, self.guide.sites
        self.summed = [site for site in model.sites if site.summed]
        self.outputs = tuple(site.name for site in (*sites, *self.summed))
        reads = {name for site in sites for name in site.guide_given}.union(self.covariates if self.summed else ())
        self.inputs = {OBSERVED: (self.frame.x, 0)} | {n: v for n, v in self.covariates.items() if n in reads}
        parts = {"decoder": model.decoder}
        for kind in ("priors", "codebooks", "temperatures"):
            parts |= {f"{kind}_{name}": part for name, part in getattr(model, kind).items()}
        self.model = nn.ModuleDict(parts)
        self.eval()
        with Reads() as reading, torch.no_grad():
            self.distribution(**self.example(1))
        for name, part in parts.items():
            if reading.found.isdisjoint(map(id, (*part.parameters(), *part.buffers()))):
                del self.model[name]

    def distributions(self, given: Mapping[str, Tensor], seen: dict[str, Tensor]) -> dict[str, Any]:
        x, model = given[OBSERVED], self.guide.link.model
        latents = self.guide.along(x, seen, self.centre)
        found = {site.name: twin(fn) for site, fn in zip(self.guide.sites, latents, strict=False)}  # not the last mean
        if self.summed:
            misdeclared(len(self.summed) > 1 or self.summed[0].space.grid, "refused.several_codes")
            values = {name: self.centre(fn) for name, fn in found.items()}
            values[self.outputs[-1]] = torch.arange(self.summed[0].space.states, device=x.device)[:, None]
            seen |= {site.name: model.see(site, values[site.name], x) for site in model.sites}
            scores = [model.prior(name, seen).log_prob(value) for name, value in values.items()]
            found[self.outputs[-1]] = Categorical(logits=sum(scores, model.decoder(seen).log_prob(x)).T)
        return found

    def centre(self, fn: Any) -> Tensor:
        misdeclared((found := running.centre(twin(fn))) is None, "refused.meanless", kind=type(unwrapped(fn)).__name__)
        return cast(Tensor, found)
