"""The version, in a file without imports so that the build reads it without torch."""

__version__ = "0.1.0.dev0"
