"""Own files as training data: shards, folders, lists and Hub datasets, mixed, ordered, checked and converted."""
