"""`nn.MultiheadAttention` where Ultralytics has it: RT-DETR's encoder and decoder, and C3TR.

They call it with `need_weights=True`, torch's default, so that it writes the score matrix to memory and averages it
over the heads, and then use only the first of its two results. Callers that use the second are left alone, see
`unread_weights`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import linear
from ultralytics.nn.modules.head import RTDETRDecoder
from ultralytics.nn.modules.transformer import (
    AIFI,
    DeformableTransformerDecoderLayer,
    TransformerEncoderLayer,
    TransformerLayer,
)

from .blocks import FlashBlock, leaves_stock
from .fallback import AttentionCall, attend_separate

OWNERS = (AIFI, DeformableTransformerDecoderLayer, TransformerEncoderLayer, TransformerLayer)


class FlashMultiheadAttention(FlashBlock, nn.MultiheadAttention):
    """Self-attention without its weights; whatever else is asked for, the stock forward does."""

    _stock: ClassVar[type] = nn.MultiheadAttention
    calls = (functional,), ("multi_head_attention_forward",)
    separate: ClassVar[bool] = True
    format: str | None = None  # what the stock block lacks, `torch.nn.Module` looks for slowly

    @staticmethod
    def problem(block: Any, batch: int, tokens: int) -> tuple[int, int, int, int, int]:
        """Each image is one group."""
        return batch, tokens, block.head_dim, block.head_dim, 1

    @classmethod
    def code(cls, edits: str = "") -> tuple[Any, ...]:
        """The forward of the stock class, torch's function in which it computes, and the edits."""
        return nn.MultiheadAttention.forward, functional.multi_head_attention_forward, edits

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | None = None,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`, but `need_weights` is False unless given.

        Args:
            query: `[tokens, batch, channels]`, or `[batch, tokens, channels]` with `batch_first`.
            key: Of the same shape.
            value: Of the same shape.
            key_padding_mask: Left to the stock forward.
            need_weights: True is left to the stock forward.
            attn_mask: Bool `[tokens, tokens]`, True where a key is not seen; others are left to the stock forward.
            average_attn_weights: False is left to the stock forward.
            is_causal: True is left to the stock forward.

        Returns:
            Attention of the shape of `query`, in the dtype of its projection; and the weights, from the stock forward.

        Raises:
            BackendNotSupportedError: The backend asked for by name cannot run this input, or the block was changed.
            FlashKernelError: The backend asked for by name raised.
        """
        asked = need_weights or not average_attn_weights or is_causal or key_padding_mask is not None
        fits = not asked and self._fits(query, key, value, attn_mask)
        call = self._attention_call(query, attn_mask) if fits else None
        if call is None:
            weights = need_weights is not False
            return nn.MultiheadAttention.forward(
                self, query, key, value, key_padding_mask, weights, attn_mask, average_attn_weights, is_causal
            )
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in self._project(query, key, value))
        out = attend_separate((q, k, v, attn_mask), call)
        out = linear(out.flatten(2), self.out_proj.weight, self.out_proj.bias)
        return self._batch_first(out), None

    def _fits(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
        """Whether this call is plain self-attention whose weights nobody reads; a user's hook could read them."""
        if self._forward_hooks or (self.training and self.dropout) or leaves_stock(self, query) or query.is_nested:
            return False
        if self.in_proj_weight is None or self.bias_k is not None or self.add_zero_attn:
            return False
        if query.dim() != 3 or not query.shape == key.shape == value.shape or query.shape[2] != self.embed_dim:
            return False
        tokens = query.shape[1 if self.batch_first else 0]
        return mask is None or (mask.dtype is torch.bool and mask.shape == (tokens, tokens))

    def _attention_call(self, x: Tensor, mask: Tensor | None = None) -> AttentionCall | None:
        return None if self._was_changed() else self._decided(x, *images_and_tokens(self, x), mask=mask is not None)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[batch, tokens, channels]`; one product where query is key, as in AIFI."""
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        v = self._linear(value, weights[2], biases[2])
        if query is key:
            size = 2 * self.embed_dim
            bias = None if self.in_proj_bias is None else self.in_proj_bias[:size]
            q, k = self._linear(query, self.in_proj_weight[:size], bias).chunk(2, dim=-1)
            return q, k, v
        return self._linear(query, weights[0], biases[0]), self._linear(key, weights[1], biases[1]), v

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Linear projection in the input's memory order, since torch copies transposed tensors, as the decoder has."""
        if x.is_contiguous():
            return self._batch_first(linear(x, weight, bias))
        flipped = linear(x.transpose(0, 1), weight, bias)
        return flipped.transpose(0, 1) if self.batch_first else flipped

    def _batch_first(self, x: Tensor) -> Tensor:
        """From the module's order of dimensions to `[batch, tokens, channels]`, and back."""
        return x if self.batch_first else x.transpose(0, 1)


def images_and_tokens(block: Any, x: Tensor) -> tuple[int, int]:
    """Images, and the tokens of each, of a block's first input.

    Args:
        block: Stock or patched.
        x: An image `[batch, channels, height, width]`, or the queries of an `nn.MultiheadAttention`.
    """
    if not isinstance(block, nn.MultiheadAttention):
        return x.shape[0], x.shape[2] * x.shape[3]
    first, second = x.shape[:2]
    return (first, second) if block.batch_first else (second, first)


def unread_weights(module: nn.Module) -> set[int]:
    """The ids of all `nn.MultiheadAttention` in `module` whose attention weights no caller reads.

    Only blocks in `OWNERS` hold those. Subclasses by users, of the blocks or of the attention, may read the weights and
    are not ours.
    """
    ours: set[int] = set()
    others: set[int] = set()
    for parent in module.modules():
        for child in parent.children():
            if type(child) is nn.MultiheadAttention:
                (ours if type(parent) in OWNERS else others).add(id(child))
    return ours - others


def denoising_queries(model: nn.Module) -> dict[str, int]:
    """Decoder self-attention -> the denoising queries that a training step adds to its own, at most.

    RT-DETR trains its decoder with groups of noisy labels beside the queries, 2 x `num_denoising` at most, kept apart
    by a mask. Their number varies a little with the labels of a batch.
    """
    return {
        f"{name.removeprefix('student_model.')}.decoder.layers.{i}.self_attn": 2 * head.num_denoising
        for name, head in model.named_modules()
        if isinstance(head, RTDETRDecoder) and head.num_denoising > 0
        for i in range(len(head.decoder.layers))
    }


def denoising_mask(tokens: int, denoising: int, group: int, device: torch.device | None = None) -> Tensor:
    """RT-DETR's mask: a group of denoising queries sees itself and the other queries; those see no such group.

    The denoising queries come first, and the last group may be smaller.

    Returns:
        Bool `[tokens, tokens]`, True where a key is not seen; no row is all True.
    """
    index = torch.arange(tokens, device=device)
    groups = torch.where(index < denoising, index // group, -1)
    return (groups[None, :] != groups[:, None]) & (groups[None, :] != -1)
