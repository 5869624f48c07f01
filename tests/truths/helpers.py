"""Truths and messages that the tests of this folder share."""

import numpy as np

from pvae.analysis.truths.linear import widened
from pvae.analysis.truths.selfcheck import SelfCheck, digits
from pvae.analysis.truths.truth import Truth
from tests.truths.members import wrong_guide

DIGITS, LABELS = digits()


def failures(found: SelfCheck) -> str:
    return "\n".join("  ".join(check.cells()) for check in found.failed)


def wrong_line() -> Truth:
    return wrong_guide(
        widened(np.array([[1.0], [-0.6]]), 0.8, 1.4, 0.2), np.random.default_rng(0).standard_normal((20, 2))
    )
