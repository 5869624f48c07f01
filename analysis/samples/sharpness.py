"""Sharpness of images: how much neighbouring pixels differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pvae.analysis.figures.estimate import Estimate, over_rows
from pvae.analysis.samples.features import in_chunks
from pvae.analysis.samples.fidelity import ratio_of


def is_image(shape: Sequence[int]) -> bool:
    """Return True if data of this shape can be shown as images: `(1|3, H, W)` or `(H, W)`."""
    return (len(shape) == 3 and shape[0] in (1, 3)) or (len(shape) == 2 and min(shape) > 1)


def sharpness(x: Tensor) -> Tensor | None:
    """Return the mean absolute 4-neighbour Laplacian over the inner pixels and channels of every image; exact.

    It is 0 for a constant image or a ramp, and 4 for a checkerboard of zeros and ones. Blurring lowers it, apart from
    the border: a kernel of mass one cannot increase the response.

    Warning: noise is sharp too. Samples of a likelihood with noise can be sharper than data; the means of p(x | z) show
    blur. For binary data the means are grey, hence less sharp, for any model.

    Arguments:
        x: images `(n, 1|3, H, W)` or `(n, H, W)`.

    Returns:
        `(n,)`, float64, in units of the pixels; None for data that are not images, or less than 3 pixels wide or high.

    Example:
        >>> board = (torch.arange(6)[:, None] + torch.arange(6)) % 2
        >>> sharpness(board[None].float())
        tensor([4.], dtype=torch.float64)
    """
    if not is_image(x.shape[1:]) or min(x.shape[-2:]) < 3:
        return None
    return in_chunks(_laplacian, x).double()


def relative_sharpness(samples: Tensor, data: Tensor) -> Estimate | None:
    """Return the mean sharpness of samples `(m, *shape)` divided by that of data `(n, *shape)`, an estimate.

    It is 1 for samples from the distribution of the data, and lower for blurred ones. None where `sharpness` is None,
    and for data of zero sharpness.
    """
    made, real = sharpness(samples), sharpness(data)
    if made is None or real is None or not bool(real.any()):
        return None
    return ratio_of(over_rows(made), over_rows(real))


def _laplacian(images: Tensor) -> Tensor:
    """Return the mean absolute 4-neighbour Laplacian of images `(n, ..., H, W)`, `(n,)`."""
    across = images[..., 1:-1, :-2] + images[..., 1:-1, 2:]
    along = images[..., :-2, 1:-1] + images[..., 2:, 1:-1]
    return torch.abs(across + along - 4 * images[..., 1:-1, 1:-1]).flatten(1).mean(1)
