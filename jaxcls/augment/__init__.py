"""Augmentation: `host` draws and cuts streamed photos, `views` cuts resident ones, `ops` is for batches."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxcls.augment import host, ops, views
