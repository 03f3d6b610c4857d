"""Errors whose text is meant for the user; the command line prints them without a traceback."""


class UserError(Exception):
    """Bad input: one plain sentence with the file, the tensor and the way out (exit code 2)."""


class JobError(Exception):
    """A failure while running that no other input would have avoided (exit code 1)."""
