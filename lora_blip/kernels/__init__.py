"""Fast kernels, each next to the plain computation that it replaces."""
