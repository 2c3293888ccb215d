"""What each library computes from the tensors of its files, one library a module: `read(folder)` gives the SAE in a folder.

Where an encoder is not understood, directions are given alone, and the SAE says why.
"""
