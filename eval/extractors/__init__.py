"""A file an extractor: the file's name is the extractor's name. ``base.py`` says what one must do."""
