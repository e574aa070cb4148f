"""The errors that carry a remedy, one class for each kind of cause."""


class ModelError(ValueError):
    """A checkpoint that cannot be used, with the reason and the remedy."""
