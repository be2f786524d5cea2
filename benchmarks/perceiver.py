"""Perceiver pooling's share of the context: norms, keys and values of all layers, attention, forward and backward.

transformers normalises the context anew in every layer, and multiplies each time; here one product serves all layers. A provider whose
output or gradients are not transformers' gets no time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from idefics2_fast.benchmarks.accuracy import off_by
from idefics2_fast.benchmarks.case import ENGINE, Case, Row, Scope
from idefics2_fast.benchmarks.timing import Call, Watch
from idefics2_fast.config import PerceiverConfig
from idefics2_fast.connector import PerceiverResampler
from idefics2_fast.kernels.segments import Segments

HF = "hf"
PHASES = ("forward", "backward")
REQUIRED = 1.1
TOLERANCE = 1e-5  # relative, in fp32
HIDDEN, PATCHES = 4096, 2000


def cases(scope: Scope) -> Iterator[Case]:
    yield pool_case(1024, 1000, scope.device) if scope.quick else pool_case(HIDDEN, PATCHES, scope.device, {HF: REQUIRED})


class Pools:
    """Layers of transformers' resampler and of this engine's with the same weights, without their MLPs, which both would only repeat."""

    def __init__(self, config: PerceiverConfig, hidden: int, device: torch.device) -> None:
        with torch.device("meta"):
            self.theirs, self.ours = _hf_resampler(config, hidden), PerceiverResampler(config, hidden)
        draw = torch.Generator(device).manual_seed(0)
        for theirs, ours in self._layers():
            for module in (*_parts(theirs), *_parts(ours)):
                module.to_empty(device=device)
            with torch.no_grad():
                for parameter in (p for module in _parts(theirs) for p in module.parameters()):
                    parameter.normal_(float(parameter.ndim == 1), 0.1 if parameter.ndim == 1 else hidden**-0.5, generator=draw)
                ours.input_latents_norm.weight.copy_(theirs.input_latents_norm.weight)
                ours.input_context_norm.weight.copy_(theirs.input_context_norm.weight)
                ours.self_attn.q_proj.weight.copy_(theirs.self_attn.q_proj.weight)
                ours.self_attn.kv_proj.weight.copy_(torch.cat([theirs.self_attn.k_proj.weight, theirs.self_attn.v_proj.weight]))
                ours.self_attn.o_proj.weight.copy_(theirs.self_attn.o_proj.weight)

    def hf(self, context: Tensor, latents: Tensor) -> Tensor:
        """Every layer's attention of latents [L, C] to one image's context [P, C] -> [layers, L, C]."""
        outputs = []
        for layer, _ in self._layers():
            own, normed = layer.input_latents_norm(latents), layer.input_context_norm(context)
            outputs.append(layer.self_attn(own[None], normed[None])[0][0])
        return torch.stack(outputs)

    def engine(self, context: Tensor, latents: Tensor) -> Tensor:
        """The same."""
        images = Segments.of_lengths([context.shape[0]], context.device)
        of_layers = self.ours.context_kv(context, self.ours.folded_kv_weight()).chunk(len(self.ours.layers), dim=1)
        layers = zip(self.ours.layers, of_layers, strict=True)
        return torch.stack([layer.self_attn(layer.input_latents_norm(latents), kv, images) for layer, kv in layers])

    def hf_parameters(self) -> list[Tensor]:
        """What both have, in one order: norms, q, k and v, o of every layer."""
        return [p for layer, _ in self._layers() for p in self._in_order(layer)]

    def engine_parameters(self) -> list[Tensor]:
        return [p for _, layer in self._layers() for p in self._in_order(layer)]

    def alike(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """transformers' gradients with those of k and v together, as this engine has them."""
        each = len(gradients) // len(self.theirs.layers)
        made = []
        for start in range(0, len(gradients), each):
            own, context, q, k, v, o = gradients[start : start + each]
            made += [own, context, q, torch.cat([k, v]), o]
        return made

    def _layers(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        return zip(self.theirs.layers, self.ours.layers, strict=True)

    @staticmethod
    def _in_order(layer: nn.Module) -> Iterator[Tensor]:
        return (p for module in _parts(layer) for p in module.parameters())


def _parts(layer: nn.Module) -> tuple[nn.Module, ...]:
    return layer.input_latents_norm, layer.input_context_norm, layer.self_attn


def _hf_resampler(config: PerceiverConfig, hidden: int) -> nn.Module:
    from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
    from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

    theirs = Idefics2PerceiverConfig(
        hidden_size=hidden,
        resampler_n_latents=config.n_latents,
        resampler_depth=config.depth,
        resampler_n_heads=config.n_heads,
        resampler_head_dim=config.head_dim,
        num_key_value_heads=config.num_key_value_heads,
        rms_norm_eps=config.rms_norm_eps,
    )
    theirs._attn_implementation = "sdpa"
    return Idefics2PerceiverResampler(theirs)


def pool_case(hidden: int, patches: int, device: torch.device, needs: Mapping[str, float] | None = None) -> Case:
    """One image's context and the latents, through transformers' layers and this engine's."""
    config = PerceiverConfig()
    pools = Pools(config, hidden, device)
    context = torch.randn(patches, hidden, device=device, requires_grad=True)
    latents = torch.randn(config.n_latents, hidden, device=device, requires_grad=True)
    grad = torch.randn(config.depth, config.n_latents, hidden, device=device)

    def call(run: object, parameters: Sequence[Tensor], theirs: bool) -> Call:
        def timed(watch: Watch) -> list[Tensor]:
            with torch.inference_mode(False), torch.enable_grad():
                watch.start("forward")
                y = run(context, latents)
                watch.start("backward")
                of_context, of_latents, *others = torch.autograd.grad(y, [context, latents, *parameters], grad)
            watch.stop()
            return [y.detach(), of_context, of_latents, *(pools.alike(others) if theirs else others)]

        return timed

    calls = {HF: call(pools.hf, pools.hf_parameters(), True), ENGINE: call(pools.engine, pools.engine_parameters(), False)}
    expected = calls[HF](Watch(device))

    def check(name: str, actual: Sequence[Tensor]) -> str:
        return off_by(actual, expected, TOLERANCE)

    name = f"{patches} patches, hidden {hidden}"
    both = Row(name, PHASES, needs=needs or {}, pass_="both")
    return Case("perceiver", calls, check, (*(Row(name, (phase,), pass_=phase) for phase in PHASES), both))
