"""The shape of an Idefics2 model: frozen, checked, and convertible to and from Hugging Face's `config.json`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from idefics2_fast.json_files import OBJECT, Field, either, listed, optional, read_object, real, short, whole

logger = logging.getLogger("idefics2_fast")

# The released config.json gives the perceiver no eps. The model was trained with the text model's 1e-5.
TRAINED_PERCEIVER_EPS = 1e-5

# What sizes may be: each a hundred times what such models have, and small enough that products of all fit 64 bits.
WIDTH, DEPTH, HEADS = whole(1, 2**20), whole(1, 2**12), whole(1, 2**12)
EPS = real(0.0, 1.0)
TOKEN_ID = whole(0, 2**31 - 1)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _checked(default: Any, check: Field) -> Any:
    """A field of a dataclass with a default and what it must be."""
    return field(default=default, metadata={"check": check})


def fields_of(section: type) -> dict[str, Field]:
    """What each field of a part of the configuration must be, by its name."""
    return {each.name: each.metadata["check"] for each in fields(section)}


class _Section:
    """A part of the configuration; its fields are checked when it is made."""

    name = ""

    def __post_init__(self) -> None:
        for name, check in fields_of(type(self)).items():
            check.check(getattr(self, name), f"{self.name}.{name}")

    def _multiple(self, larger: str, smaller: str) -> None:
        count, of = getattr(self, larger), getattr(self, smaller)
        _require(count % of == 0, f"{self.name}.{larger} is {count}, expected a multiple of {smaller} {of}")


@dataclass(frozen=True)
class VisionConfig(_Section):
    """SigLIP at native resolution (NaViT): `image_size` is the side of the position table in pixels, not a limit on images."""

    name = "vision_config"

    hidden_size: int = _checked(1152, WIDTH)
    intermediate_size: int = _checked(4304, WIDTH)
    num_hidden_layers: int = _checked(27, DEPTH)
    num_attention_heads: int = _checked(16, HEADS)
    image_size: int = _checked(980, whole(1, 2**20))
    patch_size: int = _checked(14, whole(1, 2**10))
    layer_norm_eps: float = _checked(1e-6, EPS)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._multiple("hidden_size", "num_attention_heads")
        where = f"{self.name}.image_size is {self.image_size}, expected patch_size {self.patch_size}"
        _require(self.image_size >= self.patch_size, f"{where} at least")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def positions_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def patch_dim(self) -> int:
        """Values in one patch, in Conv2d's order (channel, row, column)."""
        return 3 * self.patch_size * self.patch_size


@dataclass(frozen=True)
class PerceiverConfig(_Section):
    """The resampler that pools an image of any size to `n_latents` tokens of the text model's width."""

    name = "perceiver_config"

    n_latents: int = _checked(64, whole(1, 2**16))
    depth: int = _checked(3, DEPTH)
    n_heads: int = _checked(16, HEADS)
    head_dim: int = _checked(96, WIDTH)
    num_key_value_heads: int = _checked(4, HEADS)
    rms_norm_eps: float = _checked(TRAINED_PERCEIVER_EPS, EPS)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._multiple("n_heads", "num_key_value_heads")


@dataclass(frozen=True)
class TextConfig(_Section):
    """Mistral. `sliding_window` None means full causal attention."""

    name = "text_config"

    vocab_size: int = _checked(32003, whole(1, 2**24))
    hidden_size: int = _checked(4096, WIDTH)
    intermediate_size: int = _checked(14336, WIDTH)
    num_hidden_layers: int = _checked(32, DEPTH)
    num_attention_heads: int = _checked(32, HEADS)
    num_key_value_heads: int = _checked(8, HEADS)
    head_dim: int = _checked(128, WIDTH)
    max_position_embeddings: int = _checked(32768, whole(1, 2**31 - 1))
    sliding_window: int | None = _checked(4096, optional(whole(1, 2**31 - 1)))
    rope_theta: float = _checked(10000.0, real(1.0, 1e30))
    rms_norm_eps: float = _checked(1e-5, EPS)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._multiple("num_attention_heads", "num_key_value_heads")
        _require(self.head_dim % 2 == 0, f"text_config.head_dim is {self.head_dim}, expected an even number, for rotary positions")


