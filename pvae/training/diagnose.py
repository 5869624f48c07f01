"""Diagnosis of a loss that is NaN or infinite: the first bad site, its rows, the gradient norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pvae.objectives.base import Loss
from pvae.pair.densities import log_prob
from pvae.pair.layout import samples
from pvae.pair.pair import Pair


def bad_weights(module: nn.Module) -> list[str]:
    """Return the names of parameters that hold NaN or infinity."""
    return [name for name, p in module.named_parameters() if not bool(p.isfinite().all())]


def first_bad_site(pair: Pair, x: Tensor) -> tuple[str, list[int]] | None:
    """Return the first site, guide first, whose log density is not finite, with the rows of the batch."""
    with torch.no_grad():
        guide_trace, model_trace = pair.traces(x)
    for side, trace in (("guide", guide_trace), ("model", model_trace)):
        for name, node in samples(trace).items():
            bad = ~log_prob(node, pair.layout, 0).isfinite()
            bad = bad.flatten(0, -2).any(0) if bad.dim() > 1 else bad  # in any state of a sum
            if bool(bad.any()):
                return f"{side}.{name}", bad.nonzero().flatten().tolist()
    return None


def gradient_norm(loss: Loss, x: Tensor) -> float:
    """Return the global norm of the gradient of a batch's loss."""
    parameters = [p for p in loss.parameters() if p.requires_grad]
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(x)[0], parameters, allow_unused=True)
    return float(torch.stack([g.norm() for g in gradients if g is not None]).norm())


def bad_figures(pair: Pair, names: Sequence[str], out: Tensor) -> str:
    """Describe in a sentence the figures of a step without an ELBO that are not finite.

    Arguments:
        pair: the pair that is fitted.
        names: names of the step's figures.
        out: the figures.
    """
    if weights := bad_weights(pair):
        return f"weights were already not finite ({weights[0]}): a gradient of an earlier step overflowed"
    figures = dict(zip(names, out.tolist(), strict=True))
    return ", ".join(f"{name} {value:.3g}" for name, value in figures.items())


def diagnose(loss: Loss, again: Callable[[], Tensor], index: Tensor) -> str:
    """Describe in a sentence the site, the data rows and the gradient norm of a loss that is not finite.

    Arguments:
        loss: objective and pair.
        again: returns the failed batch, after setting the random state to that of the step.
        index: its rows in the data.
    """
    weights = bad_weights(loss.pair)
    if weights:
        more = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
        return f"weights were already not finite ({weights[0]}{more}): a gradient of an earlier step overflowed"
    norm = gradient_norm(loss, again())
    found = first_bad_site(loss.pair, again())
    if found is None:
        return f"every site is finite; gradient norm {norm:.3g}"
    site, rows = found
    data_rows = index[torch.tensor(rows)].tolist()
    shown = ", ".join(str(r) for r in data_rows[:8]) + (" ..." if len(data_rows) > 8 else "")
    return f"first bad site {site}, {len(rows)} of {len(index)} rows (data rows {shown}); gradient norm {norm:.3g}"
