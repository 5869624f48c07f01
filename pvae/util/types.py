"""Type aliases used throughout the project."""

from typing import Any

import torch
from numpy.typing import NDArray

Array = NDArray[Any]
"""NumPy array of any element type."""

Size = torch.Size | list[int] | tuple[int, ...]
"""Shape of samples, as `sample(Size)` and `expand(Size)` of a distribution accept it."""
