"""Fine-tuning: a dataset and a backbone become a classifier."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxcls.train import config, finetune, optimizer, reporters, state, step
