"""The study: which coefficients may move, who proposes them, what survives a crash, and who has won."""
