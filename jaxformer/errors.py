"""The one exception that a person, not a programmer, is meant to read."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one sentence that names the thing, the rule and the remedy. The
    programs print it alone and leave with status 2; everything else is a fault.
    """
