"""Which features of a sparse autoencoder come back under another seed, and what that means."""

import os
import tempfile
from importlib.metadata import version
from pathlib import Path

# numba keeps compiled kernels beside the code, or in the user's home: where neither may be written, in a folder of this user's own.
if not any(os.access(place, os.W_OK) for place in (Path(__file__).parent, os.path.expanduser("~"))):
    os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"sae-stability-kernels-{os.getuid()}"))

# What a user has set for other programs on numba would end ours in its middle: kernels without a compiler have no threads.
for _name in ("NUMBA_DISABLE_JIT", "NUMBA_THREADING_LAYER"):
    os.environ.pop(_name, None)
if not os.environ.get("NUMBA_NUM_THREADS", "1").isdecimal() or int(os.environ.get("NUMBA_NUM_THREADS", "1")) < 1:
    del os.environ["NUMBA_NUM_THREADS"]

__version__ = version("sae-stability")
