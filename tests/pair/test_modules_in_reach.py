"""Modules of hand-written programs, wherever they are: in evaluation mode in analyses, in training mode afterwards."""

import builtins
import functools
import types
from collections.abc import Callable
from typing import Annotated, Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.nn import PyroModule
from torch import Tensor, nn

from pvae import analysis
from pvae.pair.pair import Pair
from pvae.pair.running import modules_within
from tests.programs.program import normal

Program = Callable[[Tensor], Any]


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def net() -> nn.Sequential:
    """Both kinds of layers that behave in another way in training."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Dropout(0.7), nn.Linear(8, 1))


def guide_with(layers: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(2 * layers(x[:, None])[:, 0], 0.7))


GLOBAL: list[nn.Module] = []
SPACE = types.SimpleNamespace(layers=None)
TABLE: dict[str, nn.Module] = {}


def by_partial(layers: nn.Module) -> Program:
    return functools.partial(guide_with, layers)


def by_keyword_of_partial(layers: nn.Module) -> Program:
    return functools.partial(lambda x, layers: guide_with(layers, x), layers=layers)


def by_default_argument(layers: nn.Module) -> Program:
    def guide(x: Tensor, layers: nn.Module = layers) -> None:
        guide_with(layers, x)

    return guide


def by_handlers(layers: nn.Module) -> Program:
    return poutine.block(poutine.scale(functools.partial(guide_with, layers), scale=0.5), hide=["nothing"])


def by_enumeration(layers: nn.Module) -> Program:
    return config_enumerate(lambda x: guide_with(layers, x))


def by_plain_object(layers: nn.Module) -> Program:
    class Holder:
        def __init__(self) -> None:
            self.inner = types.SimpleNamespace(layers=[layers])

        def guide(self, x: Tensor) -> None:
            guide_with(self.inner.layers[0], x)

    return Holder().guide


def by_callable_object(layers: nn.Module) -> Program:
    class Holder:
        __slots__ = ("layers",)

        def __call__(self, x: Tensor) -> None:
            guide_with(self.layers, x)

    holder = Holder()
    holder.layers = layers
    return holder


def by_dictionary(layers: nn.Module) -> Program:
    table = {"first": {"second": layers}}
    return lambda x: guide_with(table["first"]["second"], x)


def by_global(layers: nn.Module) -> Program:
    GLOBAL[:] = [layers]
    return lambda x: guide_with(GLOBAL[0], x)


def by_global_object(layers: nn.Module) -> Program:
    SPACE.layers = layers
    return lambda x: guide_with(SPACE.layers, x)


def by_class_attribute(layers: nn.Module) -> Program:
    class Holder:
        kept = layers

        def guide(self, x: Tensor) -> None:
            guide_with(type(self).kept, x)

    return Holder().guide


def by_class_method(layers: nn.Module) -> Program:
    class Holder:
        kept = layers

        @classmethod
        def guide(cls, x: Tensor) -> None:
            guide_with(cls.kept, x)

    return Holder.guide


def by_bound_forward(layers: nn.Module) -> Program:
    forward = layers.forward
    return lambda x: guide_with(forward, x)


def by_generator_closure(layers: nn.Module) -> Program:
    def make() -> nn.Module:
        return layers

    return lambda x: guide_with(make(), x)


def by_module_of_modules(layers: nn.Module) -> Program:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"encoder": nn.ModuleList([layers])})

        def guide(self, x: Tensor) -> None:
            pyro.module("whole", self)
            guide_with(self.parts["encoder"][0], x)

    return Whole().guide


def by_pyro_module(layers: nn.Module) -> Program:
    class Whole(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> None:
            guide_with(self.layers, x)

    return Whole()


def by_unregistered_part(layers: nn.Module) -> Program:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = (layers,)

        def guide(self, x: Tensor) -> None:
            guide_with(self.hidden[0], x)

    return Whole().guide


def by_wrapper(layers: nn.Module) -> Program:
    def guide(x: Tensor) -> None:
        guide_with(layers, x)

    @functools.wraps(guide)
    def logged(x: Tensor) -> None:
        guide(x)

    return logged


def by_pyro_module_call(layers: nn.Module) -> Program:
    """Made in the program itself, from the store, as `pyro.module` allows."""
    return lambda x: guide_with(pyro.module("layers", layers), x)


WAYS = [f for name, f in globals().items() if name.startswith("by_")]


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__[3:])
def test_a_module_is_at_rest_in_analyses_and_in_training_mode_afterwards(way):
    layers, x = net(), 1.4 * normal(30)
    program = way(layers)
    layers[2].eval()  # one part was at rest before: it stays so
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    pair = Pair(model=model, guide=program)
    figures = [analysis.surgery(pair, x, samples=3).elbo.value, analysis.evidence(pair, x, samples=20).iwae.value]
    analysis.gap(pair, x[:4], steps=2, samples=5)
    pair.check(x)
    modes = [part.training for part in layers]
    assert modes == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())
    still = net().eval()
    other = Pair(model=model, guide=lambda x: guide_with(still, x))
    assert figures[0] == pytest.approx(analysis.surgery(other, x, samples=3).elbo.value, abs=1e-5)
    assert figures[1] == pytest.approx(analysis.evidence(other, x, samples=20).iwae.value, abs=1e-5)
    pyro.clear_param_store()


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__[3:])
def test_the_parameters_of_a_module_are_the_pairs_if_pyro_module_registers_them(way):
    layers, x = net(), normal(10)
    program = way(layers)

    def guide(x: Tensor) -> None:
        pyro.module("layers", layers)
        program(x)

    pair = Pair(model=model, guide=guide).adopt(x)
    assert {id(p) for p in layers.parameters()} <= {id(p) for p in pair.parameters()}
    pyro.clear_param_store()


def test_annotations_and_what_a_notebook_keeps_in_builtins_are_not_in_reach(monkeypatch):
    """Annotations lead to all of `typing`; IPython puts its shell in builtins, which holds Modules of other pairs."""
    layers, stranger, modes = net(), net(), []
    monkeypatch.setattr(builtins, "get_ipython", lambda: stranger, raising=False)
    monkeypatch.setattr(builtins, "_", [stranger], raising=False)

    def guide(x: Tensor) -> None:
        modes.append(builtins._[0].training)
        guide_with(layers, x)

    guide.__annotations__ = {"x": Annotated[Tensor, stranger], "return": Callable[[Tensor], None] | None}
    assert modules_within([guide]) == [layers]
    analysis.surgery(Pair(model=model, guide=guide), normal(10), samples=2)
    assert set(modes) == {True}


def test_the_search_asks_no_object_for_attributes_that_it_makes_up():
    """A proxy (a lazy connection, a mock) may raise anything, or do work, when it is asked."""

    class Proxy:
        def __getattr__(self, name: str) -> Any:
            raise KeyboardInterrupt(name)

    proxy, layers, x = [Proxy()], net(), normal(10)

    def guide(x: Tensor) -> None:
        assert proxy
        guide_with(layers, x)

    analysis.surgery(Pair(model=model, guide=guide), x)
    assert layers.training
