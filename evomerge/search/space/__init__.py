"""Which coefficients may move, and the known good points that are tried first."""
