"""Finalists and baselines compared on items that the search has not seen, and who has won."""
