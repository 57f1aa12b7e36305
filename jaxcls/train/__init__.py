"""Fine-tuning: a dataset and a backbone become a classifier."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxcls.train import checkpoint, config, finetune, optimizer, reporters, signals, state, step
