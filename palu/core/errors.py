"""The one exception type for what a user can mend."""


class PaluError(ValueError):
    """A request that cannot be carried out; the message is one line: what, where, which values are allowed.

    The command-line scripts print the message and exit with code 2.
    """