@dataclass(frozen=True)
class Idefics2Config:
    """A whole model.

    Args:
        image_token_id: id of `<image>`, the placeholder that image features replace (64 of them per image in the released model).
        eos_token_ids: ids that end a generated text.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    perceiver: PerceiverConfig = field(default_factory=PerceiverConfig)
    text: TextConfig = field(default_factory=TextConfig)
    image_token_id: int = 32001
    bos_token_id: int = 1
    eos_token_ids: tuple[int, ...] = (2,)

    def __post_init__(self) -> None:
        for name in ("image_token_id", "bos_token_id"):
            TOKEN_ID.check(getattr(self, name), name)
        listed(TOKEN_ID, least=1).check(self.eos_token_ids, "eos_token_id")
        _require(
            self.image_token_id < self.text.vocab_size,
            f"image_token_id {self.image_token_id} is outside the vocabulary of {self.text.vocab_size}",
        )

    @classmethod
    def named(cls, name: str) -> Idefics2Config:
        """One of the named sizes: `idefics2-8b` (the released geometry), `small` (79M, trains on a laptop), `tiny` (5M)."""
        if name not in NAMED:
            raise ValueError(f"unknown size {name!r}: expected one of {', '.join(NAMED)}")
        return NAMED[name]

    @classmethod
    def from_hf(cls, source: Any, *, perceiver_rms_norm_eps: float | None = None) -> Idefics2Config:
        """Reads Hugging Face's configuration.

        Args:
            source: the folder of a checkpoint, a config.json, its parsed contents, or a `transformers.Idefics2Config`.
            perceiver_rms_norm_eps: used where the file gives none, as the released one does: 1e-5, as trained, unless this
                says otherwise (1e-6 gives what transformers 5.x computes). A value in the file always wins.

        Raises:
            ValueError: not an Idefics2 configuration, or one that this engine does not run (quantised, tied, another activation).
        """
        values, path = _read(source)
        try:
            return _from_hf(values, perceiver_rms_norm_eps)
        except ValueError as error:
            raise ValueError(f"{path}: {error}" if path else str(error)) from None

    def to_hf(self) -> dict[str, Any]:
        """The contents of a config.json that transformers loads as the same model."""
        return _to_hf(self)


def _read(source: Any) -> tuple[Mapping[str, Any], Path | None]:
    """The contents, and the file that they came from."""
    if isinstance(source, Mapping):
        return source, None
    if hasattr(source, "to_dict"):
        return source.to_dict(), None
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no Idefics2 configuration at {path}: expected the folder of a checkpoint or its config.json")
    return read_object(path), path


def _only(section: str, given: Mapping[str, Any], key: str, *expected: Any) -> None:
    """Refuses a setting that the engine does not implement, rather than ignoring it."""
    value = given.get(key, expected[0])
    supported = " or ".join(map(repr, expected))
    known = isinstance(value, bool | int | float | str) and value in expected
    _require(known, f"{section}.{key} = {short(value)} is not supported: expected {supported}")


def section_of(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object inside an object; empty where it is absent or null.

    Raises:
        ValueError: it is anything else.
    """
    section = values.get(name)
    return {} if section is None else OBJECT.check(section, name)


def _from_hf(hf: Mapping[str, Any], perceiver_rms_norm_eps: float | None) -> Idefics2Config:
    _require(hf.get("model_type") == "idefics2", f"model_type is {short(hf.get('model_type'))}, expected 'idefics2'")
    if quantization := hf.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else short(quantization)
        bits = next((f"{n}-bit " for n in (4, 8) if isinstance(quantization, Mapping) and quantization.get(f"load_in_{n}bit")), "")
        raise ValueError(f"the checkpoint is quantised ({bits}{method}): expected plain bf16, fp16 or fp32 weights")
    text, vision, perceiver = (section_of(hf, f"{part}_config") for part in ("text", "vision", "perceiver"))
    _only("config", hf, "tie_word_embeddings", False)
    _only("text_config", text, "tie_word_embeddings", False)
    _only("text_config", text, "model_type", "mistral")
    _only("text_config", text, "hidden_act", "silu")
    _only("vision_config", vision, "hidden_act", "gelu_pytorch_tanh")
    _only("vision_config", vision, "num_channels", 3)
    _only("perceiver_config", perceiver, "hidden_act", "silu")
    for name, section in (("text_config", text), ("vision_config", vision), ("perceiver_config", perceiver)):
        _only(name, section, "attention_dropout", 0.0)
    eos = _first(hf.get("eos_token_id"), text.get("eos_token_id"), 2)
    either(TOKEN_ID, listed(TOKEN_ID, least=1)).check(eos, "eos_token_id")
    return Idefics2Config(
        vision=_vision_from_hf(vision),
        perceiver=_perceiver_from_hf(perceiver, perceiver_rms_norm_eps),
        text=_text_from_hf(text),
        image_token_id=hf.get("image_token_id", 32001),
        bos_token_id=_first(text.get("bos_token_id"), 1),
        eos_token_ids=(eos,) if isinstance(eos, int) else tuple(eos),
    )


def _first(*values: Any) -> Any:
    """The first value that is not null; 0 is one."""
    return next(value for value in values if value is not None)


