"""Fine-tuning: a dataset and a backbone become a classifier."""
