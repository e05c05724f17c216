"""Who proposes the coefficients of a trial."""
