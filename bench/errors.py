"""What a user did wrong, as one line: what was wrong, what was expected, what to do."""


class UsageError(ValueError):
    """Bad input from the command line or a file; the command line prints it as one line and exits with 2."""
