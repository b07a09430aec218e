"""The version, which the build reads."""

__version__ = "0.2.0"
