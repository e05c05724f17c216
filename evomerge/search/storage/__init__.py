"""The study in its database: trials, item scores, and the lease of the one driver."""
