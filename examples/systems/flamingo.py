"""Flamingo: a frozen picture tower and a frozen language model, joined by a resampler and gated cross-attention.

Alayrac et al. 2022, https://arxiv.org/abs/2204.14198.

    picture -> patches -> transformer (frozen) -> resampler -> 8 latents a picture
                                                                     |
    <image> four <end of chunk> <image> nine ...  ->  [ gated cross-attention -> 4 layers (frozen) ]  ->  next word

- patch embedding of the picture tower: `patch_embed`
- attention of the towers (all patches) and of the language model (causal): `span_attention`
- the resampler, whose latents see patches and latents: `nn.PerceiverResampler`
- gated cross-attention before every fourth layer of the language model, in which a word sees the last picture before it
  (`RowSpans.media`) through gates that start at zero: `nn.GatedCrossAttentionBlock`
- the loss of the towers: `clip_loss`

Three stages: the picture tower learns beside a text tower, which is dropped then. The language model learns from text
alone, documents of pairs such as "three four, seven eight", whose rule (the same digit, or the next) only the pairs so
far tell. Then both are frozen, and resampler and gated block learn from documents in which a picture stands for the
first word of each pair. Judged is what the paper is about, few-shot learning: the last of five held-out pictures, after
four that show the rule; who learns nothing from examples is right in half of them, as with the first picture.
"""

import torch
import torch.nn.functional as F
from gallery.digits import NAMES, Digits, captions, digits, enlarged
from gallery.training import Score, Stage, System, main
from gallery.words import BOS, EOS, FREE, IMAGE, PAD, SIZE, encode
from torch import Generator, Tensor, nn
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

from mmkernels import RowSpans, clip_loss
from mmkernels.nn import GatedCrossAttentionBlock, PerceiverResampler

END_OF_CHUNK = FREE  # behind each text
PAIRS, RULES = 5, 2  # of a document
LATENTS, EVERY = 8, 4
SHAPE = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4, "vocab_size": SIZE}
SHAPE |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
TOWER = SHAPE | {"num_hidden_layers": 2, "max_position_embeddings": 8, "image_size": 32, "patch_size": 8}
LANGUAGE = SHAPE | {"num_hidden_layers": 4, "max_position_embeddings": 64, "tie_word_embeddings": True}
LANGUAGE |= {"initializer_range": 96**-0.5}  # the 0.02 of models is for layers as wide as theirs
WORDS = torch.tensor([encode(name)[0] for name in NAMES])


class Flamingo(nn.Module):
    def __init__(self):
        super().__init__()
        self.clip = CLIPModel(CLIPConfig(text_config=TOWER, vision_config=TOWER, projection_dim=96))
        self.language = LlamaForCausalLM(LlamaConfig(**LANGUAGE))
        self.resampler = PerceiverResampler(96, 2, 4, 24, LATENTS, hidden_dim=192, form="idefics")
        layers = self.language.model.layers
        self.gated = nn.ModuleList(GatedCrossAttentionBlock(96, 192, 4, qk_norm=None) for _ in layers[::EVERY])

    def forward(self, ids: Tensor, pictures: Tensor | None = None) -> Tensor:
        """(B, T) words, (B, pictures, 8, 8) that stand at <image> -> (B, T, words)."""
        language = self.language.model
        hidden, places = language.embed_tokens(ids), torch.arange(ids.shape[1])[None]
        rotary = language.rotary_emb(hidden, places)
        if pictures is not None:
            patches = self.clip.vision_model(enlarged(pictures.flatten(0, 1))).last_hidden_state
            latents = self.resampler(patches).unflatten(0, pictures.shape[:2]).flatten(1, 2)
            seen = RowSpans.media(ids == IMAGE, LATENTS, num_keys=latents.shape[1])
        for number, layer in enumerate(language.layers):
            if pictures is not None and number % EVERY == 0:
                hidden = self.gated[number // EVERY](hidden, latents, seen)
            hidden = layer(hidden, position_ids=places, position_embeddings=rotary)
        return self.language.lm_head(language.norm(hidden))


def drawn(of: Digits, count: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Of `count` documents: pictures, their digits, and the digits that the document's rule makes of them."""
    found = of.draw(count * PAIRS, generator)
    labels = found.labels.unflatten(0, (count, PAIRS))
    rules = torch.randint(RULES, (count, 1), generator=generator)
    return found.pictures.unflatten(0, (count, PAIRS)), labels, (labels + rules) % len(NAMES)


def written(firsts: Tensor, seconds: Tensor) -> Tensor:
    """(B, pairs) words, or <image>, that begin the pairs, and (B, pairs) digits that end them -> (B, T) words."""
    pairs = torch.stack([firsts, WORDS[seconds], torch.full_like(firsts, END_OF_CHUNK)], -1)
    return F.pad(pairs.flatten(1), (1, 0), value=BOS)


def build() -> System:
    flamingo = Flamingo()
    clip = flamingo.clip

    def captioned(generator: Generator) -> Tensor:
        """Digits of one kind have one caption, which is right for all of them."""
        some, kinds = digits().draw(32, generator), torch.arange(len(NAMES))
        ids = torch.tensor([[BOS, *encode(caption), EOS] for caption in captions(kinds)])
        images = F.normalize(clip.get_image_features(enlarged(some.pictures)).pooler_output, dim=-1)
        texts = F.normalize(clip.get_text_features(ids).pooler_output, dim=-1)
        return clip_loss(images, texts, clip.logit_scale.exp(), image_ids=some.labels, text_ids=kinds)

    def loss(ids: Tensor, pictures: Tensor | None = None) -> Tensor:
        """Of all words but those that begin a pair, which nobody can know."""
        logits, wanted = flamingo(ids, pictures)[:, :-1], ids[:, 1:]
        logits, wanted = (x.unflatten(1, (PAIRS, 3))[:, :, 1:].flatten(0, 2) for x in (logits, wanted))
        return F.cross_entropy(logits, wanted)

    def read(generator: Generator) -> Tensor:
        _, firsts, seconds = drawn(digits(), 32, generator)
        return loss(written(WORDS[firsts], seconds))

    def interleaved(generator: Generator) -> Tensor:
        pictures, firsts, seconds = drawn(digits(), 16, generator)
        return loss(written(torch.full_like(firsts, IMAGE), seconds), pictures)

    def scores() -> dict[str, Score]:
        pictures, firsts, seconds = drawn(digits(held_out=True), 400, Generator().manual_seed(0))
        said = flamingo(written(torch.full_like(firsts, IMAGE), seconds), pictures).argmax(-1)[:, 1::3]
        right = (said == WORDS[seconds]).float().mean(0).tolist()
        first = Score(right[0], 1 / len(NAMES))
        return {"the first picture": first, "the fifth, after four examples": Score(right[-1], 1 / RULES)}

    stages = [
        Stage("tower", captioned, [clip], steps=250, rate=1e-3),
        Stage("language model", read, [flamingo.language], steps=200, rate=1e-3),
        Stage("resampler and gated block", interleaved, [flamingo.resampler, flamingo.gated], steps=450),
    ]
    return System(flamingo, stages, scores)


if __name__ == "__main__":
    main(build, __doc__)
