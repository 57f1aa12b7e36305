"""ResNets and their pretrained weights. Linen is visible only in here."""
