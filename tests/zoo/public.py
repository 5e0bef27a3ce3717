"""Published architectures as the `transformers` package defines them: tiny configurations, random weights.

`transformers` is imported when a net is built: a test that builds one needs `pytest.importorskip("transformers")`, this
module does not. Nothing is downloaded.
"""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from .net import Inputs, Net, images, net, several, tokens

__all__ = ["PUBLIC"]

VOCABULARY = 64
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
DECODER = {**ENCODER, **SPECIAL, "use_cache": False}
GROUPED = {**DECODER, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 8}
GPT = {
    "use_cache": False,
    "vocab_size": VOCABULARY,
    "n_positions": 40,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    **SPECIAL,
}
BART = {
    **{"vocab_size": VOCABULARY, "d_model": 32, "max_position_embeddings": 40, "use_cache": False, "pad_token_id": 0},
    **{"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "bos_token_id": 1, "eos_token_id": 2},
}
PATCHES = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    **{"image_size": 32, "patch_size": 8},
}
SWIN = {
    **{"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
}
SPEECH = {
    **{"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    **{"conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4},
}

TEXT = tokens(VOCABULARY, 8, other=11)
PIXELS, FIXED = images(3, 32, 32, other=(3, 64, 64)), images(3, 32, 32)


def mask(length: int, *, other: int) -> Inputs:
    """Return an attention mask of ones."""

    def inputs(variant: int = 0) -> tuple[Tensor, ...]:
        return (torch.ones(3 if variant else 2, other if variant else length, dtype=torch.long),)

    return inputs


MASKED = several(TEXT, mask(8, other=11))
SEQUENCES = several(MASKED, tokens(VOCABULARY, 6, other=7, seed=1))


def published(config: str, model: str, options: dict[str, Any], *, attention: str = "eager") -> nn.Module:
    """Return the model of the configuration; `model` is a class of the package, or of one of its modules."""
    transformers = importlib.import_module("transformers")
    made = getattr(transformers, config)(**{"num_labels": 8, **options}, attn_implementation=attention)
    module, _, name = model.rpartition(".")
    owner = importlib.import_module(f"transformers.models.{module}") if module else transformers
    result: nn.Module = getattr(owner, name)(made)
    return result


class CausalLM(nn.Module):
    """What people deploy of a decoder: token numbers and their mask in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


# name: (configuration, model, options, inputs)
Row = tuple[str, str, dict[str, Any], Inputs]
SUPPORTS_SDPA = ("bert", "gpt2", "llama", "vit", "bart", "whisper_encoder", "falcon", "gpt_neox", "qwen3", "dinov2")

TEXT_ENCODERS: dict[str, Row] = {
    "bert": ("BertConfig", "BertForSequenceClassification", ENCODER, TEXT),
    "bert_masked": ("BertConfig", "BertForMaskedLM", ENCODER, TEXT),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", ENCODER, TEXT),
    "albert": ("AlbertConfig", "AlbertForMaskedLM", {**ENCODER, "embedding_size": 16}, TEXT),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": 40,
        },
        TEXT,
    ),
    "electra": ("ElectraConfig", "ElectraForSequenceClassification", {**ENCODER, "embedding_size": 16}, TEXT),
    "deberta_v2": (
        "DebertaV2Config",
        "DebertaV2ForSequenceClassification",
        {
            **ENCODER,
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "pooler_hidden_size": 32,
        },
        TEXT,
    ),
    "mpnet": ("MPNetConfig", "MPNetForSequenceClassification", ENCODER, TEXT),
    "squeezebert": (
        "SqueezeBertConfig",
        "SqueezeBertForSequenceClassification",
        {**ENCODER, "embedding_size": 32},
        TEXT,
    ),
    "convbert": ("ConvBertConfig", "ConvBertForSequenceClassification", {**ENCODER, "embedding_size": 32}, TEXT),
    "fnet": ("FNetConfig", "FNetForSequenceClassification", ENCODER, TEXT),
    "modernbert": ("ModernBertConfig", "ModernBertForSequenceClassification", {**ENCODER, **SPECIAL}, TEXT),
}
TEXT_DECODERS: dict[str, Row] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT, MASKED),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {**GPT, "rotary_dim": 4}, MASKED),
    "gpt_neo": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {**DECODER, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},
        MASKED,
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", DECODER, MASKED),
    "gpt_bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", GPT, MASKED),
    "codegen": ("CodeGenConfig", "CodeGenForCausalLM", {**GPT, "rotary_dim": 4}, MASKED),
    "opt": ("OPTConfig", "OPTForCausalLM", {**DECODER, "ffn_dim": 48, "word_embed_proj_dim": 32}, MASKED),
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED, MASKED),
    "mistral": ("MistralConfig", "MistralForCausalLM", GROUPED, MASKED),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED, MASKED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GEMMA, MASKED),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", GEMMA, MASKED),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", GEMMA, MASKED),
    "phi": ("PhiConfig", "PhiForCausalLM", DECODER, MASKED),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", GROUPED, MASKED),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", GROUPED, MASKED),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", GROUPED, MASKED),
    "cohere": ("CohereConfig", "CohereForCausalLM", GROUPED, MASKED),
    "falcon": ("FalconConfig", "FalconForCausalLM", {**DECODER, "multi_query": True}, MASKED),
    "bloom": ("BloomConfig", "BloomForCausalLM", {**GPT, "hidden_size": 32}, MASKED),
    "mpt": (
        "MptConfig",
        "MptForCausalLM",
        {**GPT, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 40},
        MASKED,
    ),
    "mamba": (
        "MambaConfig",
        "MambaForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "use_cache": False},
        MASKED,
    ),
}
SEQUENCE_TO_SEQUENCE: dict[str, Row] = {
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            **{"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
            **{"use_cache": False, "decoder_start_token_id": 0, "relative_attention_num_buckets": 8},
        },
        SEQUENCES,
    ),
    "bart": ("BartConfig", "BartForConditionalGeneration", BART, SEQUENCES),
    "marian": ("MarianConfig", "MarianMTModel", {**BART, "decoder_start_token_id": 0}, SEQUENCES),
}
SPEECH_MODELS: dict[str, Row] = {
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2ForCTC", SPEECH, images(400, other=(480,))),
    "hubert": ("HubertConfig", "HubertForCTC", SPEECH, images(400, other=(480,))),
    "whisper_encoder": (
        "WhisperConfig",
        "whisper.modeling_whisper.WhisperEncoder",
        {
            **BART,
            "num_mel_bins": 16,
            "max_source_positions": 12,
            "max_target_positions": 12,
            "decoder_start_token_id": 1,
        },
        images(16, 24),
    ),
    "ast": (
        "ASTConfig",
        "ASTForAudioClassification",
        {**PATCHES, "max_length": 32, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8},
        images(32, 16),
    ),
}
VISION_TRANSFORMERS: dict[str, Row] = {
    "vit": ("ViTConfig", "ViTForImageClassification", PATCHES, FIXED),
    "deit": ("DeiTConfig", "DeiTForImageClassificationWithTeacher", PATCHES, FIXED),
    "beit": ("BeitConfig", "BeitForImageClassification", {**PATCHES, "use_relative_position_bias": True}, FIXED),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", {**PATCHES, "mlp_ratio": 2}, FIXED),
    "clip_vision": ("CLIPVisionConfig", "CLIPVisionModelWithProjection", {**PATCHES, "projection_dim": 16}, FIXED),
    "siglip_vision": ("SiglipVisionConfig", "SiglipVisionModel", PATCHES, FIXED),
    "swin": ("SwinConfig", "SwinForImageClassification", SWIN, PIXELS),
    "swinv2": ("Swinv2Config", "Swinv2ForImageClassification", SWIN, FIXED),
    "pvt": (
        "PvtConfig",
        "PvtForImageClassification",
        {
            **{"image_size": 64, "hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1]},
            **{
                "num_attention_heads": [1, 2, 4, 4],
                "mlp_ratios": [2, 2, 2, 2],
                "sequence_reduction_ratios": [4, 2, 1, 1],
            },
        },
        images(3, 64, 64),
    ),
    "cvt": (
        "CvtConfig",
        "CvtForImageClassification",
        {"embed_dim": [8, 16, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3], "mlp_ratio": [2.0, 2.0, 2.0]},
        PIXELS,
    ),
    "levit": (
        "LevitConfig",
        "LevitForImageClassification",
        {
            **{"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1]},
            **{"key_dim": [8, 8, 8], "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 3, 4, 2, 2]]},
        },
        images(3, 64, 64),
    ),
    "segformer": (
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        {
            **{"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
            **{"sr_ratios": [4, 2, 1, 1], "mlp_ratios": [2, 2, 2, 2], "decoder_hidden_size": 32},
        },
        images(3, 64, 64, other=(3, 96, 96)),
    ),
    "mobilevit": (
        "MobileViTConfig",
        "MobileViTForImageClassification",
        {
            **{"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 48]},
            **{"num_attention_heads": 4, "expand_ratio": 2.0},
        },
        images(3, 64, 64, other=(3, 128, 128)),
    ),
}
CONVOLUTIONAL: dict[str, Row] = {
    "convnext": (
        "ConvNextConfig",
        "ConvNextForImageClassification",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
        PIXELS,
    ),
    "convnextv2": (
        "ConvNextV2Config",
        "ConvNextV2ForImageClassification",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
        PIXELS,
    ),
    "resnet": (
        "ResNetConfig",
        "ResNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2]},
        PIXELS,
    ),
    "regnet": (
        "RegNetConfig",
        "RegNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "groups_width": 8},
        PIXELS,
    ),
    "mobilenet_v1": (
        "MobileNetV1Config",
        "MobileNetV1ForImageClassification",
        {"depth_multiplier": 0.25, "min_depth": 8},
        PIXELS,
    ),
    "mobilenet_v2": ("MobileNetV2Config", "MobileNetV2ForImageClassification", {"depth_multiplier": 0.25}, PIXELS),
    "efficientnet": (
        "EfficientNetConfig",
        "EfficientNetForImageClassification",
        {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320, "image_size": 32},
        PIXELS,
    ),
    "poolformer": (
        "PoolFormerConfig",
        "PoolFormerForImageClassification",
        {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "mlp_ratio": 2.0},
        images(3, 64, 64),
    ),
    "focalnet": (
        "FocalNetConfig",
        "FocalNetForImageClassification",
        {
            "image_size": 32,
            "embed_dim": 16,
            "depths": [1, 1],
            "hidden_sizes": [16, 32],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
        },
        FIXED,
    ),
    "bit": (
        "BitConfig",
        "BitForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_groups": 4},
        PIXELS,
    ),
}
FAMILIES = (TEXT_ENCODERS, TEXT_DECODERS, SEQUENCE_TO_SEQUENCE, SPEECH_MODELS, VISION_TRANSFORMERS, CONVOLUTIONAL)


def _net(name: str, row: Row, *, attention: str) -> Net:
    config, model, options, inputs = row

    def make() -> nn.Module:
        made = published(config, model, options, attention=attention)
        return CausalLM(made) if name in TEXT_DECODERS else made

    title = name if attention == "eager" else f"{name}_{attention}"
    return net(title, make, inputs, f"{model.rpartition('.')[2]} of transformers, {attention} attention")


PUBLIC: dict[str, Net] = {
    made.name: made
    for family in FAMILIES
    for name, row in family.items()
    for attention in (("eager", "sdpa") if name in SUPPORTS_SDPA else ("eager",))
    for made in (_net(name, row, attention=attention),)
}
