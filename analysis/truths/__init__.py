"""Models with known answers, and the checks of the estimators against them."""
