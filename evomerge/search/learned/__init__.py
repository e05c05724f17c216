"""Learned coefficients: gradient ascent on the smooth objective, before the sampler's trials.

One backward pass gives the derivative of the objective by every coefficient.  `learn.py` climbs with mini-batches of
the search items, stores each step in the study, and tries the running average of the last steps as a trial, so that
the sampler goes on from there.

    learn.py        the phase of the search: start, steps, trials, when it ends
    climbs.py       by which task weights it climbs
    multipliers.py  how strongly the steps hold each guard
    steps.py        one step from a point and the gradients so far
    minibatches.py  which items a step is computed on

What the study keeps of a step is in `search/storage/step_record.py`.
"""
