"""Sharpness of images: how much neighbouring pixels differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pvae.analysis.figures.estimate import Estimate
from pvae.analysis.samples.features import in_chunks
from pvae.analysis.samples.fidelity import mean_of, ratio_of


def is_image(shape: Sequence[int]) -> bool:
    """True for the shape of a datum that can be shown as a picture: `(1|3, H, W)` or `(H, W)`."""
    return (len(shape) == 3 and shape[0] in (1, 3)) or (len(shape) == 2 and min(shape) > 1)


def sharpness(x: Tensor) -> Tensor | None:
    """Mean size of the 4-neighbour Laplacian over an image's inner pixels and its channels; exact.

    0 for a constant image or a ramp, 4 for a checkerboard of zeros and ones. Averaging over neighbours lowers it (but
    for the border): a kernel of mass one makes no larger responses.

    Warning: noise is sharp as well. Draws of a likelihood with noise of its own can be sharper than data; the means of
    p(x | z) show what is blurred. Of binary data the means are grey, hence less sharp, however good the model is.

    Arguments:
        x: images `(n, 1|3, H, W)` or `(n, H, W)`.

    Returns:
        `(n,)`, float64, in units of the pixels; None for data that are no images, or fewer than 3 pixels wide or high.
    """
    if not is_image(x.shape[1:]) or min(x.shape[-2:]) < 3:
        return None
    return in_chunks(_laplacian, x).double()


def relative_sharpness(samples: Tensor, data: Tensor) -> Estimate | None:
    """Mean sharpness of samples `(m, *shape)` by that of data `(n, *shape)`, with its error over images.

    1 for samples of the data's own law, below for blurred ones. None where `sharpness` is, and for data without any.
    """
    made, real = sharpness(samples), sharpness(data)
    if made is None or real is None or not bool(real.any()):
        return None
    return ratio_of(mean_of(made), mean_of(real))


def _laplacian(images: Tensor) -> Tensor:
    """Images `(n, ..., H, W)` to the mean size of their Laplacian, `(n,)`."""
    across = images[..., 1:-1, :-2] + images[..., 1:-1, 2:]
    along = images[..., :-2, 1:-1] + images[..., 2:, 1:-1]
    return torch.abs(across + along - 4 * images[..., 1:-1, 1:-1]).flatten(1).mean(1)
