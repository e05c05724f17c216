"""The command that gathers what `fisher` and `regmean` need to know of a source."""
