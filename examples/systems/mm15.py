"""MM1 and MM1.5: documents, captions and text in one pre-training; pictures split as their shape asks; experts.

McKinzie et al. 2024, https://arxiv.org/abs/2403.09611; Zhang et al. 2024, https://arxiv.org/abs/2409.20566.

    picture -> sub-pictures, and last a small copy of all
                 |
                 '-> patches -> transformer -> convolutions -> pooled to 2 x 2 -> convolutions -> linear -.
                                                                                                          v
    text, with pictures anywhere in it -------------> words -----------------------------> language model -> text

- patch embedding of the picture tower: `patch_embed`
- attention of the tower (all patches) and of the language model (causal, padded): `span_attention`
- convolutions of the connector (a C-Abstractor), rotary embedding and experts of the language model: their own

Two models, alike but for the language model. That of one is dense; in the other's every second layer two of four
experts serve each word. Three stages each, with all parameters in all of them: pre-training on documents with pictures
in them, captions and plain text, as 45 : 45 : 10; then pictures of several digits, split, are read aloud; then
questions about two digits side by side, split.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import transformers as hf
from gallery.digits import NAMES, Questions, blind_accuracy, digits, draw_questions, held_out_questions, side_by_side
from gallery.training import Score, Stage, System, main
from gallery.words import BOS, EOS, IGNORED, IMAGE, PAD, SIZE, THUMBNAIL, TILES, accuracy, batch, encode
from torch import Generator, Tensor, nn
from transformers.modeling_outputs import ModelOutput
from transformers.models.mistral.modeling_mistral import MistralMLP

SIDE, PATCH, POOLED = 32, 8, 2
TOKENS = [IMAGE] * POOLED**2  # of a picture
VISION = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": SIDE, "patch_size": PATCH}
TEXT = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "vocab_size": SIZE, "max_position_embeddings": 128, "sliding_window": None}
TEXT |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.01, "output_router_logits": True}
Z_LOSS = 1e-3  # keeps the logits small that choose the experts


class Convolutions(nn.Module):
    """A residual block, as RegNet has them."""

    def __init__(self, width: int = VISION["hidden_size"]):
        super().__init__()
        layers = [nn.Conv2d(width, width, 1), nn.GroupNorm(1, width), nn.SiLU()]
        layers += [nn.Conv2d(width, width, 3, padding=1, groups=4), nn.GroupNorm(1, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, width, 1))

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.layers(maps)


class MM1(nn.Module):
    def __init__(self, language_model: nn.Module):
        super().__init__()
        self.tower = hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION))
        self.abstract = nn.Sequential(Convolutions(), nn.AdaptiveAvgPool2d(POOLED), Convolutions())
        self.project = nn.Linear(VISION["hidden_size"], TEXT["hidden_size"])
        self.language_model = language_model

    def forward(self, pixels: Tensor, input_ids: Tensor, **rest: Tensor) -> ModelOutput:
        """pixels: (N, 3, SIDE, SIDE), in the order in which pictures stand in the rows."""
        maps = self.tower(pixels).last_hidden_state[:, 1:].transpose(1, 2).unflatten(2, (SIDE // PATCH, -1))
        tokens = self.project(self.abstract(maps).flatten(2).transpose(1, 2))
        embedded = self.language_model.get_input_embeddings()(input_ids)
        embedded = embedded.masked_scatter((input_ids == IMAGE)[..., None], tokens.to(embedded.dtype))
        return self.language_model(inputs_embeds=embedded, **rest)


def split(pictures: Tensor) -> tuple[Tensor, list[int]]:
    """(N, k, 8, 8) -> (N, k + 1, 3, SIDE, SIDE), and the words in whose place they come: k sub-pictures, then all of
    the picture, small, which can attend to them. A picture that needs no splitting stays as it is."""
    whole = side_by_side(pictures, SIDE)
    columns = whole.shape[3] // whole.shape[2]
    if columns == 1:
        return whole[:, None], TOKENS
    small = F.interpolate(whole, (SIDE // columns, SIDE), mode="bilinear", antialias=True)
    rim = (SIDE - small.shape[2]) // 2
    small = F.pad(small, (0, 0, rim, rim), value=-1)
    words = [word for tile in TILES[:columns] for word in (tile, *TOKENS)]
    return torch.stack([*whole.split(SIDE, 3), small], 1), [*words, THUMBNAIL, *TOKENS]


def pre_training(generator: Generator) -> dict[str, Tensor]:
    """14 captions, 14 documents, 4 texts. All words are learned, pictures are not."""
    single, asked = digits().draw(14, generator), draw_questions(digits(), 18, generator)
    rows = [[*TOKENS, *encode(f"a handwritten {NAMES[label]}")] for label in single.labels.tolist()]
    for i, pair in enumerate(asked.labels.tolist()):
        left, right = (encode(f"the {side} digit {NAMES[of]}") for side, of in (("left", pair[0]), ("right", pair[1])))
        spoken = encode(f"{asked.questions[i]} {asked.answers[i]}")
        rows.append([*TOKENS, *left, *TOKENS, *right] if i < 14 else [*left, *right, *spoken])
    made = batch([[BOS]] * len(rows), rows)
    made["labels"][made["labels"] == IMAGE] = IGNORED
    pictures = torch.cat([single.pictures, asked.pictures[:14].flatten(0, 1)])
    return made | {"pixels": side_by_side(pictures[:, None], SIDE)}


def reading(generator: Generator) -> dict[str, Tensor]:
    """Pictures of one, two and three digits."""
    prompts, answers, pixels = [], [], []
    for many in (1, 2, 3):
        drawn = digits().draw(10 * many, generator)
        tiles, words = split(drawn.pictures.view(10, many, 8, 8))
        prompts += [[BOS, *words]] * 10
        answers += [encode(" and ".join(NAMES[label] for label in row)) for row in drawn.labels.view(10, many).tolist()]
        pixels.append(tiles.flatten(0, 1))
    return batch(prompts, answers) | {"pixels": torch.cat(pixels)}


def answering(asked: Questions) -> dict[str, Tensor]:
    tiles, words = split(asked.pictures)
    prompts = [[BOS, *words, *encode(text)] for text in asked.questions]
    return batch(prompts, [encode(answer) for answer in asked.answers]) | {"pixels": tiles.flatten(0, 1)}


def build() -> System:
    dense = hf.MistralForCausalLM(hf.MistralConfig(**TEXT))
    experts = hf.MixtralForCausalLM(hf.MixtralConfig(**TEXT, **EXPERTS))
    for layer in experts.model.layers[::2]:
        layer.mlp = MistralMLP(experts.config)
    models = nn.ModuleDict({"dense": MM1(dense), "experts": MM1(experts)})
    batches = {"pre-training": (pre_training, 120), "reading": (reading, 150)}
    batches["questions"] = lambda generator: answering(draw_questions(digits(), 32, generator)), 250

    def stage(model: str, name: str, drawn: Callable[[Generator], dict[str, Tensor]], steps: int) -> Stage:
        def loss(generator: Generator) -> Tensor:
            output = models[model](**drawn(generator))
            routed = getattr(output, "router_logits", ())
            return output.loss + Z_LOSS * sum(logits.logsumexp(-1).square().mean() for logits in routed)

        return Stage(f"{model}, {name}", loss, [models[model]], steps, rate=1e-3)

    def scores() -> dict[str, Score]:
        asked = held_out_questions()
        inputs = answering(asked)
        labels = inputs.pop("labels")
        right = {name: accuracy(model(**inputs).logits, labels) for name, model in models.items()}
        return {f"answers to questions, {name}": Score(each, blind_accuracy(asked)) for name, each in right.items()}

    return System(models, [stage(model, name, *batches[name]) for model in models for name in batches], scores)


if __name__ == "__main__":
    main(build, __doc__)
