"""What a running search tells a person: one small state, drawn here or read by `status --watch`."""
