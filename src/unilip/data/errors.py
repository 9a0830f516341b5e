"""The one error of the data layer.

Its message says what was given, what is allowed and what to do.
"""

from __future__ import annotations

from unilip.errors import UniLIPError


class DataError(UniLIPError):
    """Art is missing or broken, or a world, task or edit was asked for that does not exist."""
