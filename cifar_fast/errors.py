"""The one exception that is meant for the person who started the work."""


class InputError(ValueError):
    """Something given to the project is wrong: a file, a flag, a value.

    Its message is one line that says what is wrong, where, and what to do. The commands print that
    line and exit with code 2.
    """
