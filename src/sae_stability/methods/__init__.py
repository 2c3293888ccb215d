"""Methods that explain activations by features: SAEs and others, behind one interface (`dictionary.py`)."""
