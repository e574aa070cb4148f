"""From a user's files to batches: formats, images, sampling."""
