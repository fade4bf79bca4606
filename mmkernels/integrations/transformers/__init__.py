"""transformers on mmkernels.

Importing this module gives transformers' models the attention implementation "mmkernels":

    import mmkernels.integrations.transformers
    model = AutoModel.from_pretrained(..., attn_implementation="mmkernels")

It serves every model that goes through AttentionInterface. `mmkernels.accelerate(model)` does more: it also swaps patch
embeddings, losses and modules with attention of their own, and packs the vision towers that loop over their images.
"""

from transformers import AttentionInterface, AttentionMaskInterface

from .attention import span_attention_forward
from .masks import span_mask

NAME = "mmkernels"
# With "flash" in the name, the towers of Qwen-VL and Pixtral pass cu_seq_lens in one call, where else they loop over
# images or make a dense mask. transformers refuses such a name from users; accelerate sets it on the tower's config.
PACKED_NAME = "mmkernels_flash"

for _name in (NAME, PACKED_NAME):
    AttentionInterface.register(_name, span_attention_forward)
    AttentionMaskInterface.register(_name, span_mask)
