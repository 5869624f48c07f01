"""Where a loss became NaN or infinite: the first bad site, its rows, the gradient norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pvae.objectives.base import Loss
from pvae.pair.densities import log_prob
from pvae.pair.layout import samples
from pvae.pair.pair import Pair


def bad_weights(module: nn.Module) -> list[str]:
    """Names of parameters that hold NaN or infinity."""
    return [name for name, p in module.named_parameters() if not bool(p.isfinite().all())]


def first_bad_site(pair: Pair, x: Tensor) -> tuple[str, list[int]] | None:
    """The first site, guide first, whose log density is not finite, with the rows of the batch."""
    with torch.no_grad():
        guide_trace, model_trace = pair.traces(x)
    for side, trace in (("guide", guide_trace), ("model", model_trace)):
        for name, node in samples(trace).items():
            bad = ~log_prob(node, pair.layout, 0).isfinite()
            bad = bad.flatten(0, -2).any(0) if bad.dim() > 1 else bad  # of sums, in any state
            if bool(bad.any()):
                return f"{side}.{name}", bad.nonzero().flatten().tolist()
    return None


def gradient_norm(loss: Loss, x: Tensor) -> float:
    """Global norm of the gradient of a batch's loss."""
    parameters = [p for p in loss.parameters() if p.requires_grad]
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(x)[0], parameters, allow_unused=True)
    return float(torch.stack([g.norm() for g in gradients if g is not None]).norm())


def bad_figures(pair: Pair, names: Sequence[str], out: Tensor) -> str:
    """One sentence for people, where a step has no ELBO whose sites could be asked: what is not finite.

    Arguments:
        pair: what is fitted.
        names: of the step's figures.
        out: the figures themselves.
    """
    if weights := bad_weights(pair):
        return f"weights were already not finite ({weights[0]}): a gradient of an earlier step overflowed"
    figures = dict(zip(names, out.tolist(), strict=True))
    return ", ".join(f"{name} {value:.3g}" for name, value in figures.items())


def diagnose(loss: Loss, again: Callable[[], Tensor], index: Tensor) -> str:
    """One sentence for people: what is not finite, and where it came from.

    Arguments:
        loss: objective and pair.
        again: gives the failed batch, with the random state as it was when the step drew it.
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
