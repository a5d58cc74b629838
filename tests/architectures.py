"""Tiny models with random weights of many architectures of transformers, each with inputs that it runs on.

A configuration is made from the class's default one: each size becomes a small one, by the name of the field, in all
parts of the configuration. `CONFIGS` and `INPUTS` have what does not follow from names, `MODELS` all classes.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

VOCAB = 64
TOKENS = 7
IMAGE = 16
# What a size becomes: the first pattern that its whole name matches decides.
SIZES: tuple[tuple[str, int], ...] = (
    (r"type_vocab_size|vocab_size_per_layer_input", 8),
    (r".*vocab_size", VOCAB),
    (r".*(kv|key_value)_heads|multi_query_group_num|linear_num_key_heads", 1),
    (r".*(num|n)_heads|.*heads?|.*num_value_heads|mamba_n_groups", 2),
    (r".*num_experts_per_tok|.*experts_per_token|moe_topk|moe_k|num_selected_experts|.*top_k.*|moe_top_k", 2),
    (r"(n|num)_shared_experts|moe_num_shared_experts|n_group|topk_group|expert_dim.*", 1),
    (r".*experts", 4),
    (r".*head_dim|dim_head|d_kv|d_head|kv_channels|mamba_d_head|head_size", 8),
    (r".*lora_rank|.*_rank", 6),
    (r".*rotary_dim", 4),
    (r"(?!num_feat_extract).*layers|n_layer|depth|depths|.*num_blocks", 2),
    (r"(neck_)?hidden_sizes|(embed|embedding)_dims|conv_dim|upsample_initial_channel|decoder_hidden_size", 16),
    (r".*(intermediate|ffn|inner|mlp|feedforward).*(size|dim|ff|inner)|d_ff|n_inner|d_inner|ff_dim", 24),
    (r"(?!.*(num|per|max).*)(.*_)?(hidden_size|hidden_dim|embed_dim|dim|embedding_size|d_model|n_embd|emb_dim).*", 16),
    (r"word_embed_proj_dim|out(put)?_(hidden_)?(size|dim)|.*proj(ection)?_(dim|size)|width|pooler_output_size", 16),
    (r".*position(_embedding)?s|n_positions|max_seq.*|seq_len|n_ctx|max_sequence_length", 64),
    (r".*image_size", IMAGE),
    (r".*patch_size", 4),
    (r".*chunk_size|sliding_window|.*attention_window|block_size", 8),
    (r".*(mamba_d_state|state_size|ssm_state_size)", 4),
    (r"num_mel_bins", 16),
)  # fmt: skip
INDEX = re.compile(r".*(token_(id|index)|_index|_token|_id)")


def shrink(config: Any, **changes: Any) -> Any:
    """A small configuration of the same class."""
    small: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name in type(config).sub_configs and value is not None:
            small[name] = shrink(value, **changes.pop(name, {})).to_dict()
        elif type(value) is int and INDEX.fullmatch(name):
            small[name] = min(value, VOCAB - 2)
        elif (most := next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)) is not None:
            if type(value) is int and value > 0:
                small[name] = min(most, value)
            elif isinstance(value, list | tuple) and all(type(entry) is int for entry in value):
                small[name] = [min(most, entry) for entry in value]
    heads = getattr(config, "num_attention_heads", None)
    if isinstance(heads, int) and getattr(config, "num_key_value_heads", None) == heads:
        small["num_key_value_heads"] = 2  # as many as there are heads
    return type(config)(**small | changes)


HYBRID: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
CHUNKED: dict[str, Any] = {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]}
WINDOWS: dict[str, Any] = {"window_size": 2, "depths": [1, 1], "num_heads": [2, 2], "patch_size": 2}
STAGES: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 1]}
LANGUAGES: dict[str, Any] = {"default_language": "en_XX", "languages": ["en_XX"]}
HEADS: dict[str, Any] = {"head_dim": 8}
ROTARY: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
TEXT: dict[str, Any] = {"text_config": {"rope_parameters": ROTARY, "head_dim": 8}}
HALF: dict[str, Any] = {"text_config": {"rope_parameters": ROTARY, "head_dim": 16}}
# What does not follow from the names of fields.
CONFIGS: dict[str, dict[str, Any]] = {
    "ASTForAudioClassification": {"num_mel_bins": 16, "max_length": 32},
    "BailingHybridForCausalLM": HYBRID,
    "BambaForCausalLM": {"mamba_n_heads": 4, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "ConvNextForImageClassification": STAGES | {"patch_size": 2, "num_stages": 2},
    "ConvNextV2ForImageClassification": STAGES | {"patch_size": 2, "num_stages": 2},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 2},
    "DonutSwinForImageClassification": WINDOWS,
    "Dots1ForCausalLM": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "FalconH1ForCausalLM": {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "Gemma3ForConditionalGeneration": {"mm_tokens_per_image": 4},
    "Gemma3nForCausalLM": {
        "intermediate_size": 24, "layer_types": ["full_attention", "sliding_attention"],
        "num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCAB, "laurel_rank": 4,
    },
    "Gemma4ForCausalLM": {"vocab_size_per_layer_input": VOCAB},
    "Gemma4ForConditionalGeneration": {"text_config": {"vocab_size_per_layer_input": VOCAB}},
    "Glm46VForConditionalGeneration": TEXT,
    "Glm4vForConditionalGeneration": TEXT,
    "Glm4vMoeForConditionalGeneration": HALF,
    "GlmOcrForConditionalGeneration": TEXT,
    "GraniteMoeHybridForCausalLM": HYBRID | {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1},
    "HunYuanDenseV1ForCausalLM": HEADS,
    "HunYuanMoEV1ForCausalLM": HEADS,
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Lfm3ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Llama4ForCausalLM": CHUNKED,
    "Mamba2ForCausalLM": {"num_heads": 4, "n_groups": 2},
    "MinistralForCausalLM": HEADS,
    "MobileBertForMaskedLM": {"true_hidden_size": 16, "intra_bottleneck_size": 16, "embedding_size": 16},
    "NemotronForCausalLM": {"num_key_value_heads": 2},
    "NemotronHForCausalLM": {"mamba_num_heads": 4, "n_groups": 2},
    "PvtForImageClassification": {
        "image_size": 32, "sequence_reduction_ratios": [2, 1, 1, 1], "patch_sizes": [4, 2, 2, 2],
    },
    "Qwen2VLForConditionalGeneration": TEXT,
    "Qwen2_5_VLForConditionalGeneration": TEXT,
    "Qwen3NextForCausalLM": HYBRID,
    "Qwen3_5ForCausalLM": HYBRID,
    "Qwen3_5ForConditionalGeneration": {"text_config": HYBRID},
    "Qwen3_5MoeForCausalLM": HYBRID,
    "Qwen3_5MoeForConditionalGeneration": {"text_config": HYBRID},
    "RecurrentGemmaForCausalLM": {"block_types": ["recurrent", "attention"]},
    "ReformerModelWithLMHead": {
        "is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4,
    },
    "ResNetForImageClassification": STAGES | {"embedding_size": 8},
    "SeamlessM4TForSpeechToText": {"feature_projection_input_dim": 16},
    "SeamlessM4Tv2ForSpeechToText": {"feature_projection_input_dim": 16},
    "SegformerForImageClassification": {"image_size": 32, "sr_ratios": [2, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16]},
    "Speech2TextForConditionalGeneration": {"input_feat_per_channel": 16, "conv_channels": 16},
    "SwinForImageClassification": WINDOWS,
    "Swinv2ForImageClassification": WINDOWS | {"pretrained_window_sizes": [0, 0]},
    "VivitForVideoClassification": {"num_frames": 4, "tubelet_size": [2, 4, 4]},
    "Wav2Vec2BertForCTC": {"vocab_size": VOCAB, "feature_projection_input_dim": 16},
    "Wav2Vec2BertForSequenceClassification": {"feature_projection_input_dim": 16},
    "Wav2Vec2ConformerForCTC": {"vocab_size": VOCAB},
    "XLNetLMHeadModel": {"d_head": 8},
    "XmodForCausalLM": LANGUAGES,
    "XmodForMaskedLM": LANGUAGES,
}  # fmt: skip


def build(name: str) -> tuple[Any, dict[str, Any]]:
    """The model of a class, in evaluation mode with every parameter random, and the arguments of a forward pass."""
    torch.manual_seed(0)
    made = getattr(transformers, name)
    changes = copy.deepcopy(CONFIGS.get(name, {}))  # some classes write to what they are given
    model = made(shrink(made.config_class(), **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, inputs_of(model)


def inputs_of(model: Any) -> dict[str, Any]:
    """Inputs of the usual shapes, for a batch of two."""
    config, name = model.config, model.main_input_name
    if type(model).__name__ in INPUTS:
        return INPUTS[type(model).__name__](model)
    if name == "input_ids":
        found = {"input_ids": tokens(1)}
    elif name == "pixel_values":
        size = getattr(config, "image_size", IMAGE)
        found = {name: images(getattr(config, "num_channels", 3), size if isinstance(size, int) else IMAGE)}
    elif name == "input_values":
        found = {name: noise(2, 1200)}
    elif name == "input_features":
        found = {name: noise(2, getattr(config, "num_mel_bins", 16), 128)}
    else:
        raise ValueError(f"{type(model).__name__}: {name}")
    if getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = tokens(2)
    return found


def tokens(seed: int, length: int = TOKENS) -> Tensor:
    return torch.randint(4, VOCAB - 4, (2, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def images(channels: int = 3, size: int = IMAGE) -> Tensor:
    return noise(2, channels, size, size)


def text_and_image(model: Any) -> dict[str, Any]:
    return {"input_ids": tokens(1), "pixel_values": images()}


def video(model: Any) -> dict[str, Any]:
    return {"pixel_values": noise(2, getattr(model.config, "num_frames", 2), 3, IMAGE, IMAGE)}


def spectrogram(model: Any) -> dict[str, Any]:
    """Frames before frequencies."""
    found = {model.main_input_name: noise(2, 32, 16)}
    return found | ({"decoder_input_ids": tokens(2)} if getattr(model.config, "is_encoder_decoder", False) else {})


def image_in_text(model: Any) -> dict[str, Any]:
    """An image for each row, and as many of its tokens in the text as it gives vectors."""
    pixels = images()
    found: dict[str, Any] = {"pixel_values": pixels}
    sizes = inspect.signature(model.get_image_features).parameters.get("image_sizes")
    if sizes is not None and sizes.default is sizes.empty:
        found["image_sizes"] = torch.full((2, 2), IMAGE)
    with torch.no_grad():
        vectors = model.get_image_features(**found)
    vectors = getattr(vectors, "pooler_output", vectors)
    return with_image(model, sum(part.numel() // part.shape[-1] for part in vectors) // 2) | found


def patches_in_text(model: Any) -> dict[str, Any]:
    """The same where the model gets a list of patches and how they lie."""
    vision = model.config.vision_config
    channels = getattr(vision, "in_channels", 3)
    size = channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    found = with_image(model, 16 // vision.spatial_merge_size**2)
    kinds = (found["input_ids"] == image_token(model)).long()
    return found | {"pixel_values": noise(32, size), "image_grid_thw": grid, "mm_token_type_ids": kinds}


def with_image(model: Any, count: int) -> dict[str, Any]:
    ids = tokens(1)
    ids = torch.cat([ids[:, :2], torch.full((2, count), image_token(model)), ids[:, 2:]], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image_token(model: Any) -> int:
    config = model.config
    return config.image_token_id if hasattr(config, "image_token_id") else config.image_token_index


INPUTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    name: inputs
    for inputs, names in {
        text_and_image: """
            CLIPModel AltCLIPModel ChineseCLIPModel CLIPSegModel MetaClip2Model SiglipModel BlipModel
            BlipForConditionalGeneration
        """,
        video: """
            TimesformerForVideoClassification VideoMAEForVideoClassification VivitForVideoClassification
        """,
        spectrogram: """
            ASTForAudioClassification Wav2Vec2BertForCTC Wav2Vec2BertForSequenceClassification
            Speech2TextForConditionalGeneration SeamlessM4TForSpeechToText SeamlessM4Tv2ForSpeechToText
            LasrForCTC ParakeetForCTC
        """,
        image_in_text: """
            LlavaForConditionalGeneration PaliGemmaForConditionalGeneration Gemma3ForConditionalGeneration
            InternVLForConditionalGeneration AyaVisionForConditionalGeneration
            Cohere2VisionForConditionalGeneration Mistral3ForConditionalGeneration
        """,
        patches_in_text: """
            Qwen2VLForConditionalGeneration Qwen2_5_VLForConditionalGeneration Qwen3VLForConditionalGeneration
            Qwen3VLMoeForConditionalGeneration Qwen3_5ForConditionalGeneration
            Qwen3_5MoeForConditionalGeneration Glm4vForConditionalGeneration
        """,
    }.items()
    for name in names.split()
}
KINDS: dict[str, tuple[str, ...]] = {
    kind: tuple(names.split())
    for kind, names in {
        "decoders": """
            AXK1ForCausalLM AXK2ForCausalLM AfmoeForCausalLM Apertus1p5TextForCausalLM ApertusForCausalLM
            ArceeForCausalLM AriaTextForCausalLM BailingHybridForCausalLM BambaForCausalLM BartForCausalLM
            BeamForCausalLM BertGenerationDecoder BertLMHeadModel BigBirdForCausalLM BigBirdPegasusForCausalLM
            BioGptForCausalLM BitNetForCausalLM BlenderbotForCausalLM BlenderbotSmallForCausalLM
            BloomForCausalLM CamembertForCausalLM CodeGenForCausalLM Cohere2ForCausalLM Cohere2MoeForCausalLM
            CohereForCausalLM CpmAntForCausalLM CwmForCausalLM Data2VecTextForCausalLM DeepseekV2ForCausalLM
            DeepseekV32ForCausalLM DeepseekV3ForCausalLM DeepseekV4ForCausalLM DiffLlamaForCausalLM
            DogeForCausalLM Dots1ForCausalLM ElectraForCausalLM Emu3ForCausalLM Ernie4_5ForCausalLM
            Ernie4_5_MoeForCausalLM ErnieForCausalLM Exaone4ForCausalLM ExaoneMoeForCausalLM FalconForCausalLM
            FalconH1ForCausalLM FalconMambaForCausalLM FlexOlmoForCausalLM FlintForCausalLM FuyuForCausalLM
            GPT2LMHeadModel GPTBigCodeForCausalLM GPTJForCausalLM GPTNeoForCausalLM GPTNeoXForCausalLM
            GPTNeoXJapaneseForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM Gemma3ForConditionalGeneration
            Gemma3nForCausalLM Gemma4ForCausalLM Gemma4ForConditionalGeneration Gemma4UnifiedForCausalLM
            Gemma4UnifiedForConditionalGeneration GemmaForCausalLM GitForCausalLM Glm4ForCausalLM
            Glm4MoeForCausalLM Glm4MoeLiteForCausalLM GlmForCausalLM GlmMoeDsaForCausalLM GptOssForCausalLM
            GraniteForCausalLM GraniteMoeForCausalLM GraniteMoeHybridForCausalLM GraniteMoeSWAForCausalLM
            GraniteMoeSharedForCausalLM GraniteSWAForCausalLM HYV3ForCausalLM HYV4ForCausalLM HeliumForCausalLM
            HrmTextForCausalLM HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM HyperCLOVAXForCausalLM
            Inkling2ForCausalLM Inkling2LoopForCausalLM InklingForCausalLM Jais2ForCausalLM JambaForCausalLM
            JetMoeForCausalLM Kolibri1ForCausalLM LagunaForCausalLM LaraMiniForCausalLM Lfm2ForCausalLM
            Lfm2MoeForCausalLM Lfm3ForCausalLM Llama4ForCausalLM LlamaForCausalLM MBartForCausalLM
            Mamba2ForCausalLM MambaForCausalLM MarianForCausalLM MegatronBertForCausalLM MellumForCausalLM
            MiMoV2FlashForCausalLM MiniCPM3ForCausalLM MiniMaxForCausalLM MiniMaxM2ForCausalLM
            MiniMaxM3VLForCausalLM Ministral3ForCausalLM MinistralForCausalLM MistralForCausalLM
            MixtralForCausalLM MllamaForCausalLM ModernBertDecoderForCausalLM MoshiForCausalLM
            MossTranscribeDiarizeForConditionalGeneration MptForCausalLM MvpForCausalLM NanoChatForCausalLM
            NemotronForCausalLM NemotronHForCausalLM OPTForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM
            OlmoForCausalLM OlmoHybridForCausalLM OlmoeForCausalLM OpenAIGPTLMHeadModel PLBartForCausalLM
            PegasusForCausalLM PersimmonForCausalLM Phi3ForCausalLM PhiForCausalLM PhimoeForCausalLM
            ProphetNetForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen3ForCausalLM Qwen3MoeForCausalLM
            Qwen3NextForCausalLM Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM RecurrentGemmaForCausalLM
            ReformerModelWithLMHead RemBertForCausalLM RoCBertForCausalLM RoFormerForCausalLM RobertaForCausalLM
            RobertaPreLayerNormForCausalLM RwkvForCausalLM SeedOssForCausalLM SmolLM3ForCausalLM
            SolarOpenForCausalLM StableLmForCausalLM Starcoder2ForCausalLM TrOCRForCausalLM
            VaultGemmaForCausalLM WhisperForCausalLM XGLMForCausalLM XLMRobertaForCausalLM
            XLMRobertaXLForCausalLM XLMWithLMHeadModel XLNetLMHeadModel XmodForCausalLM YoutuForCausalLM
            ZayaForCausalLM
        """,
        "encoder-decoders": """
            AudioFlamingo3ForConditionalGeneration BartForConditionalGeneration
            BigBirdPegasusForConditionalGeneration BlenderbotForConditionalGeneration
            BlenderbotSmallForConditionalGeneration EncoderDecoderModel FSMTForConditionalGeneration
            GlmAsrForConditionalGeneration GraniteSpeechForConditionalGeneration
            GraniteSpeechPlusForConditionalGeneration LEDForConditionalGeneration LongT5ForConditionalGeneration
            M2M100ForConditionalGeneration MBartForConditionalGeneration MT5ForConditionalGeneration
            MarianMTModel MusicFlamingoForConditionalGeneration MvpForConditionalGeneration
            NllbMoeForConditionalGeneration OmniASRForConditionalGeneration PLBartForConditionalGeneration
            PegasusForConditionalGeneration PegasusXForConditionalGeneration ProphetNetForConditionalGeneration
            Qwen2AudioForConditionalGeneration Qwen3ASRForConditionalGeneration SeamlessM4TForTextToText
            SeamlessM4Tv2ForTextToText SwitchTransformersForConditionalGeneration T5ForConditionalGeneration
            T5Gemma2ForConditionalGeneration T5GemmaForConditionalGeneration UMT5ForConditionalGeneration
            VoxtralForConditionalGeneration
        """,
        "images and text": """
            AriaForConditionalGeneration AyaVisionForConditionalGeneration BlipForConditionalGeneration
            Cohere2VisionForConditionalGeneration Cosmos3OmniForConditionalGeneration
            DeepseekVLForConditionalGeneration EvollaForProteinText2Text Exaone4_5_ForConditionalGeneration
            Florence2ForConditionalGeneration Glm46VForConditionalGeneration Glm4vForConditionalGeneration
            Glm4vMoeForConditionalGeneration GlmOcrForConditionalGeneration
            GraniteDoclingForConditionalGeneration HyperCLOVAXVisionV2ForConditionalGeneration
            Idefics2ForConditionalGeneration Idefics3ForConditionalGeneration Inkling2ForConditionalGeneration
            Inkling2LoopForConditionalGeneration InternVLForConditionalGeneration
            Kimi_K25ForConditionalGeneration Kosmos2_5ForConditionalGeneration Lfm2VlForConditionalGeneration
            LightOnOcrForConditionalGeneration LlavaForConditionalGeneration LlavaNextForConditionalGeneration
            LlavaNextVideoForConditionalGeneration LlavaOnevisionForConditionalGeneration
            MiniMaxM3SparseForConditionalGeneration Mistral3ForConditionalGeneration
            MllamaForConditionalGeneration MuseGlimmerForConditionalGeneration Ovis2ForConditionalGeneration
            PaliGemmaForConditionalGeneration QianfanOCRForConditionalGeneration Qwen2VLForConditionalGeneration
            Qwen2_5_VLForConditionalGeneration Qwen3OmniMoeThinkerForConditionalGeneration
            Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration Qwen3_5ForConditionalGeneration
            Qwen3_5MoeForConditionalGeneration SmolVLMForConditionalGeneration
            VideoLlama3ForConditionalGeneration VideoLlavaForConditionalGeneration
            VipLlavaForConditionalGeneration VisionEncoderDecoderModel
        """,
        "encoders": """
            AlbertForMaskedLM BertForMaskedLM BigBirdForMaskedLM CamembertForMaskedLM ConvBertForMaskedLM
            Data2VecTextForMaskedLM DebertaForMaskedLM DebertaV2ForMaskedLM DistilBertForMaskedLM
            ElectraForMaskedLM ErnieForMaskedLM EsmcForMaskedLM EuroBertForMaskedLM FNetForMaskedLM
            FlaubertWithLMHeadModel FunnelForMaskedLM GteForMaskedLM IBertForMaskedLM
            JinaEmbeddingsV3ForMaskedLM LayoutLMForMaskedLM LongformerForMaskedLM LukeForMaskedLM
            MPNetForMaskedLM MegatronBertForMaskedLM MobileBertForMaskedLM ModernBertForMaskedLM
            ModernVBertForMaskedLM MraForMaskedLM NomicBertForMaskedLM NystromformerForMaskedLM
            RemBertForMaskedLM RoCBertForMaskedLM RoFormerForMaskedLM RobertaForMaskedLM
            RobertaPreLayerNormForMaskedLM SqueezeBertForMaskedLM TapasForMaskedLM UltraVBertForMaskedLM
            UltrabertForMaskedLM XLMRobertaForMaskedLM XLMRobertaXLForMaskedLM XmodForMaskedLM YosoForMaskedLM
        """,
        "images": """
            AltCLIPModel BeitForImageClassification BlipModel CLIPForImageClassification CLIPModel CLIPSegModel
            ChineseCLIPModel ConvNextForImageClassification ConvNextV2ForImageClassification
            Data2VecVisionForImageClassification DeiTForImageClassification Dinov2ForImageClassification
            Dinov2WithRegistersForImageClassification DonutSwinForImageClassification
            IJepaForImageClassification ImageGPTForImageClassification MetaClip2ForImageClassification
            MetaClip2Model MobileViTForImageClassification PoolFormerForImageClassification
            PvtForImageClassification RegNetForImageClassification ResNetForImageClassification
            SegformerForImageClassification SiglipForImageClassification SiglipModel
            SwiftFormerForImageClassification SwinForImageClassification Swinv2ForImageClassification
            TimesformerForVideoClassification Tipsv2Model ViTForImageClassification ViTMSNForImageClassification
            VideoMAEForVideoClassification VivitForVideoClassification YolosForObjectDetection
        """,
        "audio": """
            ASTForAudioClassification Data2VecAudioForCTC Data2VecAudioForSequenceClassification HubertForCTC
            HubertForSequenceClassification LasrForCTC ParakeetForCTC Pop2PianoForConditionalGeneration
            SEWDForCTC SEWDForSequenceClassification SEWForCTC SEWForSequenceClassification
            SeamlessM4TForSpeechToText SeamlessM4Tv2ForSpeechToText Speech2TextForConditionalGeneration
            SpeechT5ForSpeechToText UniSpeechForCTC UniSpeechForSequenceClassification UniSpeechSatForCTC
            UniSpeechSatForSequenceClassification Wav2Vec2BertForCTC Wav2Vec2BertForSequenceClassification
            Wav2Vec2ConformerForCTC Wav2Vec2ConformerForSequenceClassification Wav2Vec2ForCTC
            Wav2Vec2ForSequenceClassification WavLMForCTC WavLMForSequenceClassification
            WhisperForAudioClassification WhisperForConditionalGeneration
        """,
    }.items()
}
MODELS = tuple(name for names in KINDS.values() for name in names)
