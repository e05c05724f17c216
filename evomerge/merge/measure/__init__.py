"""What planners ask of the sources, measured: Gram matrices, magnitudes, ranks, gathered statistics."""