def _vision_from_hf(hf: Mapping[str, Any]) -> VisionConfig:
    # transformers' own defaults for keys that a file leaves out
    names = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    names |= {"image_size": 224, "patch_size": 32, "layer_norm_eps": 1e-6}
    return VisionConfig(**{name: hf.get(name, default) for name, default in names.items()})


def _perceiver_from_hf(hf: Mapping[str, Any], eps: float | None) -> PerceiverConfig:
    if "rms_norm_eps" in hf:
        given = EPS.check(hf["rms_norm_eps"], "perceiver_config.rms_norm_eps")
        if eps is not None and eps != given:
            logger.warning("perceiver_rms_norm_eps=%g is ignored: config.json gives %g", eps, given)
        eps = given
    elif eps is None:
        eps = TRAINED_PERCEIVER_EPS
        logger.warning("config.json gives no perceiver rms_norm_eps: using %g, as trained (transformers 5.x uses 1e-6)", eps)
    return PerceiverConfig(
        n_latents=hf.get("resampler_n_latents", 64),
        depth=hf.get("resampler_depth", 3),
        n_heads=hf.get("resampler_n_heads", 16),
        head_dim=hf.get("resampler_head_dim", 96),
        num_key_value_heads=hf.get("num_key_value_heads", 4),
        rms_norm_eps=eps,
    )


def _text_from_hf(hf: Mapping[str, Any]) -> TextConfig:
    rope = section_of(hf, "rope_parameters") or section_of(hf, "rope_scaling")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    _require(rope_type == "default", f"text_config rope_type {short(rope_type)} is not supported: expected 'default'")
    names = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    # A section that is not there is Idefics2's own in transformers, one that is there has Mistral's values for what it leaves out.
    positions, eps = (131072, 1e-6) if hf else (32768, 1e-5)
    names |= {"num_key_value_heads": 8, "max_position_embeddings": positions, "sliding_window": 4096, "rms_norm_eps": eps}
    known = {name: hf.get(name, default) for name, default in names.items()}
    heads = HEADS.check(known["num_attention_heads"], "text_config.num_attention_heads")
    width = WIDTH.check(known["hidden_size"], "text_config.hidden_size")
    known["num_key_value_heads"] = _first(known["num_key_value_heads"], heads)
    return TextConfig(
        **known,
        head_dim=_first(hf.get("head_dim"), width // heads),
        rope_theta=_first(rope.get("rope_theta"), hf.get("rope_theta"), 10000.0),
    )


def _to_hf(config: Idefics2Config) -> dict[str, Any]:
    vision, perceiver, text = config.vision, config.perceiver, config.text
    shared = {"attention_dropout": 0.0, "initializer_range": 0.02}
    eos = list(config.eos_token_ids) if len(config.eos_token_ids) > 1 else config.eos_token_ids[0]
    return {
        "architectures": ["Idefics2ForConditionalGeneration"],
        "model_type": "idefics2",
        "image_token_id": config.image_token_id,
        "tie_word_embeddings": False,
        "vision_config": vars(vision) | shared | {"model_type": "idefics2_vision", "hidden_act": "gelu_pytorch_tanh", "num_channels": 3},
        "perceiver_config": shared
        | {
            "model_type": "idefics2_perceiver",
            "hidden_act": "silu",
            "hidden_size": text.hidden_size,
            "resampler_n_latents": perceiver.n_latents,
            "resampler_depth": perceiver.depth,
            "resampler_n_heads": perceiver.n_heads,
            "resampler_head_dim": perceiver.head_dim,
            "num_key_value_heads": perceiver.num_key_value_heads,
            "rms_norm_eps": perceiver.rms_norm_eps,
        },
        "text_config": {name: value for name, value in vars(text).items() if name != "rope_theta"}
        | shared
        | {
            "model_type": "mistral",
            "hidden_act": "silu",
            "bos_token_id": config.bos_token_id,
            "eos_token_id": eos,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_theta": text.rope_theta, "rope_type": "default"},
        },
    }


NAMED = {
    "idefics2-8b": Idefics2Config(eos_token_ids=(2, 32002)),
    "small": Idefics2Config(
        vision=VisionConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=6),
        perceiver=PerceiverConfig(depth=2, n_heads=8, head_dim=64, num_key_value_heads=2),
        text=TextConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=8,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=64,
            max_position_embeddings=8192,
        ),
        eos_token_ids=(2, 32002),
    ),
    "tiny": Idefics2Config(
        vision=VisionConfig(hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4),
        perceiver=PerceiverConfig(depth=2, n_heads=4, head_dim=16, num_key_value_heads=2),
        text=TextConfig(
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=4096,
        ),
        eos_token_ids=(2, 32002),
    ),
}
