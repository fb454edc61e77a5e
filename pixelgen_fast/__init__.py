"""Training engine for image generators that work directly on pixels."""

__version__ = "0.1.0"
