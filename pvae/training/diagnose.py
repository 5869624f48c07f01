"""Diagnosis of a loss that is NaN or infinite: the first sample site at fault, its rows, the gradient norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pvae.objectives.base import Loss
from pvae.pair.densities import log_prob
from pvae.pair.layout import samples
from pvae.pair.pair import Pair


def bad_weights(module: nn.Module) -> list[str]:
    """Return the names of the parameters of a module that contain NaN or infinity."""
    return [name for name, p in module.named_parameters() if not bool(p.isfinite().all())]


def first_bad_site(pair: Pair, x: Tensor) -> tuple[str, list[int]] | None:
    """Return the first sample site whose log density is not finite, and the indices of its rows in the batch.

    Sites of the guide are checked before those of the model; None if every log density is finite.
    """
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
    """Return the global L2 norm of the gradient of the loss of batch `x` over all trainable parameters."""
    parameters = [p for p in loss.parameters() if p.requires_grad]
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(x)[0], parameters, allow_unused=True)
    return float(torch.stack([g.norm() for g in gradients if g is not None]).norm())


def bad_figures(pair: Pair, names: Sequence[str], out: Tensor) -> str:
    """Describe in one sentence a failed step of an objective without an ELBO: its metrics, or a parameter that is NaN.

    Arguments:
        pair: the pair that is fitted.
        names: names of the step's metrics.
        out: values of the metrics, one for each name.
    """
    if weights := bad_weights(pair):
        return f"weights were already not finite ({weights[0]}): a gradient of an earlier step overflowed"
    figures = dict(zip(names, out.tolist(), strict=True))
    return ", ".join(f"{name} {value:.3g}" for name, value in figures.items())


def diagnose(loss: Loss, again: Callable[[], Tensor], index: Tensor) -> str:
    """Describe in one sentence why a loss is not finite: the bad sample site, its data rows and the gradient norm.

    Arguments:
        loss: objective and pair.
        again: sets the random state back to that of the failed step and returns its batch.
        index: row numbers of the batch in the training data.
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
