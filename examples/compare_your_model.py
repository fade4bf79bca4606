"""Is mmkernels right on your model and your data, and what does it gain? One call says: `mmkernels.compare`.

    python examples/compare_your_model.py                                  # a small CLIP, random weights
    python examples/compare_your_model.py openai/clip-vit-base-patch32     # yours, from a folder or the hub

It runs the model plain and accelerated, forward and backward, on scikit-learn's two sample pictures, and prints how
wrong each output and the worst gradients are beside what they may be, what was swapped, time and memory. Nothing of the
model is changed. The exit code is 1 if the two disagree.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from transformers import CLIPConfig, CLIPModel

import mmkernels

MEAN, STD = (torch.tensor(x).view(3, 1, 1) for x in ([0.4815, 0.4578, 0.4082], [0.2686, 0.2613, 0.2758]))
CAPTIONS = ["a temple roof in china", "an orange flower"]
SMALL = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3}
END = 255  # a caption's bytes are its tokens: all that weights drawn at random need


def small_clip() -> CLIPModel:
    text = SMALL | {"vocab_size": 256, "bos_token_id": 254, "eos_token_id": END, "pad_token_id": 0}
    vision = SMALL | {"image_size": 112, "patch_size": 16}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def inputs_for(model: CLIPModel) -> dict[str, torch.Tensor]:
    side = model.config.vision_config.image_size
    pictures = [
        torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 255 for picture in load_sample_images().images
    ]
    pictures = [F.interpolate(x, (side, side), mode="bilinear", antialias=True)[0] for x in pictures]
    tokens = [torch.tensor([*caption.encode(), END]) for caption in CAPTIONS]
    ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in tokens], batch_first=True)
    return {"pixel_values": (torch.stack(pictures) - MEAN) / STD, "input_ids": ids, "attention_mask": mask}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a CLIPModel's folder or name on the hub")
    name = parser.parse_args().model
    model = small_clip() if name is None else CLIPModel.from_pretrained(name)

    comparison = mmkernels.compare(model, **inputs_for(model), return_loss=True, loss=lambda output: output.loss)

    if not comparison.ok:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
