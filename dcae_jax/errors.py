"""The one exception that is shown to a user as a plain sentence."""

# What a run says of a workdir that another one holds; a sweep waits then instead of giving up.
IN_USE = "is in use by"


class UserError(Exception):
    """A mistake of the user: the message says what is wrong, what was expected and what to do.

    `main.py` and `python -m dcae_jax` print it without a traceback and exit with code 2.
    """
