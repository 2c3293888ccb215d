"""`python -m sae_stability` is `sae-stability`."""

from sae_stability.cli import main

if __name__ == "__main__":
    main()
