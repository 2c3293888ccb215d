"""What SAEs are trained on: text, language models and their activations."""
