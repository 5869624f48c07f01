"""Networks, codebooks, schedules, optimizers and the precision of their products."""
