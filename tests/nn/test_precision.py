"""Training with products in bfloat16: rounded factors, exact other operations, and fits that come out the same."""

import importlib
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn

import pvae
from pvae.analysis.pages.sections.fit import environment_of
from pvae.errors import DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.nn import precision
from pvae.nn.precision import ROUNDED, BFloat16Products, Precision, products_in, resolved
from pvae.objectives.base import Loss
from pvae.runs import checkpoint
from pvae.training.evaluation import evaluate
from pvae.training.step import compile_forward

SPEC: dict[str, dict[str, Any]] = {
    "latents": {"z": {"dim": 3}},
    "data": {"source": "digits", "binarize": "dynamic"},
    "encoder": {"network": {"kind": "gated_mlp", "hidden": [32]}},
    "decoder": {"network": {"kind": "gated_mlp", "hidden": [32]}},
    "train": {"epochs": 6, "engine": "eager", "checkpoint_seconds": 0.0, "optimizer": {"kind": "adam", "lr": 3e-3}},
}
Layer = nn.Linear | nn.Conv2d | nn.ConvTranspose2d
LAYERS: dict[str, tuple[Callable[[], Layer], tuple[int, ...]]] = {
    "dense": (lambda: nn.Linear(7, 5), (4, 7)),
    "dense without bias": (lambda: nn.Linear(7, 5, bias=False), (2, 4, 7)),
    "convolution": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 8, 8)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(3, 4, 4, stride=2, padding=1), (2, 3, 4, 4)),
}


WITHOUT = "a processor without bfloat16"


@pytest.fixture(params=["this processor", WITHOUT])
def _processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as this processor makes them, and as one without bfloat16 does."""
    if request.param == WITHOUT:
        monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)


@pytest.mark.usefixtures("_processor")
@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_multiplies_rounded_factors(case: str) -> None:
    """Float64 products of the factors, each rounded to bfloat16: value to one rounding, gradients to two."""
    make, shape = LAYERS[case]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape, requires_grad=True)
    if layer.bias is not None:
        nn.init.constant_(layer.bias, 1 / 3)  # not a bfloat16: added as it is
    with BFloat16Products():
        out = layer(x)
    reference = make().double()
    reference.load_state_dict(layer.state_dict())
    with torch.no_grad():
        reference.weight.copy_(layer.weight.bfloat16())
    rounded = x.detach().bfloat16().double().requires_grad_()
    exact = reference(rounded)
    assert out.dtype is torch.float32
    assert torch.allclose(out.double(), exact, rtol=2**-8, atol=2**-9)
    assert not torch.allclose(out, layer(x), rtol=1e-5, atol=1e-5)
    direction = torch.randn(out.shape)
    ours = torch.autograd.grad(out, [x, *layer.parameters()], direction)
    theirs = torch.autograd.grad(exact, [rounded, *reference.parameters()], direction.double())
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype is torch.float32
        assert (a.double() - b).norm() < 2**-7 * b.norm()
    if layer.bias is not None:
        assert torch.allclose(ours[2], direction.movedim(-1 if len(shape) == 2 else 1, 0).flatten(1).sum(1), atol=1e-4)


@pytest.mark.parametrize("compiling", [False, True])
def test_factors_are_rounded_as_a_cast_rounds_them(compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("torch._dynamo")  # which keeps the function that it finds when it is first imported
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    torch.manual_seed(0)
    x = torch.randn(10_000) * torch.randn(10_000).mul(10).exp()
    assert torch.equal(precision.rounded(x), x.bfloat16().float())
    assert torch.equal(torch.func.grad(lambda x: precision.rounded(x).sum())(x), torch.ones_like(x))


def test_inductor_keeps_the_rounding() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 50)
    compiled = torch.compile(lambda x: 1.5 * precision.rounded(x), fullgraph=True)
    assert torch.equal(compiled(x), 1.5 * x.bfloat16().float())


def test_a_processor_without_avx512_is_known() -> None:
    """Asked in a process of its own, which torch and oneDNN are told to run on AVX2 alone."""
    code = "from pvae.nn.precision import multiplies_bfloat16; print(multiplies_bfloat16())"
    only_avx2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **only_avx2}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False" or platform.machine() not in ("x86_64", "AMD64")


@pytest.mark.usefixtures("_processor")
def test_nothing_else_is_rounded() -> None:
    """Products of double precision, matrix products of a density, activations."""
    torch.manual_seed(0)
    x, w = torch.randn(4, 7), torch.randn(5, 7)
    with products_in("bfloat16"):
        assert torch.equal(nn.functional.linear(x.double(), w.double()), x.double() @ w.double().T)
        assert torch.equal(x @ w.T, torch.mm(x, w.T))
        assert not torch.equal(nn.functional.linear(input=x, weight=w), x @ w.T)
        assert torch.equal(nn.functional.glu(x[:, :6]), x[:, :3] * x[:, 3:6].sigmoid())
    with products_in("float32"):
        assert torch.equal(nn.functional.linear(x, w), x @ w.T)


def spec_of(**train: object) -> Experiment:
    """A small VAE on digits."""
    return Experiment.from_dict({**SPEC, "train": {**SPEC["train"], **train}})


def gradient(experiment: Experiment, precision: Precision, x: Tensor) -> tuple[Tensor, Tensor, pvae.Pair]:
    """Loss and whole gradient of a fresh pair, with one noise."""
    torch.manual_seed(0)
    pair = experiment.build((1, 8, 8))
    loss = Loss(experiment.objective, pair, precision=precision)
    torch.manual_seed(1)
    value, _ = loss(x)
    found = torch.autograd.grad(value, list(pair.parameters()))
    assert all(g.dtype is torch.float32 for g in found)
    return value.detach(), torch.cat([g.flatten() for g in found]), pair


def test_loss_and_gradient_are_near_those_in_float32() -> None:
    experiment, x = spec_of(), (torch.rand(200, 1, 8, 8) > 0.5).float()
    with pyro.validation_enabled(False):
        value, slope, pair = gradient(experiment, "float32", x)
        value_half, slope_half, _ = gradient(experiment, "bfloat16", x)
    assert value != value_half
    assert abs(value - value_half) < 2e-3 * abs(value)
    assert (slope - slope_half).norm() < 1e-2 * slope.norm()
    assert all(p.dtype is torch.float32 for p in pair.parameters())


@pytest.mark.slow
@pytest.mark.usefixtures("_processor")
@pytest.mark.parametrize("_processor", ["this processor", WITHOUT], indirect=True)
def test_the_compiled_step_rounds_alike() -> None:
    """Value and gradient are nearer to the eager step's in bfloat16 than that is to the step in float32."""
    experiment, x = spec_of(), (torch.rand(50, 1, 8, 8) > 0.5).float()
    pair = experiment.build((1, 8, 8))
    loss, plain = Loss(experiment.objective, pair, precision="bfloat16"), Loss(experiment.objective, pair)
    found = []
    with pyro.validation_enabled(False):
        for forward in (compile_forward(loss, x), loss, plain):
            torch.manual_seed(3)
            value, terms = forward(x)
            slope = torch.autograd.grad(value, list(pair.parameters()))
            found.append((terms, torch.cat([g.flatten() for g in slope])))
    for fast, slow, exact in zip(*found, strict=True):
        assert (fast - slow).norm() < 0.3 * (exact - slow).norm()


