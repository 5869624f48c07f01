"""q(z | x): what we infer."""
