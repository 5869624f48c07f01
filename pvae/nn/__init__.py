"""Neural networks, codebooks, schedules of hyperparameters, optimisers, and bfloat16 products."""
