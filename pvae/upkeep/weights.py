"""Checks of a checkpoint's content: tensor names, shapes, finite values, and the validation metrics of its weights."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from pvae.errors import CheckpointError, text
from pvae.pair.pair import Pair
from pvae.runs import checkpoint
from pvae.runs.run import Run
from pvae.runs.weights import chosen, load_weights
from pvae.training import evaluation, recovery, trainer
from pvae.util.checks import Check
from pvae.util.provenance import surroundings

ELBO_TOLERANCE = 1e-4
"""Largest accepted difference of a recomputed validation metric, relative to the larger of its size and 1 nat; other
numbers of threads, builds of torch and processors add numbers in another order."""
LISTED_TENSORS = 20
"""Largest number of tensors with values that are not finite that a check lists by name."""


def unsound(saved: checkpoint.Checkpoint, pair: Pair | None) -> Iterator[str]:
    """Yield the faults of a checkpoint whose checksums match: names, shapes, values that are not finite, the state."""
    if (weights := saved.tensors.get("weights")) is None:
        yield f"expected a group of weights; got {', '.join(saved.tensors) or 'none'}"
        return
    groups: dict[str, Any] = {name: (weights, pair) for name in ("weights", "best", "average") if name in saved.tensors}
    for group in (*groups, "optimizer"):
        first, own = groups.get(group, ({}, None))
        try:
            bad = _not_finite(group, {**first, **saved.tensors.get(group, {})}, own)
            yield from (f"{group}: {name} is not finite" for name in bad[:LISTED_TENSORS])
        except CheckpointError as problem:
            yield str(problem)
    for validated in (chosen, trainer.State.of):
        try:
            validated(saved)
        except (CheckpointError, ValueError) as problem:
            yield str(problem)


def _not_finite(group: str, tensors: Mapping[str, torch.Tensor], pair: Pair | None) -> list[str]:
    """Return the names of tensors with values that are not finite; if a pair is given, load them and check only it."""
    if pair is None:
        floating = {name: value for name, value in tensors.items() if value.is_floating_point()}
        return [name for name, value in floating.items() if not bool(value.double().isfinite().all())]
    load_weights(pair, tensors, group)
    return recovery.bad_weights(pair)


def elbo(run: Run, saved: checkpoint.Checkpoint | None) -> Iterator[Check]:
    """Yield a check that recomputes the recorded validation metrics, such as the ELBO, from a checkpoint's weights."""
    device = str(run.files.manifest.get("device", "cpu"))
    if saved is None:
        yield Check("elbo", "ok", "not computed: there are no weights")
    elif device.startswith("cuda") and not torch.cuda.is_available():
        yield Check("elbo", "ok", "not computed: the fit was on a GPU, whose random numbers a CPU does not make")
    elif (recorded := _recorded(run.files.metrics_rows(), saved)) is None:
        yield Check("elbo", "ok", "not computed: no validation was recorded of these weights")
    else:
        found = _compare(run, device, recorded, _measure(run, saved, device))
        # earlier versions recorded KLs of one sample
        earlier = found if found.level == "ok" else _compare(run, device, recorded, _measure(run, saved, device, ()))
        yield found if earlier.level == "failed" else earlier


def _measure(run: Run, saved: checkpoint.Checkpoint, device: str, closed: Any = None) -> dict[str, float]:
    plan, pair = run.plan, run.fresh_pair()
    pair = pair.to(torch.device(device), plan.objective.dtype).eval()
    load_weights(pair, chosen(saved), str(saved.path))
    data = run.data.to(device)
    x, fitted = data.validation.rows, len(data.train)
    return plan.objective.measure(pair, x, plan.seed) or evaluation.evaluate(pair, x, plan.seed, fitted, closed)


def _compare(run: Run, device: str, recorded: Mapping[str, Any], measured: Mapping[str, float]) -> Check:
    names = [name for name in measured if isinstance(recorded.get(name), float)]
    off = {name: abs(measured[name] - recorded[name]) for name in names}
    wrong = [name for name in names if not off[name] <= ELBO_TOLERANCE * max(1.0, abs(recorded[name]))]
    facts = {name: {"recorded": recorded[name], "computed": measured[name]} for name in names}
    if wrong:
        found = ", ".join(f"{name} {recorded[name]:.6f} recorded, {measured[name]:.6f} computed" for name in wrong)
        return Check("elbo", "failed", found, text("upkeep.weights.other"), facts)
    largest = max(off.values(), default=0.0)
    apart = {"off": largest, "most": ELBO_TOLERANCE, "why": _differences(run, device) if largest else ""}
    return Check("elbo", "ok", text("upkeep.weights.same", names=names, recorded=recorded, **apart), facts=facts)


def _differences(run: Run, device: str) -> str:
    """Return a description of the differences (host, threads, versions) between the fit's machine and this one."""
    there, here = run.files.manifest, {**surroundings(), "threads": torch.get_num_threads()}
    keys = [key for key in ("host", "threads", "versions") if there.get(key) != here[key]]
    return f"other {' and '.join(keys)}" if keys else f"same host, threads and versions ({device})"


def _recorded(rows: Iterable[Mapping[str, Any]], saved: checkpoint.Checkpoint) -> Mapping[str, Any] | None:
    """Return the recorded validation metrics of the selected weights: those of the best epoch, or of the last step."""
    best = saved.state.get("select") == "best"
    key, value = ("epoch", saved.state.get("best_epoch")) if best else ("step", saved.step)
    found = [row for row in rows if row.get("split") == "validation" and row.get(key) == value]
    return found[-1] if found else None
