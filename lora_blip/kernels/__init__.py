"""Fast arithmetic, each part next to the plain computation that it replaces."""
