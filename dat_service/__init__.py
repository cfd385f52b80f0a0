"""The endpoint: HTTP app, Ray Serve deployment and command line of the discrete augmentation data service."""

__version__ = "0.1.0"
