"""The error of the data layer, under the name that it had."""

from unilip.errors import DataError as DataError
