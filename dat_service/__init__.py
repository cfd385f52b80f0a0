"""The discrete augmentation data service: its HTTP app, its Ray Serve deployment and its command line."""

__version__ = "0.1.0"
