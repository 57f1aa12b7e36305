"""Photos and their labels, from disk to a `Dataset`. Nothing here imports JAX."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxcls.data import (
        alignment,
        annotations,
        arrayrecord,
        beneath,
        dataset,
        download,
        duplicates,
        folder,
        gather,
        hashing,
        image_search,
        images,
        inventory,
        lineage,
        lists,
        moves,
        pacing,
        provenance,
        source,
        splitting,
        tfds,
    )
