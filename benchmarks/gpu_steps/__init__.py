"""The steps of `benchmarks/gpu.py`, each a function of a `Bench` that runs in a process of its own."""
