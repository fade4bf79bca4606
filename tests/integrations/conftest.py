"""What the oldest transformers that is served lacks of what these tests use: CI runs them with it, too."""

import pytest
import transformers

from mmkernels.integrations.transformers import OLDEST

# By what stands in the name of a test.
LACKS = {
    "gemma4": "it has no Gemma 4",
    "molmo2": "it has no Molmo 2",
    "tipsv2": "it has no TIPSv2",
    "nemotron3": "it has no Nemotron 3",
    "deepseek_v32": "it has no DeepSeek V3.2",
    "what_a_layer_only_hands_on": "it has no DeepSeek V3.2",
    "chameleon": "its ChameleonConfig cannot be made",
    "report_names_what_was_left": "its ChameleonConfig cannot be made",
    "vision_text_dual_encoder": "its config cannot be made without others",
    "same[static-": "its static cache holds float32 beside a model in float64",
    "hot_path[blip_2": "BLIP-2's Q-Former is written out in it: it stays plain",
    "[blip_2 qformer": "BLIP-2's Q-Former is written out in it: it stays plain",
    "[SwinAttention]": "Swin's attention is called otherwise in it",
    "[T5Attention]": "T5's attention is written out in it",
    "nothing_swapped_is_said": "T5's attention is written out in it",
    "does_not_reach": "its Perceiver makes its masks itself, whatever the name",
    "whoever_attends[output_attentions-qwen": "its vision towers return no attention",
    "[llava-model.vision_tower.encoder": "the parts of its CLIP tower have other names",
    "restore_leaves_what_fsdp_made": "the parts of its CLIP tower have other names",
    "image_text_contrastive_loss": "it has no such function",
    "every_contrastive_model": "it has other models",
    "compiles_whole[llava": "its own model does not compile whole",
    "compiles_whole[gemma3": "its own model does not compile whole",
    "transformers-gemma2": "its sdpa leaves Gemma 2's softcap out, and mmkernels does not",
    "dense_mask[blocks": "it has no masks of blocks",
    "dense_mask[sliding and blocks": "it has no masks of blocks",
    "dense_mask[sliding or blocks": "it has no masks of blocks",
    "one_side[blocks": "it has no masks of blocks",
    "one_side[sliding and blocks": "it has no masks of blocks",
    "costs_no_dense_mask": "it has no masks of blocks",
    "dense_mask[packed": "it has no mask of packed documents by that name",
    "tables_are_looked_up": "it has no masks of blocks",
    # what mmkernels leaves by name, as test_an_older_call_is_left says
    "test_open_clip.py::test_a_loss_is_the_same[c": "the open_clip of its time hands ClipLoss no bias",
    "test_open_clip.py::test_the_loss_is_ours": "the open_clip of its time hands ClipLoss no bias",
    "test_open_clip.py::test_what_is_left": "the open_clip of its time hands ClipLoss no bias",
    "test_open_clip.py::test_a_mode_without": "the open_clip of its time hands ClipLoss no bias",
}


def pytest_collection_modifyitems(items):
    if not transformers.__version__.startswith(f"{OLDEST}."):
        return
    for item in items:
        for text, reason in LACKS.items():
            if text in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=f"transformers {transformers.__version__}: {reason}"))
