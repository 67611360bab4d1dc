"""Small models of three kinds with random weights, each about 50 ms of one processor: MODEL arguments for a sweep.

`py:testbed.models:cnn`, `py:testbed.models:vit`, `py:testbed.models:bert`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["KINDS", "bert", "cnn", "vit"]

KINDS = ("cnn", "vit", "bert")
Made = tuple["torch.nn.Module", "dict[str, torch.Tensor]"]


def cnn() -> Made:
    """A ResNet whose early layers shrink a 602 KB image to 150 KB in a tenth of its time, as those for cameras do."""
    import torch
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 48, 192, 512], depths=[1, 2, 6, 2], layer_type="basic")
    return ResNetModel(config).eval(), {"pixel_values": torch.randn(1, 3, 224, 224)}


def vit() -> Made:
    """A vision transformer of 10 equal layers; 151 KB cross a cut between them."""
    import torch
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=192, num_hidden_layers=10, num_attention_heads=3, intermediate_size=768)
    return ViTModel(config).eval(), {"pixel_values": torch.randn(1, 3, 224, 224)}


def bert() -> Made:
    """A text encoder of 6 equal layers over 128 tokens; 197 KB cross a cut between them."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536, vocab_size=1000)
    tokens = torch.randint(1000, (1, 128))
    return BertModel(config).eval(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
