"""Augmentation: `host` and `views` cut photos for training, `ops` is for batches, `copies` for files."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxcls.augment import copies, host, ops, views
