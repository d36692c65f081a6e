"""The profile of a longer run."""

from .profiles import register

register()
