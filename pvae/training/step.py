"""One optimisation step: eager, exported + compiled (CPU), or captured in a CUDA graph.

These three engines give the same numbers from the same seed: noise comes from torch's default generator, and what
changes during training (beta, learning rate) is read from tensors or from the optimiser at every step.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pvae.graph.lifecycle import Moving
from pvae.objectives.base import Loss, Parts, Stepper
from pvae.training import artefacts

Forward = Callable[[Tensor], tuple[Tensor, Tensor]]
CLIPPED = "clipped"
"""Name of the metric that is 1 in a step whose gradient was clipped, else 0; it is summed over an epoch, while other
metrics are averaged."""
STEP_TOLERANCE = {"value": 1e-3, "gradient": 1e-3, "gradient in bfloat16": 1e-2}
"""Largest accepted difference of a compiled or captured step from the eager one, relative to the largest absolute
value."""
COMPILE_SECONDS = {False: 24.0, True: 5.0}
"""Estimated time to compile a step, in seconds; True where the code of an earlier fit is kept."""
SAVED_PROPORTION = 0.13
"""Estimated proportion of the arithmetic time of a step that compilation saves."""
SAVED_SECONDS = 3e-4
"""Estimated overhead per step that compilation saves, in seconds."""
FLOPS = 1.2e11
"""Estimated floating-point operations per second of a CPU."""


def choose_engine(steps: int, parameters: int, batch: int, device: torch.device, kept: bool = False) -> str:
    """Return the engine ("eager", "compiled" or "captured") for a fit of `steps` steps.

    It depends on the declaration, the device and `kept` (whether the code of such a step is), not on timings.

    On a CPU compiling costs about `COMPILE_SECONDS`, and saves a fixed overhead and a part of the arithmetic (6 flops
    per parameter and datum) of every step. Half the cost of new code is left to the later fits that it is kept for.
    """
    if device.type == "cuda":
        return "captured"
    saved = SAVED_SECONDS + SAVED_PROPORTION * 6 * parameters * batch / FLOPS
    return "compiled" if steps * saved > COMPILE_SECONDS[kept] / (1 if kept else 2) else "eager"


def compile_forward(loss: Loss, x: Tensor) -> Forward:
    """Return `loss.forward` for batches shaped like `x`, exported and then compiled by Inductor.

    The exported program shares the parameters and buffers of `loss`. Random numbers come from the
    default generator in the order the eager program draws them. Random state and buffers are left as found. The code is
    kept for later fits.

    Raises:
        RuntimeError: value or gradient differ from the eager program's on `x` (or the compiler failed).
    """
    # Guards check every call. None is needed: `Step` passes batches of one shape, dtype and device only.
    options: dict[str, Any] = {"fallback_random": True, "guard_filter_fn": lambda guards: [False] * len(guards)}
    kept = artefacts.kept(artefacts.entry_of(loss.pair, loss.objective, loss.precision, x.shape))
    unchecked = pyro.validation_enabled(False)
    with restored([*loss.buffers()]), kept, torch.random.fork_rng(), unchecked, warnings.catch_warnings():
        # torch's own lowering of `diagonal` calls what torch deprecates.
        warnings.filterwarnings("ignore", message="`torch._prims_common.check` is deprecated", category=FutureWarning)
        exported = torch.export.export(loss, (x,), strict=False)
        compiled = torch.compile(exported.module().forward, options=options)
        gradient = "gradient in bfloat16" if loss.precision != "float32" else "gradient"
        for name, fast, slow in zip(("value", gradient), _probe(loss, compiled, x), _probe(loss, loss, x), strict=True):
            require_equal(fast, slow, name)
    return compiled


@contextmanager
def restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Give tensors the values back that they have now, after the `with` block or an error inside it."""
    kept = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        torch._foreach_copy_([tensor.data for tensor in tensors], kept)


