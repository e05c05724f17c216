"""`evomerge statistics`: what the methods `fisher` and `regmean` need to know about a source (`gather.py`)."""
