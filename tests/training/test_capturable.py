"""What a CUDA graph cannot hold, found without a GPU: copies from the host, and values that are read back.

A step on torch's `meta` device computes shapes alone. To read a value there is an error of torch's own; a copy from the
host is refused here, as a capture refuses it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pvae.data import load
from pvae.experiment import zoo
from pvae.experiment.experiment import Experiment
from pvae.graph.lifecycle import Moving
from pvae.objectives.base import Loss
from pvae.runs.weights import attended

FROM_NUMBERS = (Tensor.new_tensor, torch.tensor, torch.as_tensor)
"""What makes a tensor on the host and moves it; on `meta` nothing would be seen of it."""
READ_BACK = {"flow": "nonzero", "relaxed_flow_prior": "nonzero", "spline_prior": "nonzero"}
"""Systems that go on eagerly on a GPU: Pyro's splines pick elements by a mask."""


class NoNumbers(TorchFunctionMode):
    """Refuses tensors that are made of numbers of the host, but for those that stay there."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in FROM_NUMBERS and made.is_meta:
            raise AssertionError(f"{func.__name__} copies from the host: {args[-1]}")
        return made


class NoCopies(TorchDispatchMode):
    """Refuses operations between devices."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        seen = [leaf for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, Tensor)]
        copies = "copy" in func.__name__
        devices = {tensor.device.type for tensor in seen if copies or tensor.dim()}
        if len(devices) > 1:
            raise AssertionError(f"{func} goes between {' and '.join(sorted(devices))}")
        return made


def one_step(experiment: Experiment) -> Tensor:
    """Loss and gradient of a batch on `meta`; the figures."""
    data = experiment.conditioned(load(experiment.data))
    pair = attended(experiment.build(data.shape), lambda: data.train).to("meta")
    loss = Loss(experiment.objective, pair, len(data.train), experiment.train.precision).to("meta")
    x = torch.empty_like(data.train.rows[:100], device="meta")
    with pyro.validation_enabled(False), NoNumbers(), NoCopies():
        value, out = loss(x)
        if value.requires_grad:  # not where counts move the weights (`em`)
            value.backward()
        for part in pair.modules():
            if isinstance(part, Moving):
                part.after_step()
    return out


@pytest.mark.parametrize("name", [name for name in zoo.names() if name != "gan"])  # its steps are eager
def test_a_step_stays_on_its_device(name: str) -> None:
    experiment = Experiment.load(name)
    if name in READ_BACK:
        with pytest.raises(NotImplementedError, match=READ_BACK[name]):
            one_step(experiment)
    else:
        assert one_step(experiment).is_meta


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("vae", ["train.precision='bfloat16'"]),
        ("vae", ["objective.particles=3"]),
        ("vae", ["objective={kind='iwae', particles=4}"]),
        ("vae", ["objective={kind='trace_mean_field_elbo', free_bits=0.1}"]),
        ("vae", ["latents.z.prior={kind='iaf', layers=2}"]),
        ("vae", ["latents.z.prior={kind='neural_autoregressive'}"]),
        ("vae", ["latents.z.prior={kind='block_autoregressive'}"]),
        ("vae", ["latents.z.posterior={kind='full_rank_normal'}"]),
        ("bernoulli_vae", ["objective={kind='iwae'}", "latents.b.posterior.baseline=average"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_other_kinds_stay_on_their_device(name: str, overrides: list[str]) -> None:
    one_step(Experiment.load(name, overrides))


def test_copies_and_reads_are_refused() -> None:
    on_meta = torch.empty(3, device="meta")
    with pytest.raises(AssertionError, match="new_tensor copies from the host"), NoNumbers():
        on_meta.new_tensor(2.0)
    with pytest.raises(AssertionError, match="goes between cpu and meta"), NoCopies():
        torch.ones(()).to("meta")
    with pytest.raises(RuntimeError, match="meta"), NoCopies():
        on_meta.sum().item()
