"""The book: `build.py` executes chapters and makes pages of them; `page.py` holds what chapters call."""
