"""The one error that a person is meant to read."""


class UserError(ValueError):
    """Something the user gave is wrong: one line that says what, where and how to mend it.

    The command line prints it without a traceback and exits with code 2.
    """