def test_a_fit_comes_out_the_same_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    """The validation ELBO of the same seed in both; validation itself is float32, whatever the fit is."""
    runs = {
        precision: pvae.fit(spec_of(precision=precision), run_dir=tmp_path / precision, device="cpu", progress=False)
        for precision in ("float32", "bfloat16")
    }
    last = {name: run.metrics.query("split == 'validation'")["elbo"].iloc[-1] for name, run in runs.items()}
    assert last["float32"] != last["bfloat16"]
    assert abs(last["float32"] - last["bfloat16"]) < 0.1
    run = runs["bfloat16"]  # whose weights are those of the last epoch, if that is the best
    best = run.metrics.query("split == 'validation'")["elbo"].max()
    assert evaluate(run.pair, run.data.validation.rows, run.plan.seed)["elbo"] == pytest.approx(best, abs=1e-5)
    first = spec_of(precision="bfloat16", epochs=3)
    run = pvae.fit(first, run_dir=tmp_path / "part", device="cpu", progress=False)
    done = pvae.resume(run.path, "train.epochs=6", allow_changes=True, device="cpu", progress=False)
    whole, resumed = (checkpoint.latest(r.path / "checkpoints") for r in (runs["bfloat16"], done))
    assert whole is not None
    assert resumed is not None
    for name, value in whole.tensors["weights"].items():
        assert torch.equal(value, resumed.tensors["weights"][name]), name


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("asked", ["auto", "bfloat16", "float32"])
def test_auto_takes_bfloat16_only_where_the_processor_has_it(
    asked: str, native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice is recorded and said once; another processor goes on with it, and its other bits are said."""
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: native)
    monkeypatch.setattr(precision, "_product", lambda func, *args, **options: func(*args, **options))
    run = pvae.fit(spec_of(precision=asked, epochs=1), run_dir=tmp_path, device="cpu", progress=False)
    taken = {"float32": "float32", "auto": "bfloat16" if native else "float32"}.get(
        asked, "bfloat16" if native else ROUNDED
    )
    assert run.files.manifest["precision"] == taken
    said = [event["message"] for event in run.files.events() if event["kind"] == "precision"]
    assert len(said) == (asked != "float32")
    assert all(("no bfloat16 products" in line) is not native for line in said)
    assert ("precision", taken) in environment_of(run)

    def go_on(**given: Any) -> pvae.Run:
        return pvae.resume(run.path, "train.epochs=2", allow_changes=True, device="cpu", progress=False, **given)

    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: not native)
    other = {ROUNDED: "bfloat16", "bfloat16": ROUNDED}.get(taken, taken)
    if other != taken:
        run.files.update_status(state="interrupted")  # a finished run has nothing to go on with
        with pytest.raises(DeclarationError, match=f"expected the run's own precision = '{taken}'; got '{other}'"):
            pvae.resume(run.path, device="cpu", progress=False)
    assert go_on().files.manifest["precision"] == other
    changed = [event["message"] for event in run.files.events() if event["kind"] == "changed"]
    assert ("precision = " in changed[0]) is (other != taken)


def test_a_gpu_without_bfloat16_is_asked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    for has, taken in ((True, ("bfloat16", "bfloat16")), (False, ("float32", ROUNDED))):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert (resolved("auto", gpu), resolved("bfloat16", gpu)) == taken


@pytest.mark.parametrize("zoo", ["gan", "em_mixture"])
def test_what_takes_no_such_step_says_so(zoo: str) -> None:
    with pytest.raises(DeclarationError, match=r"train.precision: expected float32.*got .bfloat16"):
        Experiment.load(zoo, ["train.precision=bfloat16"])
