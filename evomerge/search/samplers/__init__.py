"""The samplers, which propose the parameters of a trial; each is an Optuna sampler.

sampler_kind.py: what a sampler is made from, how it is seeded, and what a new one has to say about itself.
settle.py: which sampler follows the learned start of `auto`, kept in the study.
registry.py: the samplers by name, with those that other packages bring.
front.py: with `goals: pareto`, a sampler for several goals, then one by several task weights in turn.
cmaes.py: CMA-ES, the default.
stages.py: the coarser searches that it begins with.
mixed_cma.py: its distribution where some parameters are choices.
optuna_samplers.py: TPE, NSGA-II, Gaussian processes, quasi-Monte Carlo and random search, as Optuna has them.
"""
