"""The modules that carry numbers: all their state is in `state_dict`.

`fake_quantizer.py` is one tensor, `modules.py` the prepared modules, `coded.py` the converted ones.
"""

from recoup.nn.call import Batch, call, device_of, moved, size_of, without_labels
from recoup.nn.coded import CODED_MODULES, CodedEmbedding, CodedLinear, CodedModule, Codes, is_coded
from recoup.nn.fake_quantizer import FakeQuantizer, quantization_off
from recoup.nn.modules import QUANT_MODULES, QuantEmbedding, QuantLinear, QuantModule, is_prepared, quant_type

__all__ = [
    "CODED_MODULES",
    "QUANT_MODULES",
    "Batch",
    "CodedEmbedding",
    "CodedLinear",
    "CodedModule",
    "Codes",
    "FakeQuantizer",
    "QuantEmbedding",
    "QuantLinear",
    "QuantModule",
    "call",
    "device_of",
    "is_coded",
    "is_prepared",
    "moved",
    "quant_type",
    "quantization_off",
    "size_of",
    "without_labels",
]
