"""Every model class of transformers, and how to build it tiny."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from . import inputs, overrides, shrink, sizes
from .cases import Case
from .subject import CannotBeBuilt, Subject, first_that_runs

HAS_NAMES = True
MOST_PARAMETERS = 60_000_000  # what is larger than this after all shrinking is not built
TOWERS = ("vision_config", "audio_config")
# Heads of one linear layer or two over a base model that is swept itself.
PLAIN_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
PLAIN_HEADS += ("ForNextSentencePrediction", "ForQuestionAnsweringSimple", "ForImageClassification", "ForXVector")
PLAIN_HEADS += ("ForAudioClassification", "ForAudioFrameClassification", "ForVideoClassification")


def version() -> str:
    return transformers.__version__


def cases(names: Collection[str] = (), plain_heads: bool = False) -> list[Case]:
    import mmkernels.integrations.transformers  # noqa: F401  (registers the name, before processes are forked)

    transformers.logging.set_verbosity_error()
    found = []
    for family in families():
        if names and family not in names:
            continue
        known = classes(family)
        kept = [name for name in known if plain_heads or not name.endswith(PLAIN_HEADS)]
        found += [Case("transformers", family, name) for name in kept or known]
    return found


def subject(case: Case) -> Subject:
    cls = classes(case.family)[case.name]
    if isinstance(cls, CannotBeBuilt):
        raise cls
    sizes_tried = (
        (name, lambda name=name, make=make: build(cls, make(), surely_small=name == "tiny"))
        for name, make in configurations(cls, case.family)
    )
    return first_that_runs(sizes_tried, lambda model: inputs.candidates(model, case.family))


def families() -> list[str]:
    import transformers.models

    root = Path(transformers.models.__path__[0])
    return sorted(path.name for path in root.iterdir() if any(path.glob("modeling_*.py")))


def classes(family: str) -> dict[str, type | CannotBeBuilt]:
    """By name: those defined in the family's own files that have a forward, or why a file of the family is not read."""
    import transformers.models
    from transformers import PreTrainedModel

    root, found = Path(transformers.models.__path__[0]), {}
    for path in sorted((root / family).glob("modeling_*.py")):
        name = f"transformers.models.{family}.{path.stem}"
        try:
            module = importlib.import_module(name)
        except Exception as error:  # an optional package that is missing, mostly
            found[path.stem] = CannotBeBuilt(f"import: {error}")
            continue
        for cls_name in getattr(module, "__all__", ()):  # what is not public is a part of what is
            cls = getattr(module, cls_name)
            if (
                inspect.isclass(cls)
                and issubclass(cls, PreTrainedModel)
                and cls.__module__ == name
                and _is_a_model(cls)
            ):
                found[cls_name] = cls
    return found


def _is_a_model(cls: type) -> bool:
    return not cls.__name__.endswith(("PreTrainedModel", "PretrainedModel")) and (
        _has_forward(cls) and getattr(cls, "config_class", None) is not None
    )


def _has_forward(cls: type) -> bool:
    return cls.forward is not nn.Module.forward


def configurations(cls: type, family: str) -> Iterator[tuple[str, Any]]:
    """Its configuration, smallest first: all sizes cut; layers and vocabulary only; as it comes."""
    config_class = cls.config_class
    if not inspect.isclass(config_class):  # a union of classes
        config_class = config_class.__args__[-1]
    default = _default(config_class, family)
    for name, cut in (("tiny", shrink.shrunk), ("fewer layers", shrink.fewer_layers)):
        data = cut(default.to_dict())
        data.pop("model_type", None)
        _override(data, family, cls, config_class.__name__)
        yield name, lambda data=data: _with_rotary_sections(config_class.from_dict(data))
    yield "default", lambda: default


def _with_rotary_sections(config: Any) -> Any:
    """The pairs of a head that turn with time, height and width, where its configuration knows of them: code has
    defaults of its own for heads of the size that models are trained with."""
    for _, part in [("", config), *sizes.walk(config)]:
        if "mrope_section" not in getattr(part, "ignore_keys_at_rope_validation", ()):
            continue
        head = getattr(part, "head_dim", None) or part.hidden_size // part.num_attention_heads
        for rope in shrink.rope_dicts(getattr(part, "rope_parameters", None)):
            if "rope_type" in rope:
                pairs = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
                rope["mrope_section"] = [pairs // 4, pairs // 4, pairs - 2 * (pairs // 4)]
    return config


def _default(config_class: type, family: str) -> Any:
    """With the towers that a model may have and need not."""
    specs = getattr(config_class, "sub_configs_defaults", {})
    towers = {name: {} for name, spec in specs.items() if getattr(spec, "optional", False) and name in TOWERS}
    return config_class(**towers | overrides.FIRST.get(config_class.__name__, {}))


def _override(data: dict, family: str, cls: type, config_name: str) -> None:
    for path, value in overrides.SIZES.get(family, {}).items():
        owner, _, path = path.rpartition(":")
        if owner and owner not in (config_name, cls.__name__):
            continue
        *parents, name = path.split(".")
        part = data
        for parent in parents:
            part = part.get(parent) if isinstance(part, dict) else None
        if not isinstance(part, dict):
            continue
        if value is overrides.OUT:
            part.pop(name, None)
        else:
            part[name] = value


def build(cls: type, config: Any, surely_small: bool) -> nn.Module:
    """With random weights of its own initialisation, unless it would be large."""
    with torch.device("meta"):
        try:
            count = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
        except Exception:
            if not surely_small:
                raise
            count = 0  # some cannot be built without values
    if count > MOST_PARAMETERS:
        raise CannotBeBuilt(f"{count / 1e6:.0f} million parameters at its smallest")
    return cls._from_config(config)
