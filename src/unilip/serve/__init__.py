"""Serving: an engine that batches requests for one model, and the HTTP server that stands on it."""
