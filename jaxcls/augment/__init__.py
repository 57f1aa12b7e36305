"""Augmentation: `host` for streamed photos."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxcls.augment import host
