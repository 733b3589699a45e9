"""The exceptions that are meant for the person who started the work: each message is one line."""


class InputError(ValueError):
    """Something given to the project is wrong: a file, a flag, a value.

    Its message says what is wrong, where, and what to do. The commands print it and exit with code 2.
    """


class Diverged(ArithmeticError):
    """The loss stopped being finite. Its message names the step; the commands print it and exit with code 1."""


class Incomplete(RuntimeError):
    """Runs that processes share are not all there: one has died, or could not write. The commands print the message and
    exit with code 1.
    """


def first_cause(error: BaseException) -> BaseException:
    """The error that ``error`` was raised from, at the beginning of the chain; the compiler hides it in its own."""
    while cause := getattr(error, "inner_exception", None) or error.__cause__:
        error = cause
    return error


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, on a GPU or on a CPU."""
    kind, text = type(error).__name__, str(error)
    return "OutOfMemory" in kind or isinstance(error, MemoryError) or "can't allocate memory" in text


def first_line(error: BaseException) -> str:
    """What ``error`` says, in its first line; its type where that is nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
