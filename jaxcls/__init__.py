"""Fine-tune, evaluate and serve ResNet image classifiers in JAX."""
