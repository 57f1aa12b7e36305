"""Beyond one machine: large sets scored on a Ray cluster."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxcls.cluster import batch, files, session, stages, tables
