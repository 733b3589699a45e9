"""The exceptions that are meant for the person who started the work: each message is one line."""


class InputError(ValueError):
    """Something given to the project is wrong: a file, a flag, a value.

    Its message says what is wrong, where, and what to do. The commands print it and exit with code 2.
    """


class Diverged(ArithmeticError):
    """The loss stopped being finite. Its message names the step; the commands print it and exit with code 1."""
