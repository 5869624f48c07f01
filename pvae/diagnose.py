"""Where a loss became NaN or infinite: the first bad site, its rows, the gradient norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pvae.pair import Pair
from pvae.traces import log_prob, samples


def bad_weights(module: nn.Module) -> list[str]:
    """Names of parameters that hold NaN or infinity."""
    return [name for name, p in module.named_parameters() if not bool(p.isfinite().all())]


def first_bad_site(pair: Pair, x: Tensor) -> tuple[str, list[int]] | None:
    """The first site, guide first, whose value or log density is not finite, with the rows of the batch."""
    with torch.no_grad():
        guide_trace, model_trace = pair.traces(x)
    for side, trace in (("guide", guide_trace), ("model", model_trace)):
        for name, node in samples(trace).items():
            value = node["value"].detach().reshape(len(node["value"]), -1).sum(-1) * 0.0
            score = log_prob(node, pair.layout, 0).detach() * 0.0
            bad = ~(value.isfinite() & score.isfinite()) if value.shape == score.shape else ~score.isfinite()
            if bool(bad.any()):
                return f"{side}.{name}", bad.nonzero().flatten().tolist()
    return None


def gradient_norm(module: nn.Module, loss: Tensor) -> float:
    """Global norm of the gradient of a loss."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return float(torch.stack([g.norm() for g in gradients if g is not None]).norm())


def diagnose(pair: Pair, x: Tensor, index: Tensor, loss: Tensor) -> str:
    """One sentence for people: what is not finite, and where it came from."""
    weights = bad_weights(pair)
    if weights:
        more = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
        return f"weights were already not finite ({weights[0]}{more}): a gradient of an earlier step overflowed"
    found = first_bad_site(pair, x)
    norm = gradient_norm(pair, loss) if loss.requires_grad else float("nan")
    if found is None:
        return f"every site is finite, the loss is not; gradient norm {norm:.3g}"
    site, rows = found
    data_rows = index[torch.tensor(rows)].tolist()
    shown = ", ".join(str(r) for r in data_rows[:8]) + (" ..." if len(data_rows) > 8 else "")
    return f"first bad site {site}, {len(rows)} of {len(x)} rows (data rows {shown}); gradient norm {norm:.3g}"
