"""The whole declaration: TOML in and out, its rules, its formulas, and the pair it builds."""
