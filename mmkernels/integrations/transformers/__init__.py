"""transformers on mmkernels.

Importing this module gives transformers' models the attention implementation "mmkernels":

    import mmkernels.integrations.transformers
    model = AutoModel.from_pretrained(..., attn_implementation="mmkernels")

It serves every model that goes through AttentionInterface, and refuses by name what it does not know.
`mmkernels.accelerate(model)` does more: it also swaps patch embeddings, losses and modules with attention of their own,
packs the vision towers that loop over their images, and leaves to the model what it does not know.
"""

from transformers import AttentionInterface, AttentionMaskInterface

from .attention import NAME, span_attention_forward
from .finder import find, fits, restored, swapped
from .masks import EAGER_NAME, SDPA_NAME, additive_span_mask, bool_span_mask, span_mask

AttentionInterface.register(NAME, span_attention_forward)
AttentionMaskInterface.register(NAME, span_mask)
AttentionMaskInterface.register(SDPA_NAME, bool_span_mask)
AttentionMaskInterface.register(EAGER_NAME, additive_span_mask)

__all__ = ["NAME", "find", "fits", "restored", "swapped"]
