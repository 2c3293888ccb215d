"""The one error that a user can mend."""


class UserError(Exception):
    """A user's mistake, told in one line that names the field or file and the mend."""
