"""When a search ends, the time that it keeps for its end, and what it used."""
