"""A classifier becomes a web service, and its keys."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxcls.serving import auth
