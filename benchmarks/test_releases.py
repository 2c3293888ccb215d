"""SAEs that old releases of the libraries wrote: the same input gives the same activations and reconstructions here.

Each release is fetched from the package index into a folder of its own, without what it asks for; where there is no index the test
is skipped, and says so.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_stability.saes import formats

RELEASES = (
    "sae-lens==2.1.3",
    "sae-lens==3.23.4",
    "sae-lens==4.4.5",
    "sae-lens==5.11.0",
    "eai-sparsify==0.0.1",
    "eai-sparsify==1.1.3",
)
WRITER = Path(__file__).parent / "old_writer.py"


@pytest.mark.parametrize("release", RELEASES)
def test_what_an_old_release_wrote_fires_alike(tmp_path, release):
    library, into = release.partition("==")[0], tmp_path / "release"
    fetch = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(into), release]
    fetched = subprocess.run(fetch, capture_output=True, text=True, check=False)
    if fetched.returncode:
        pytest.skip(f"{release} can't be fetched: {fetched.stderr.strip().splitlines()[-1]}")
    environment = os.environ | {"PYTHONPATH": str(into), "SPARSIFY_DISABLE_TRITON": "1"}
    command = [sys.executable, str(WRITER), library, str(tmp_path / "saes")]
    subprocess.run(command, env=environment, check=True)
    folders = sorted((tmp_path / "saes").iterdir())
    assert folders
    for folder in folders:
        sae, written = formats.load(folder), load_file(folder / "codes.safetensors")
        if not json.loads((folder / "facts.json").read_text()).get("encoded", True):
            assert sae.variant is None
            assert "activations are normalised at run time" in sae.about.encoder
            continue
        with torch.no_grad():
            codes = sae.encode(written["x"])
            torch.testing.assert_close(codes, written["codes"], atol=1e-5, rtol=1e-5, msg=folder.name)
            torch.testing.assert_close(sae.decode(codes), written["rebuilt"], atol=1e-4, rtol=1e-4, msg=folder.name)
