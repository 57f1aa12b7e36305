"""A classifier becomes a web service: its protocols, its processes, and its clients."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxcls.serving import (
        admission,
        app,
        auth,
        batcher,
        client,
        config,
        deployment,
        docker,
        keeper,
        load_test,
        local,
        manifests,
        metrics,
        openapi,
        ray,
        ray_target,
        registry,
        replica,
        service,
        supervisor,
        wire,
    )
