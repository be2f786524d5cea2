"""The shape of an Idefics2 model: frozen, checked, and convertible to and from Hugging Face's `config.json`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger("idefics2_fast")

# The released config.json gives the perceiver no eps. The model was trained with the text model's 1e-5.
TRAINED_PERCEIVER_EPS = 1e-5


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP at native resolution (NaViT): `image_size` is the side of the position table in pixels, not a limit on images."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 980
    patch_size: int = 14
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            f"vision hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}",
        )

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
class PerceiverConfig:
    """The resampler that pools an image of any size to `n_latents` tokens of the text model's width."""

    n_latents: int = 64
    depth: int = 3
    n_heads: int = 16
    head_dim: int = 96
    num_key_value_heads: int = 4
    rms_norm_eps: float = TRAINED_PERCEIVER_EPS

    def __post_init__(self) -> None:
        _require(
            self.n_heads % self.num_key_value_heads == 0,
            f"perceiver n_heads {self.n_heads} is not a multiple of num_key_value_heads {self.num_key_value_heads}",
        )


@dataclass(frozen=True)
class TextConfig:
    """Mistral. `sliding_window` None means full causal attention."""

    vocab_size: int = 32003
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 32768
    sliding_window: int | None = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"text num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads {self.num_key_value_heads}",
        )
        _require(self.head_dim % 2 == 0, f"text head_dim {self.head_dim} must be even for rotary positions")


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
        _require(
            0 <= self.image_token_id < self.text.vocab_size,
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
        return _from_hf(_read(source), perceiver_rms_norm_eps)

    def to_hf(self) -> dict[str, Any]:
        """The contents of a config.json that transformers loads as the same model."""
        return _to_hf(self)


def _read(source: Any) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return dict(source)
    if hasattr(source, "to_dict"):
        return source.to_dict()
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no Idefics2 configuration at {path}: expected the folder of a checkpoint or its config.json")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    _require(isinstance(config, dict), f"{path} holds {type(config).__name__}, expected an object")
    return config


def _only(section: str, given: Mapping[str, Any], key: str, *expected: Any) -> None:
    """Refuses a setting that the engine does not implement, rather than ignoring it."""
    value = given.get(key, expected[0])
    _require(value in expected, f"{section}.{key} = {value!r} is not supported: expected {' or '.join(map(repr, expected))}")


def _from_hf(hf: Mapping[str, Any], perceiver_rms_norm_eps: float | None) -> Idefics2Config:
    _require(hf.get("model_type") == "idefics2", f"model_type is {hf.get('model_type')!r}, expected 'idefics2'")
    if quantization := hf.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        bits = next((f"{n}-bit " for n in (4, 8) if isinstance(quantization, Mapping) and quantization.get(f"load_in_{n}bit")), "")
        raise ValueError(f"the checkpoint is quantised ({bits}{method}): expected plain bf16, fp16 or fp32 weights")
    text, vision, perceiver = (hf.get(f"{part}_config") or {} for part in ("text", "vision", "perceiver"))
    _only("config", hf, "tie_word_embeddings", False)
    _only("text_config", text, "tie_word_embeddings", False, hf.get("tie_word_embeddings", False))
    _only("text_config", text, "model_type", "mistral")
    _only("text_config", text, "hidden_act", "silu")
    _only("vision_config", vision, "hidden_act", "gelu_pytorch_tanh")
    _only("vision_config", vision, "num_channels", 3)
    _only("perceiver_config", perceiver, "hidden_act", "silu")
    for name, section in (("text_config", text), ("vision_config", vision), ("perceiver_config", perceiver)):
        _only(name, section, "attention_dropout", 0.0)
    return Idefics2Config(
        vision=_vision_from_hf(vision),
        perceiver=_perceiver_from_hf(perceiver, perceiver_rms_norm_eps),
        text=_text_from_hf(text),
        image_token_id=hf.get("image_token_id", 32001),
        bos_token_id=text.get("bos_token_id") or 1,
        eos_token_ids=_as_tuple(hf.get("eos_token_id") or text.get("eos_token_id") or 2),
    )


def _as_tuple(ids: int | list[int]) -> tuple[int, ...]:
    return (ids,) if isinstance(ids, int) else tuple(ids)


def _vision_from_hf(hf: Mapping[str, Any]) -> VisionConfig:
    # transformers' own defaults for keys that a file leaves out
    names = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    names |= {"image_size": 224, "patch_size": 32, "layer_norm_eps": 1e-6}
    return VisionConfig(**{name: hf.get(name, default) for name, default in names.items()})


def _perceiver_from_hf(hf: Mapping[str, Any], eps: float | None) -> PerceiverConfig:
    if "rms_norm_eps" in hf:
        if eps is not None and eps != hf["rms_norm_eps"]:
            logger.warning("perceiver_rms_norm_eps=%g is ignored: config.json gives %g", eps, hf["rms_norm_eps"])
        eps = hf["rms_norm_eps"]
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
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    _require(rope_type == "default", f"text_config rope_type {rope_type!r} is not supported: expected 'default'")
    names = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    names |= {"num_key_value_heads": 8, "max_position_embeddings": 32768, "sliding_window": 4096, "rms_norm_eps": 1e-5}
    known = {name: hf.get(name, default) for name, default in names.items()}
    known["num_key_value_heads"] = known["num_key_value_heads"] or known["num_attention_heads"]
    return TextConfig(
        **known,
        head_dim=hf.get("head_dim") or known["hidden_size"] // known["num_attention_heads"],
        rope_theta=rope.get("rope_theta", hf.get("rope_theta", 10000.0)),
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
