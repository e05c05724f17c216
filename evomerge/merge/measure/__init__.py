"""The measurements that planners ask for.

    measurements.py     the answers to a planner's questions (`Measured`), each measured once
    gram.py             dot products of all pairs of tensors
    magnitudes.py       the k-th largest magnitude, from a histogram
    ranks.py            where each magnitude ranks in its row
    divergence.py       the divergence of each row's softmax
    sums.py             sums in one fixed order, on which the others build
    scan.py             the same passes in C++ (scan.cpp), with the same bits
    prepare.py          all measurements of a method in one pass before a search, kept on disk
    statistics_file.py  files of `evomerge statistics`

Letters of shapes: N sources, E elements of a tensor, S slices or rows.
"""
