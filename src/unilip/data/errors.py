"""The one error of the data layer."""

from __future__ import annotations

from unilip.errors import UniLIPError


class DataError(UniLIPError):
    """Art is missing or broken, or a world, task or edit was asked for that does not exist."""
