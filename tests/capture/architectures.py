"""Architectures of transformers with tiny random configs, and inputs for them at any batch size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

_WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT = {**_WIDE, "vocab_size": 99, "max_position_embeddings": 40}
_ONE_LAYER = {"num_hidden_layers": 1}  # of those that are much like another one here
_IMAGE = {"image_size": 32, "patch_size": 8, "num_channels": 3}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "use_cache": False}
_SPEECH = {
    **_WIDE, "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip


def tokens(batch: int, length: int = 9, vocab: int = 99) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, vocab, (batch, length))
    mask = torch.ones_like(ids)
    mask[0, length - 2 :] = 0  # one item is padded
    return {"input_ids": ids, "attention_mask": mask}


def pixels(batch: int, size: int = 32) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, size, size)}


def both(batch: int) -> dict[str, torch.Tensor]:
    return tokens(batch) | pixels(batch)


def translation(batch: int) -> dict[str, torch.Tensor]:
    return tokens(batch) | {"decoder_input_ids": torch.randint(3, 99, (batch, 5))}


def waves(batch: int) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(batch, 800)}


def _clip(config: type, text: type, vision: type, **more: Any) -> Any:
    return config(text_config=text(**_TEXT, **more).to_dict(), vision_config=vision(**_WIDE, **_IMAGE).to_dict(), projection_dim=16)


def _vision_encoder_decoder() -> Any:
    encoder = tf.ViTConfig(**_WIDE, **_IMAGE)
    decoder = tf.BertConfig(**_TEXT, is_decoder=True, add_cross_attention=True, use_cache=False)
    model = tf.VisionEncoderDecoderModel(tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder))
    model.config.use_cache = False
    return model


Inputs = Callable[[int], dict[str, torch.Tensor]]

#: name -> (makes the model, makes inputs for a batch size)
ARCHITECTURES: dict[str, tuple[Callable[[], Any], Inputs]] = {
    # vision
    "vit": (lambda: tf.ViTModel(tf.ViTConfig(**_WIDE, **_IMAGE)), pixels),
    "deit": (lambda: tf.DeiTModel(tf.DeiTConfig(**_WIDE | _ONE_LAYER, **_IMAGE)), pixels),
    "beit": (lambda: tf.BeitModel(tf.BeitConfig(**_WIDE | _ONE_LAYER, **_IMAGE)), pixels),
    "dinov2": (lambda: tf.Dinov2Model(tf.Dinov2Config(**_WIDE | _ONE_LAYER, **_IMAGE)), pixels),
    "swin": (lambda: tf.SwinModel(tf.SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4)), pixels),
    "convnext": (lambda: tf.ConvNextModel(tf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2)), pixels),
    "resnet": (lambda: tf.ResNetModel(tf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], layer_type="bottleneck")), pixels),
    "regnet": (lambda: tf.RegNetModel(tf.RegNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], groups_width=8)), pixels),
    "mobilenet_v2": (lambda: tf.MobileNetV2Model(tf.MobileNetV2Config(depth_multiplier=0.25, image_size=32)), pixels),
    "efficientnet": (
        lambda: tf.EfficientNetModel(
            tf.EfficientNetConfig(
                image_size=32, width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320, num_block_repeats=[1, 1], kernel_sizes=[3, 5],
                in_channels=[32, 16], out_channels=[16, 24], strides=[1, 2], expand_ratios=[1, 6], depthwise_padding=[1],
            )
        ), pixels,
    ),
    "segformer": (
        lambda: tf.SegformerModel(
            tf.SegformerConfig(
                num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2],
                num_attention_heads=[1, 2], mlp_ratios=[2, 2],
            )
        ), pixels,
    ),
    # text
    "bert": (lambda: tf.BertModel(tf.BertConfig(**_TEXT)), tokens),
    "roberta": (lambda: tf.RobertaModel(tf.RobertaConfig(**_TEXT | _ONE_LAYER)), tokens),
    "distilbert": (lambda: tf.DistilBertModel(tf.DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=48)), tokens),
    "albert": (lambda: tf.AlbertModel(tf.AlbertConfig(**_TEXT, embedding_size=16)), tokens),
    "electra": (lambda: tf.ElectraModel(tf.ElectraConfig(**_TEXT | _ONE_LAYER, embedding_size=16)), tokens),
    "mpnet": (lambda: tf.MPNetModel(tf.MPNetConfig(**_TEXT | _ONE_LAYER)), tokens),
    "deberta_v2": (lambda: tf.DebertaV2Model(tf.DebertaV2Config(**_TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"])), tokens),
    "gpt2": (lambda: tf.GPT2Model(tf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=40, use_cache=False)), tokens),
    "llama": (lambda: tf.LlamaModel(tf.LlamaConfig(**_DECODER)), tokens),
    "qwen2": (lambda: tf.Qwen2Model(tf.Qwen2Config(**_DECODER | _ONE_LAYER)), tokens),
    "qwen3": (lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_DECODER, head_dim=8, tie_word_embeddings=True)), tokens),
    # audio
    "whisper": (
        lambda: tf.WhisperModel(
            tf.WhisperConfig(
                vocab_size=99, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=20, max_target_positions=16,
                pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, use_cache=False,
            )
        ), lambda b: {"input_features": torch.randn(b, 8, 40), "decoder_input_ids": torch.randint(3, 99, (b, 4))},
    ),
    "wav2vec2": (lambda: tf.Wav2Vec2Model(tf.Wav2Vec2Config(**_SPEECH, vocab_size=32)), waves),
    "hubert": (lambda: tf.HubertModel(tf.HubertConfig(**_SPEECH | _ONE_LAYER, vocab_size=32)), waves),
    "ast": (
        lambda: tf.ASTModel(tf.ASTConfig(**_WIDE | _ONE_LAYER, patch_size=8, num_mel_bins=16, max_length=24, frequency_stride=4, time_stride=4)),
        lambda b: {"input_values": torch.randn(b, 24, 16)},
    ),
    # two towers
    "clip": (lambda: tf.CLIPModel(_clip(tf.CLIPConfig, tf.CLIPTextConfig, tf.CLIPVisionConfig, eos_token_id=2, bos_token_id=1)), both),
    "siglip": (lambda: tf.SiglipModel(tf.SiglipConfig(
        text_config={**_TEXT, "max_position_embeddings": 9, "projection_size": 32}, vision_config={**_WIDE, **_IMAGE})), both),
    # encoder and decoder
    "t5": (lambda: tf.T5Model(tf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, use_cache=False)), translation),
    "bart": (
        lambda: tf.BartModel(
            tf.BartConfig(
                vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
                encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=40, use_cache=False,
            )
        ), translation,
    ),
    "vision_encoder_decoder": (_vision_encoder_decoder, lambda b: pixels(b) | {"decoder_input_ids": torch.randint(3, 99, (b, 5))}),
}  # fmt: skip


def make(name: str) -> tuple[Any, Inputs]:
    torch.manual_seed(0)
    build, inputs = ARCHITECTURES[name]
    model = build().eval()
    with torch.no_grad():  # freshly made batch norms and biases are all zeros and ones: hardly a test
        for parameter in [*model.parameters(), *(b for b in model.buffers() if b.dtype.is_floating_point)]:
            if parameter.ndim == 1 and bool((parameter == parameter[:1]).all()):
                parameter += torch.rand_like(parameter) * 0.1
    return model, inputs
