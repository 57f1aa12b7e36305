"""Augmentation: `host` for streamed photos."""
