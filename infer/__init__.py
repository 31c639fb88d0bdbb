"""The application `python -m infer`: what a trained model is run for."""
