"""A file a metric: the file's name is the metric's name. ``base.py`` says what one must do."""
