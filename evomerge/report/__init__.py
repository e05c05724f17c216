"""What a person reads in the morning: the status lines and the page."""
