"""A classifier becomes a web service: the protocols that it speaks, and its keys."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxcls.serving import auth, client, openapi, wire
