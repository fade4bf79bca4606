"""transformers on mmkernels.

Importing this module gives transformers' models the attention implementation "mmkernels":

    import mmkernels.integrations.transformers
    model = AutoModel.from_pretrained(..., attn_implementation="mmkernels")

It serves every model that goes through AttentionInterface, and refuses by name what it does not know.
`mmkernels.accelerate(model)` does more: it also swaps patch embeddings, losses and modules with attention of their own,
packs the vision towers that loop over their images, and leaves to the model what it does not know.
"""

import transformers

OLDEST = "5.4"  # whose masks are functions of the number of queries and of the first of them
if tuple(map(int, transformers.__version__.split(".")[:2])) < tuple(map(int, OLDEST.split("."))):
    raise ImportError(f"mmkernels needs transformers {OLDEST} or later; mend: pip install 'transformers>={OLDEST}'")

# Only now (E402): an older one lacks some of what these import.
from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402

from .attention import NAME, span_attention_forward  # noqa: E402
from .finder import find, fits, restored, swapped  # noqa: E402
from .masks import EAGER_NAME, SDPA_NAME, additive_span_mask, bool_span_mask, span_mask  # noqa: E402

AttentionInterface.register(NAME, span_attention_forward)
AttentionMaskInterface.register(NAME, span_mask)
AttentionMaskInterface.register(SDPA_NAME, bool_span_mask)
AttentionMaskInterface.register(EAGER_NAME, additive_span_mask)

__all__ = ["NAME", "find", "fits", "restored", "swapped"]
