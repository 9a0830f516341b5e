"""A user's own files as training data: shards, folders, lists and Hub datasets, mixed, ordered, checked and converted.

In: paths. Out: sources of records (``sources.open_source``). Importing this package is cheap.
"""
