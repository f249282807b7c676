"""Errors that a user can cause: one line, what was expected, what came, what to do; exit code 2."""

EXIT_USER_ERROR = 2  # the command has to be changed
EXIT_NON_FINITE = 3  # loss or gradient is NaN or infinite: a person has to look
EXIT_STOPPED = 75  # by a signal or --max_minutes, nothing lost: run the same command again


class UserError(ValueError):
    """Something the user can mend; the message is one sentence or two and needs no traceback."""


class NonFiniteError(ArithmeticError):
    """A number that is NaN or infinite (or outlier upon outlier), found before it was kept."""


class PeerGoneError(RuntimeError):
    """Another process of the run, or the TPU, has gone: nothing is wrong with this one."""


def describe(error: BaseException) -> str:
    """One line for an error: an `OSError` without its number, with the path it is about."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    return " ".join(str(error).split())


def untied_warning(source: object, head: str, table: str) -> str:
    """For weights whose head is another than the token table that config.json names as the head."""
    return (
        f"warning: {source} holds another {head} than {table}, though its config.json ties them: "
        'the latter is used; "tie_word_embeddings": false uses both'
    )
