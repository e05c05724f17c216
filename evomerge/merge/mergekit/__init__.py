"""mergekit's files, in and out: what they say, the recipe that means the same, and the way back."""
