"""Evaluation: images in, features and statistics of them, metrics, a result that says how it was made, a report."""
