"""The way from a plan to arithmetic on tensors.

`execute.py` takes a plan (`methods/plan.py`) and its operands, and has one function for each type of plan.  `Blend` and
`SparseBlend` become a `Call`, which can be run in three ways with the same bits: by torch in pieces, by one fused CPU
kernel, or by Triton on a CUDA device together with the calls of other tensors.

    plan, Operands
      -> execute.py        one function for each type of plan
      -> call.py           `Call`: operands that count, coefficients and words of the masks as numbers
      -> piecewise.py      torch, in pieces that fit a core's cache
      |  compiled.py       one fused CPU kernel, compiled once and kept (compiler.py runs compilers and keeps files)
      |  launch.py         CUDA: one launch for all calls of one kind (triton_kernels.py)
      -> elementwise.py    the arithmetic itself

    operands.py            the tensors that a plan is executed on
    random_masks.py        keys and words of random masks; a mask by itself
    derived.py             matrices made by linear algebra first: spectral.py (tsv, iso_c), regression.py (regmean)

Letters of shapes: N sources that count, E elements of a tensor, S slices or rows, T tensors of one launch, B blocks of
elements of one launch.
"""
