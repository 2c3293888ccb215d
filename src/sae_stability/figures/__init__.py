"""Figures, one function each, in one file a chapter. They know tables and arrays only, and return the Figure.

A chapter imports its file: `from sae_stability.figures import stability as figures`. Nothing lists them, so that a new figure, or a
file of them, touches no other. `style.py` says how bands, kinds and cells are drawn everywhere.
"""
