"""The one error that is the user's to mend: the command line prints it without a traceback and exits with 2."""


class EvomergeError(Exception):
    """Wrong input: the message says what is wrong, where, and what would be right."""
