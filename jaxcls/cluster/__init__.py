"""Beyond one machine: large sets scored on a Ray cluster."""
