"""The one exception that means: the input is wrong, and here is the remedy."""


class UserError(Exception):
    """Bad input. The message is one line that names the file, key or value and what would be right.

    The `d2g` command prints it on stderr without a traceback and exits with code 2.
    """
