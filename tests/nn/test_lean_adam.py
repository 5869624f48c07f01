"""The Adam of small fits beside that of torch."""

import torch

from pvae.nn.schedules import LeanAdam


def test_the_weights_are_those_of_torch_to_the_bit():
    ours, theirs = ([torch.randn(4, 3), torch.randn(5)] for _ in range(2))
    for mine, other in zip(ours, theirs, strict=True):
        other.copy_(mine)
    lean, full = LeanAdam(ours), torch.optim.Adam([p.requires_grad_() for p in theirs])
    for step in range(1, 8):
        gradients = [torch.randn_like(p) for p in ours]
        lean.step(gradients, lr=0.1 / step)
        full.param_groups[0]["lr"] = 0.1 / step
        for p, gradient in zip(theirs, gradients, strict=True):
            p.grad = gradient
        full.step()
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
