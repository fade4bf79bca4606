"""CLIP and SigLIP: a picture tower and a text tower, whose features of a pair are to be alike.

Radford et al. 2021, https://arxiv.org/abs/2103.00020; Zhai et al. 2023, https://arxiv.org/abs/2303.15343.

    picture -> patches -> transformer --.
                                         >  loss over all pairs of a batch
    caption -> words   -> transformer --'

- patch embedding of the picture tower: `patch_embed`
- attention of both towers: `span_attention`
- the losses: `clip_loss` (a softmax over each row and column), `siglip_loss` (a sigmoid a pair)

Two models are trained, one a stage, and name held-out digits by the caption that is nearest: no digit's class was ever
told. Digits of one kind have one caption: a batch has one picture of each.
"""

import math

import torch
from gallery.digits import NAMES, captions, digits, enlarged
from gallery.training import Score, Stage, System, main
from gallery.words import BOS, EOS, PAD, SIZE, encode
from torch import Generator, Tensor, nn
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

TOWER = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = TOWER | {"image_size": 32, "patch_size": 4}
TEXT = TOWER | {"vocab_size": SIZE, "max_position_embeddings": 8, "bos_token_id": BOS, "eos_token_id": EOS}
TEXT |= {"pad_token_id": PAD}


class Both(nn.Module):
    """The two models side by side."""

    def __init__(self):
        super().__init__()
        text = TEXT | {"projection_dim": 96, "projection_size": 96}
        self.clip = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=96))
        self.siglip = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
        nn.init.constant_(self.siglip.logit_scale, math.log(10))  # as the paper begins
        nn.init.constant_(self.siglip.logit_bias, -10)


def written(labels: Tensor) -> Tensor:
    """Captions as words; all are as long."""
    return torch.tensor([[BOS, *encode(caption), EOS] for caption in captions(labels)])


def batch(generator: Generator) -> dict[str, Tensor]:
    """A picture of each digit, in an order of its own."""
    known = digits()
    order = torch.randperm(len(known.labels), generator=generator)
    chosen = torch.stack([order[known.labels[order] == digit][0] for digit in range(10)])
    return {"input_ids": written(known.labels[chosen]), "pixel_values": enlarged(known.pictures[chosen])}


def zero_shot(model: nn.Module) -> Score:
    unseen, correct = digits(held_out=True), 0
    ids = written(torch.arange(len(NAMES)))
    for pictures, labels in zip(unseen.pictures.split(150), unseen.labels.split(150), strict=True):
        logits = model(input_ids=ids, pixel_values=enlarged(pictures)).logits_per_image
        correct += (logits.argmax(1) == labels).sum().item()
    return Score(correct / len(unseen.labels), 1 / len(NAMES))


def build() -> System:
    both = Both()

    def stage(name: str, model: nn.Module) -> Stage:
        def loss(generator: Generator) -> Tensor:
            return model(**batch(generator), return_loss=True).loss

        return Stage(name, loss, [model], steps=500, rate=1e-3)

    def scores() -> dict[str, Score]:
        return {"zero-shot accuracy, CLIP": zero_shot(both.clip), "SigLIP": zero_shot(both.siglip)}

    return System(both, [stage("CLIP", both.clip), stage("SigLIP", both.siglip)], scores)


if __name__ == "__main__":
    main(build, __doc__)
