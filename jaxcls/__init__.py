"""Fine-tune, evaluate and score with ResNet image classifiers in JAX.

Names are imported on first use: `import jaxcls` alone loads neither JAX nor scikit-learn.
"""

from importlib.metadata import version

from etils import epy

__version__ = version("jaxcls")

with epy.lazy_api_imports(globals()):
    from jaxcls import (
        augment,
        classifier,
        cluster,
        data,
        errors,
        evaluation,
        feature_cache,
        manifest,
        models,
        parallel,
        pipeline,
        predictions,
        preprocess,
        program,
        resident,
        scoring,
        serving,
        storage,
        svm,
        train,
        ui,
    )
    from jaxcls.augment.copies import augment_dataset
    from jaxcls.classifier import Classifier, Head, create_model, imagenet_classifier, load, load_program
    from jaxcls.data.dataset import Dataset, scan
    from jaxcls.data.folder import read_folder
    from jaxcls.errors import JaxclsError
    from jaxcls.evaluation.metrics import Evaluation, evaluate
    from jaxcls.models.pretrained import Backbone, load_pretrained
    from jaxcls.predictions import Predictions
    from jaxcls.preprocess import Preprocess
    from jaxcls.scoring import extract_features, make_scorer, predict
    from jaxcls.storage import Storage
    from jaxcls.svm.fit import fit_svm
    from jaxcls.train.config import FinetuneConfig
    from jaxcls.train.finetune import FinetuneResult, finetune
