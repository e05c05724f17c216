"""A merge method, an objective and a sampler for evomerge, one file each."""
