"""Patch embedding as modules: one that does all of it, and drop-ins for the convolutions that models use for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import backends
from ..ops.patch_embed import patch_embed
from ._tracing import is_traced


class PatchEmbed(nn.Module):
    """From images, videos or patch rows to the tokens of a vision transformer, in one call of `mmkernels.patch_embed`.

    Args:
        in_channels, embed_dim: C and E.
        patch_size: P, (P, P), or (T, P, P) for patches that span T frames.
        bias: whether to learn a bias of (E,).
        num_patches: if given, learn a position for each of that many patches (and for each prefix token).
        num_prefix: how many learned tokens (a class token, registers) to put before the patches.
        mean, std: C numbers each; uint8 images are then embedded as (images / 255 - mean) / std.
        device, dtype: of the parameters.

    Parameters: `weight` (E, C, [T,] P, P) and `bias` (E,) as a convolution stores them; `pos_embed`
    (num_prefix + num_patches, E) and `prefix` (num_prefix, E) where asked for, else None.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dim: int,
        patch_size: int | Sequence[int],
        *,
        bias: bool = True,
        num_patches: int | None = None,
        num_prefix: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        size = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
        if len(size) not in (2, 3):
            raise ValueError(f"PatchEmbed: patch_size is {patch_size}; accepted are P, (P, P) and (T, P, P)")
        if (mean is None) != (std is None) or (mean is not None and not len(mean) == len(std) == in_channels):
            raise ValueError(f"PatchEmbed: mean and std must both be given, {in_channels} numbers each, or neither")
        options = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(embed_dim, in_channels, *size, **options))
        self.bias = nn.Parameter(torch.empty(embed_dim, **options)) if bias else None
        tokens = 0 if num_patches is None else num_prefix + num_patches
        self.pos_embed = nn.Parameter(torch.empty(tokens, embed_dim, **options)) if tokens else None
        self.prefix = nn.Parameter(torch.empty(num_prefix, embed_dim, **options)) if num_prefix else None
        # Numbers and not buffers, which would be lost on "meta" and rounded by half().
        self.mean, self.std = (None if x is None else tuple(map(float, x)) for x in (mean, std))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight and bias as a convolution's, positions and prefix tokens with a deviation of 0.02 (ViT)."""
        bound = 1 / math.sqrt(math.prod(self.weight.shape[1:]))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        for tokens in (self.pos_embed, self.prefix):
            if tokens is not None:
                nn.init.trunc_normal_(tokens, std=0.02)

    def forward(self, images: Tensor, layout: str = "chw") -> Tensor:
        """images: any form that `mmkernels.patch_embed` takes. Returns (B, num_prefix + N, E), or (N, E) for (N, K)."""
        normalise = images.dtype == torch.uint8
        return patch_embed(
            images,
            self.weight,
            self.bias,
            pos_embed=self.pos_embed,
            prefix=self.prefix,
            mean=_float32(self.mean, images) if normalise else None,
            std=_float32(self.std, images) if normalise else None,
            layout=layout,
        )

    def extra_repr(self) -> str:
        embed_dim, in_channels, *size = self.weight.shape
        positions = None if self.pos_embed is None else len(self.pos_embed)
        prefix = 0 if self.prefix is None else len(self.prefix)
        return (
            f"{in_channels}, {embed_dim}, patch_size={tuple(size)}, bias={self.bias is not None}, "
            f"positions={positions}, num_prefix={prefix}"
        )


def _float32(numbers: tuple[float, ...] | None, images: Tensor) -> Tensor | None:
    """On their device, written there: a copy from the host would wait, and cannot be captured in a CUDA graph."""
    if numbers is None:
        return None
    return torch.cat([torch.full((1,), x, dtype=torch.float32, device=images.device) for x in numbers])


class _PatchConv:
    """What PatchConv2d and PatchConv3d share; mixed in before the convolution they are."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        wanted = {
            "stride": self.kernel_size,
            "dilation": (1,) * len(self.kernel_size),
            "groups": 1,
        }
        for name, value in wanted.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{type(self).__name__}: {name} is {getattr(self, name)}; patches do not overlap and are embedded "
                    f"whole, so it must be {value}"
                )
        if self.padding not in ("valid", (0,) * len(self.kernel_size)):
            raise ValueError(f"{type(self).__name__}: padding is {self.padding}; patch embedding takes none")

    @classmethod
    def from_conv(cls, conv: nn.Conv2d | nn.Conv3d):
        """The same layer on the very parameters of `conv`. Raises ValueError if `conv` is no patch embedding."""
        module = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            device="meta",
        )
        module.weight, module.bias = conv.weight, conv.bias
        return module.train(conv.training)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, [T,] H, W) or without B. Returns the convolution's (B, E, [T',] H', W'), in memory as a
        convolution has it: channels last for images that are so."""
        if torch.jit.is_scripting():
            return self._conv_forward(images, self.weight, self.bias)
        elif is_traced(images):
            return super().forward(images)
        else:
            channels_last = torch.channels_last if images.dim() == 4 else torch.channels_last_3d
            is_last = images.dim() > 3 and images.is_contiguous(memory_format=channels_last)
            return self.maps(images) if is_last else self.maps(images).contiguous()

    @torch.jit.unused
    def maps(self, images: Tensor) -> Tensor:
        """The same, channels last in memory: `flatten(2).transpose(1, 2)`, which models put behind it, is then a view.
        The maps need no copy for it."""
        sizes = self.kernel_size
        batched = images if images.dim() == 2 + len(sizes) else images.unsqueeze(0)
        grid = [length // size for length, size in zip(batched.shape[2:], sizes, strict=True)]
        tokens = patch_embed(batched, self.weight, self.bias, backend=backends.of_module(self))  # (B, N, E)
        maps = tokens.transpose(1, 2).unflatten(2, grid)
        return maps if batched is images else maps.squeeze(0)


class PatchConv2d(_PatchConv, nn.Conv2d):
    """`torch.nn.Conv2d` with stride = kernel_size and no padding, computed by `mmkernels.patch_embed`.

    Same constructor (a stride other than the kernel raises ValueError), same parameters and state_dict, same result.
    """


class PatchConv3d(_PatchConv, nn.Conv3d):
    """`torch.nn.Conv3d` with stride = kernel_size and no padding, computed by `mmkernels.patch_embed`.

    Same constructor (a stride other than the kernel raises ValueError), same parameters and state_dict, same result.
    """
