"""What a classifier's predictions are worth. Knows `Predictions`; neither models nor JAX."""
