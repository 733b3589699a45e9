"""The exceptions that are meant for the person who started the work: each message is one line."""


class InputError(ValueError):
    """Something given to the project is wrong: a file, a flag, a value.

    Its message says what is wrong, where, and what to do. The commands print it and exit with code 2.
    """


class Diverged(ArithmeticError):
    """The loss stopped being finite. Its message names the step; the commands print it and exit with code 1."""


def first_line(error: BaseException) -> str:
    """What ``error`` says, in its first line; its type where that is nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