def _probe(loss: Loss, forward: Forward, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the metrics and the flattened gradient of a batch over all trainable parameters, at a fixed seed."""
    torch.manual_seed(0)
    value, out = forward(x)
    return out, torch.cat([g.flatten() for g in gradients(loss, value)])


def require_equal(fast: Tensor, slow: Tensor, what: str) -> None:
    """Raise RuntimeError unless a compiled or captured step's values equal the eager ones up to `STEP_TOLERANCE`."""
    largest = STEP_TOLERANCE[what] * slow.abs().max() + 1e-6
    if fast.shape != slow.shape or not bool((fast - slow).abs().max() <= largest):
        raise RuntimeError(f"the fast step's {what} differs from the eager one's")


def learned(module: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters of a module."""
    return [p for p in module.parameters() if p.requires_grad]


def gradients(module: nn.Module, value: Tensor) -> list[Tensor]:
    """Return the gradients of a scalar with respect to the trainable parameters of a module on which it depends."""
    return [g for g in torch.autograd.grad(value, learned(module), allow_unused=True) if g is not None]


class Step(Stepper):
    """Gradient step on one batch: forward, backward, gradient clipping, optimiser, moving average of the weights.

    Arguments:
        loss: the objective of a pair of model and guide.
        optimizer: optimiser of the pair's parameters.
        engine: "eager", "compiled" or "captured".
        example: a batch of the usual shape; other shapes run eagerly.
        clip_norm: largest global gradient norm; infinity to compute the norm without clipping, so that a step with a
            NaN gradient changes no weight; None to do neither.
        average: averaged weights, updated in place, and their decay; or None.
    """

    def __init__(
        self, loss: Loss, optimizer: torch.optim.Optimizer, engine: str, example: Tensor, *,
        clip_norm: float | None = None, average: tuple[Sequence[Tensor], float] | None = None,
    ) -> None:  # fmt: skip
        self.loss, self.optimizer = loss, optimizer
        self.clip_norm, self.average = clip_norm, average
        norms = (CLIPPED, "grad_norm") if clip_norm and clip_norm < math.inf else ("grad_norm",) if clip_norm else ()
        self.names = (*loss.names, *norms)
        self.parameters = learned(loss)
        self.moving = [part for part in loss.modules() if isinstance(part, Moving) and part.training]
        self.shape = example.shape
        self.compiled = compile_forward(loss, example) if engine == "compiled" else None
        self.captured = Capture(self, example) if engine == "captured" else None

    def __call__(self, x: Tensor, frozen: Sequence[nn.Parameter] = ()) -> Tensor:
        """Take one step on a batch, with the parameters in `frozen` unchanged.

        Returns the detached metrics, in the order of `names`.

        A batch whose loss or gradient norm is not finite changes no weight; the caller sees it in the returned metrics.
        """
        if self.captured is not None and not frozen and x.shape == self.shape:
            return self.captured(x)
        return self.run(x, frozen)

    def run(self, x: Tensor, frozen: Sequence[nn.Parameter] = ()) -> Tensor:
        """Take one optimisation step directly, without replaying a CUDA graph; arguments as in a call."""
        loss, out = self.forward(x)
        loss.backward()
        return self._finish(out, frozen)

    def sharded(self, batch: Parts, frozen: Sequence[nn.Parameter] = ()) -> Tensor:
        scratch = [tensor for part in self.moving for tensor in part.scratch()]
        sizes = [*(t.numel() for t in (*self.parameters, *scratch)), len(self.parameters), len(self.loss.names)]
        *found, used, out = batch.total(partial(self._part, batch.count), sum(sizes)).split(sizes)
        for p, slope, use in zip(self.parameters, found[: len(self.parameters)], used.tolist(), strict=True):
            p.grad = slope.view_as(p).to(p.dtype) if use else None
        for tensor, value in zip(scratch, found[len(self.parameters) :], strict=True):
            tensor.copy_(value.view_as(tensor))
        return self._finish(out, frozen)

    def _part(self, shards: int, x: Tensor, share: float, shard: int) -> Tensor:
        """Return what a shard adds to gradients, scratch of moving parts, number of uses, and metrics; flat."""
        loss, out = self.forward(x)
        slopes = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        used = out.new_tensor([slope is not None for slope in slopes])
        both = zip(self.parameters, slopes, strict=True)
        flat = [(torch.zeros_like(p) if slope is None else slope * share).flatten() for p, slope in both]
        flat += [t.flatten() for part in self.moving for t in part.contribution(share, shard, shards)]
        return torch.cat([*flat, used, out * share])

    def _finish(self, out: Tensor, frozen: Sequence[nn.Parameter]) -> Tensor:
        """Clip the gradients, move the weights, and return the metrics with those of clipping."""
        clear_gradients(frozen)
        if self.clip_norm:
            norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_norm).detach().reshape(1)
            out = torch.cat([out, norm > self.clip_norm, norm] if self.clip_norm < math.inf else [out, norm])
        self._move(out)
        return out

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch and its detached metrics, compiled if the batch has the usual shape."""
        return self.compiled(x) if self.compiled is not None and x.shape == self.shape else self.loss(x)

    def _move(self, out: Tensor) -> None:
        if out.is_cuda:  # no synchronisation: the fused kernel skips the update where found_inf is 1
            finite = out[0].isfinite() & out[-1].isfinite()
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        if out.is_cuda or is_finite(out):
            self.moving_now = True
            self.optimizer.step()
            if self.average is not None:
                averaged, decay = self.average
                torch._foreach_lerp_(list(averaged), [p.detach() for p in self.parameters], 1 - decay)
            for part in self.moving:
                part.after_step()
            self.moving_now = False
        clear_gradients(self.parameters)


def clear_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Drop the gradients of parameters."""
    for parameter in parameters:
        parameter.grad = None


def is_finite(out: Tensor) -> bool:
    """Return True if all metrics of a step, loss and gradient norm among them, are finite.

    Reading them synchronises with the device.
    """
    return all(map(math.isfinite, out.tolist()))


class Capture:
    """Optimisation step captured as a CUDA graph; capturing it leaves weights and optimiser state unchanged.

    Raises:
        RuntimeError: a replay of the graph gives other values than the eager step.
    """

    def __init__(self, step: Step, example: Tensor) -> None:
        self.x = example.clone()
        moved = [*step.parameters, *step.loss.buffers(), *(step.average[0] if step.average else ())]
        state = {p: {k: v.clone() for k, v in s.items()} for p, s in step.optimizer.state.items()}
        try:
            with restored(moved), torch.random.fork_rng(devices=[example.device]), pyro.validation_enabled(False):
                self.graph, self.out = self._record(step)
                torch.manual_seed(0)
                with torch.no_grad():
                    _, expected = step.loss(self.x)
                torch.manual_seed(0)
                self.graph.replay()
                require_equal(self.out[: len(expected)], expected, "value")
        finally:
            clear_gradients(step.parameters)
            for p, current in step.optimizer.state.items():
                for k, v in current.items():
                    v.copy_(state[p][k]) if p in state else v.zero_()

    def _record(self, step: Step) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        stream, usual = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(usual)
        with torch.cuda.stream(stream):
            for _ in range(3):
                step.run(self.x)
        usual.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                out = step.run(self.x)
        except Exception:  # torch leaves its own stream current, and the generator waiting for the end of a capture
            torch.cuda.set_stream(usual)
            generator = torch.cuda.default_generators[self.x.device.index or 0]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        return graph, out

    def __call__(self, x: Tensor) -> Tensor:
        """Copy a batch into the graph's static input, replay the graph and return the vector of metrics."""
        self.x.copy_(x)
        self.graph.replay()
        return self.out


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Prepare an optimiser for a CUDA graph: the learning rate becomes a tensor, `capturable` is set."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
        if "capturable" in group:
            group["capturable"] = True


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group of an optimiser, in place if it is stored in a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the tensors of an optimiser's state (moments, step counts) by the name `<parameter index>.<name>`."""
    states = optimizer.state_dict()["state"].items()
    named = [(f"{index}.{name}", value) for index, state in states for name, value in state.items()]
    return {name: value for name, value in named if isinstance(value, Tensor)}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load the tensors of `optimizer_tensors` into an optimiser; its learning rates and flags stay unchanged.

    Raises:
        ValueError: a tensor belongs to no parameter of the optimiser, or has not its shape and dtype.
    """
    own = {str(i): p for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        wanted = own[index].dtype if index in own and name != "step" else torch.float32
        if index not in own or (value.dim() and value.shape != own[index].shape) or value.dtype != wanted:
            raise ValueError(f"the optimiser has {key} of shape {list(value.shape)}, {value.dtype}")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
