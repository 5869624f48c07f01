"""Second stages: new priors fitted to the aggregated posterior of a finished run, with everything else frozen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pvae.errors import DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.experiment.plan import Plan
from pvae.objectives.elbo import TraceELBO
from pvae.runs.export.exporting import require
from pvae.runs.run import Run, attended, load_weights
from pvae.training.launch import launch, pick_device
from pvae.util.toml import flat

NOT_FROZEN = re.compile(r"latents\.\w+\.prior(\.|$)|train\.|objective\.|analysis\.|refit|(name|description|seed)$")


def refit(
    run: Run | str | Path,
    *overrides: str,
    root: str | Path = "runs",
    run_dir: str | Path | None = None,
    data_dir: str | Path | None = None,
    device: str = "auto",
    export: Sequence[str] = (),
    progress: bool = True,
) -> Run:
    """Freeze a fitted pair of model and guide and fit new priors to its aggregated posterior by maximum likelihood.

    With the guide fixed, the marginal KL of the run's ELBO surgery, in nats per datum, is the largest improvement of
    the ELBO that new priors can give; `pvae.analysis.gain` measures the improvement reached. For an autoencoder this
    makes a model that can be sampled.

    Arguments:
        run: a finished `Run`, its folder, its name, or "latest".
        overrides: the new priors, `"latents.z.prior.kind=realnvp"`, and how to train them, `"train.epochs=50"`;
            nothing else may change. Training settings that are not overridden are those of the run.
        root: folder in which runs are looked up by name.
        run_dir: folder of the new run's directory; default: that of the old run.
        data_dir: folder that is searched first for data files.
        device: as in `fit`.
        export: as in `fit`.
        progress: as in `fit`.

    Returns:
        The new run, with the weights of the whole pair; its manifest names the old run as the parent.

    Raises:
        DeclarationError: no prior changes, or something else does.
        CheckpointError: the run has no checkpoint.

    References:
        ELBO surgery (Hoffman, Johnson, 2016), http://approximateinference.org/accepted/HoffmanJohnson2016.pdf

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import pvae
        >>> runs = TemporaryDirectory()
        >>> few = "data.splits.train=[0, 200]"
        >>> run = pvae.fit("vae", few, "train.epochs=1", run_dir=runs.name, progress=False)
        >>> mixture = "latents.z.prior={kind='mixture', components=5}"
        >>> second = pvae.refit(run, mixture, progress=False)
        >>> second.experiment.latents["z"].prior.kind, second.files.manifest["parent"]["run"] == f"vae/{run.path.name}"
        ('mixture', True)
        >>> runs.cleanup()
    """
    kinds = require(export)
    if not isinstance(run, Run):
        run = Run.load(run, root=root, data_dir=data_dir)
    stage = stage_of(run.experiment, run.experiment.with_overrides(*overrides))
    return fit_stage(run, stage, Path(run_dir) if run_dir else run.path.parent.parent, device, progress, export=kinds)


def stage_of(old: Experiment, changed: Experiment) -> Experiment:
    """Return the declaration of a second stage of `old`: priors and training of `changed`, the plain ELBO as objective.

    Raises:
        DeclarationError: no prior changes, or something else does.
    """
    if not old.objective.scores:
        raise DeclarationError(
            f"refit: expected a run with an encoder, whose codes a prior can be fitted to; got one of the objective "
            f"{old.objective.kind}."  # type: ignore[attr-defined]
        )
    if changed.objective != old.objective:
        raise DeclarationError("refit: expected no other objective; got one. Priors are fitted by the plain ELBO.")
    name = f"{old.name}_refit" if changed.name == old.name else changed.name
    train = {**changed.train.model_dump(exclude_none=True, exclude_unset=True), "alternate": 0}
    stage = changed.with_changes({"name": name, "refit": None, "objective": TraceELBO(), "train": train})
    _refitted(old, stage)
    return stage


def changed_keys(old: Plan, new: Plan) -> dict[str, str]:
    """Return a message line for every value that differs between two declarations, by its dotted key."""
    was, now = flat(old.model_dump()), flat(new.model_dump())
    lines = {key: f"{key} = {was.get(key)!r}; got {now.get(key)!r}." for key in sorted({*was, *now})}
    return {key: line for key, line in lines.items() if was.get(key) != now.get(key)}


def _refitted(first: Experiment, stage: Experiment) -> list[str]:
    """Return the names of the latents whose priors a second stage replaces.

    Raises DeclarationError if the stage changes anything but priors, training settings, name and seed.
    """
    frozen = [line for key, line in changed_keys(first, stage).items() if not NOT_FROZEN.match(key)]
    if frozen:
        raise DeclarationError(
            [f"refit: expected the run's own {line} Only priors are fitted anew." for line in frozen]
        )
    if stage.seed != first.seed and getattr(stage.data, "data_seed", 0) == "experiment":
        raise DeclarationError(f"refit: expected the run's own seed, which its data follow; got {stage.seed}.")
    return first.refitted(stage)


def fit_stage(
    run: Run, stage: Experiment, run_dir: Path, device: str, progress: bool, *, export: Sequence[str] = ()
) -> Run:
    """Fit the second stage of a finished run, with all but its new priors frozen, in a new run directory.

    Arguments as in `refit`, but for the stage's declaration.
    """
    names = _refitted(run.experiment, stage)
    pair = attended(stage.build(run.data.shape), run.data.train)
    trainable = tuple(f"model.priors.{name}." for name in names)
    weights = {k: v for k, v in run.pair.state_dict().items() if not k.startswith(trainable)}
    fresh = {k: v for k, v in pair.state_dict().items() if k.startswith(trainable)}
    load_weights(pair, {**weights, **fresh}, str(run.path))
    parent = parent_of(run)
    return launch(
        stage, pair, run.data, run_dir, pick_device(device),
        parent=parent, trainable=trainable, export=export, progress=progress,
    )  # fmt: skip


def parent_of(run: Run) -> dict[str, Any]:
    """Return the manifest entry that names the first run of a second stage: `run` (`name/id`) and its last `epoch`."""
    return {"run": f"{run.path.parent.name}/{run.path.name}", "epoch": run.status.get("epoch")}
