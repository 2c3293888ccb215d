"""Which features of a sparse autoencoder come back under another seed, and what that means."""

from importlib.metadata import version

__version__ = version("sae-stability")
