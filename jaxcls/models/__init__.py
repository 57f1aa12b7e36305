"""ResNets and their pretrained weights. Linen is visible only in here."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxcls.models import architecture, convolution, fold, hub, port, precision, pretrained, resnet
