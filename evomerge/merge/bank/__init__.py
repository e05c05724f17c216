"""Base and sources in memory: on the device, in pinned memory, or mapped from their files."""
