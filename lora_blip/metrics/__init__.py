"""Scores of predictions: captions, answers and retrieval. They need no model."""
