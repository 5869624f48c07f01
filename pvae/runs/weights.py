"""Weights of a checkpoint, compared with those of the pair that they are copied into."""

from collections.abc import Callable, Mapping

import torch

from pvae.data.split import Split
from pvae.errors import CheckpointError, DataError, instead, refuse
from pvae.pair.pair import Pair
from pvae.runs import checkpoint

Tensors = Mapping[str, torch.Tensor]
LISTED_DIFFERENCES = 12
"""Largest number of differences between a checkpoint and a declaration that an error message lists."""


def load_weights(module: torch.nn.Module, tensors: Tensors, origin: str, dtype: torch.dtype | None = None) -> None:
    """Copy named weights into a module whose state_dict has the same names, shapes and dtypes.

    `dtype` is that of floating-point weights which were trained in another one than the module's.

    Raises:
        CheckpointError: names, shapes or dtypes differ; the message lists the differences after `origin`.
    """
    require_same(module.state_dict(), tensors, origin, dtype)
    module.load_state_dict(dict(tensors))


def require_same(own: Tensors, tensors: Tensors, origin: str, dtype: torch.dtype | None = None) -> None:
    """Raise CheckpointError unless named tensors have the names, shapes and dtypes of others; see `load_weights`."""
    lines = [f"{name}: expected by the declaration; not in the checkpoint" for name in own if name not in tensors]
    lines += [f"{name}: in the checkpoint; not in the declaration" for name in tensors if name not in own]
    for name in own.keys() & tensors.keys():
        wanted, found = own[name], tensors[name]
        kind = dtype if dtype and wanted.is_floating_point() else wanted.dtype
        if wanted.shape != found.shape:
            lines.append(f"{name}: expected shape {list(wanted.shape)}; got {list(found.shape)}")
        elif found.dtype != kind:
            lines.append(f"{name}: expected {kind}; got {found.dtype}")
    refuse(lines, "runs.weights.other", CheckpointError, origin=origin, lines=sorted(lines), most=LISTED_DIFFERENCES)


def attended(pair: Pair, train: Callable[[], Split]) -> Pair:
    """Return the model/guide pair after parts that depend on data, such as an exemplar prior, got the training data.

    Other pairs need no data.

    Raises:
        DataError: the training data cannot be read.
    """
    if not pair.made_of_data():
        return pair
    with instead(DataError, "{problem} A part of the model is made of them, such as an exemplar prior."):
        return pair.attend(train().data)


def chosen(saved: checkpoint.Checkpoint) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint that its fit selected: the best, the averaged, or the last weights.

    Raises:
        CheckpointError: the checkpoint contains no weights, or not those that its state selects.
    """
    refuse("weights" not in saved.tensors, "runs.weights.none", CheckpointError, saved=saved)
    if (select := saved.state.get("select", "weights")) not in [*{"weights", "average", "best"} & saved.tensors.keys()]:
        raise CheckpointError(f"{saved.path / 'state.json'}: expected 'select' to name weights; got {select!r}.")
    return {**saved.tensors["weights"], **saved.tensors[select]}
