"""Tiny models of all causal language models of transformers: what ACD does on each, as a table for docs/families.md.

Usage, after an upgrade of transformers or a change of what ACD runs on:

    python tests/families.py --output_file docs/families.md
"""

import argparse
import dataclasses
import inspect
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from acd_logits import ACDLogitsProcessor, PromptPair
from acd_logits.pairs import PairConfig
from conftest import DEVICE, build_batch
from reference import ReferenceProcessor, SharedReference

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
VERSION = "5.23"  # of transformers

VOCAB, HIDDEN = 100, 32
TOKENS = range(3, 97)  # text; others stand for padding, ends, pictures and sounds
NEW_TOKENS = 6
TOLERANCE = 1e-4  # of the largest score
MOST_PARAMETERS = 4e6  # of a tiny model


# ----- tiny models -----


def _each(names, value):
    return dict.fromkeys(names.split(), value)


# Configurations do not agree on names: each gets what it has a field for
SIZES = {
    **_each("vocab_size n_words vocab_size_per_layer_input audio_vocab_size", VOCAB),
    **_each("pronunciation_vocab_size shape_vocab_size", VOCAB),
    **_each(
        "hidden_size d_model n_embd dim embed_dim emb_dim hidden_dim pronunciation_embed_dim shape_embed_dim", HIDDEN
    ),
    **_each("adapter_in_dim adapter_out_dim adapter_input_size mm_embed_dim ext_pw_out_channel", HIDDEN),
    **_each("depthwise_separable_out_channel nemo_conv_channels", HIDDEN),
    **_each("intermediate_size ffn_hidden_size decoder_ffn_dim ffn_dim n_inner dim_ff d_inner dff", 48),
    **_each("moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size", 16),
    **_each("expert_ffn_hidden_size moe_shared_expert_intermediate_size dense_intermediate_size", 16),
    **_each("num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers num_decoder_layers", 4),
    **_each("num_attention_heads n_head num_heads n_heads decoder_attention_heads num_decoder_attention_heads", 4),
    **_each("attention_heads swa_num_attention_heads", 4),
    **_each("num_key_value_heads swa_num_key_value_heads", 2),
    **_each("head_dim swa_head_dim mamba_head_dim dim_head qk_nope_head_dim qk_rope_head_dim v_head_dim", 8),
    **_each("linear_head_dim linear_key_head_dim linear_value_head_dim kv_channels global_head_dim", 8),
    **_each("max_position_embeddings n_positions max_seq_len n_ctx max_target_positions", 256),
    **_each("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
    **_each("num_experts_per_tok moe_topk moe_k", 2),
    **_each("n_group topk_group first_k_dense_replace n_shared_experts mamba_n_groups n_groups", 1),
    **_each("q_lora_rank kv_lora_rank o_lora_rank swa_q_lora_rank swa_kv_lora_rank", 16),
    # Few heads score many tokens 0, and which of those are looked at is then arbitrary
    **_each("index_n_heads indexer_n_heads index_head_dim indexer_head_dim", 16),
    "index_topk": 4,
    **_each("mamba_n_heads mamba_num_heads n_mamba_heads mamba_d_head mamba_d_state mamba_chunk_size", 8),
    **_each("state_size ssm_state_size chunk_size hc_lowrank", 8),
    **_each("linear_num_heads linear_num_value_heads rotary_dim time_step_rank adapter_rank zero_expert_num", 4),
    "linear_num_key_heads": 2,
    **_each("sliding_window sliding_window_size window_size attention_chunk_size attention_window_size", 6),
    "local_attention": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **_each("image_token_id image_token_index", 97),
    **_each("video_token_id video_token_index", 98),
    **_each("audio_token_id audio_token_index", 99),
    "is_decoder": True,
    "tie_word_embeddings": False,  # a tied random model echoes its last token
}


def _layers(*types, name="layer_types"):
    return {name: list(types) * (4 // len(types))}


_SLIDING = _layers("sliding_attention", "full_attention")
_MULTI_HEAD = {"num_key_value_heads": 4}
_COMPRESSED = {"indexer_kv_heads": 1, "indexer_budget": 4, "indexer_compress_ratio": 2}
_DOTS3 = _MULTI_HEAD | {
    **{"swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_num_attention_heads": 4},
    **{"swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
}

# What families need beside their sizes: parts that agree, and every kind of layer that they are made of
FAMILIES = {
    "axk1": _MULTI_HEAD | {"head_dim": None},
    "axk2": _MULTI_HEAD | {"head_dim": None},
    "bailing_hybrid": _MULTI_HEAD | {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "cohere_compass_text": _SLIDING
    | {"rope_parameters": _each("full_attention sliding_attention", {"rope_type": "default", "rope_theta": 1e4})},
    "cpmant": {"prompt_types": 4, "prompt_length": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _MULTI_HEAD,
    "deepseek_v3": _MULTI_HEAD,
    "deepseek_v32": _MULTI_HEAD,
    "dots3_note": {"text_config": _DOTS3, "vision_config": {"mlp_layer_types": ["dense"] * 4}},
    "dots3_note_text": _DOTS3,
    "falcon_h1": {"mamba_d_ssm": 64},
    "fuyu": {"text_config": {"model_type": "persimmon"}},
    "gemma3": {"text_config": _SLIDING, "vision_config": {"model_type": "siglip_vision_model"}},
    "gemma3_text": _SLIDING,
    "gemma3n_text": _SLIDING | {"num_kv_shared_layers": 0},
    "gemma4": {"text_config": {"hidden_size_per_layer_input": 0}},
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "gemma4_unified": {"vision_config": {"patch_size": 2}},
    "glm4_moe_lite": _MULTI_HEAD,
    "glm_moe_dsa": _MULTI_HEAD,
    "got_ocr2": {"text_config": {"model_type": "qwen2"}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": _layers("mamba", "attention"),
    "inkling2_text": _layers("hybrid_sliding", "hybrid"),
    "inkling_text": _layers("hybrid_sliding", "hybrid"),
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _MULTI_HEAD | _layers("linear_attention", "full_attention"),
    "kolibri1": _SLIDING,
    "laguna": _SLIDING,
    "lfm2": _layers("conv", "full_attention"),
    "lfm2_moe": _layers("conv", "full_attention") | {"num_dense_layers": 1},
    "longcat_flash": _MULTI_HEAD | {"num_layers": 2},
    "mamba2": {"num_heads": 8},
    "mellum": _SLIDING,
    "minicpm3": _MULTI_HEAD,
    "minimax_m3_vl_text": _layers("minimax_m3_sparse", "full_attention")
    | {"index_n_heads": 2, "index_block_size": 4, "index_topk_blocks": 2},
    "ministral": _SLIDING,
    "moss_transcribe_diarize": {"text_config": {"model_type": "qwen3"}},
    # A longer shortest step: what a forward pass rounds up to, and a decoding step does not
    "nemotron_h": _layers("mamba", "moe", "attention", "mlp", name="layers_block_type") | {"time_step_min": 0.05},
    "qwen4_exp": {"text_config": _COMPRESSED},
    "qwen4_exp_text": _COMPRESSED,
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 16]},
    "xlm": {"causal": True},
    "xlstm": {"hidden_size": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "youtu": _MULTI_HEAD,
    "zamba2": _layers("mamba", "hybrid", name="layers_block_type")
    | {"num_key_value_heads": None, "time_step_min": 0.05},
    "zaya": {"num_experts_per_tok": 1},
}

# What a family also comes as
VARIANTS = {
    "falcon": {"ALiBi": {"alibi": True}},
    "falcon_h1": {"as released, with a multiplier of embeddings": {"embedding_multiplier": 5.5}},
    "gemma4_text": {"embeddings per layer (E2B, E4B)": {"hidden_size_per_layer_input": 8}},
    "minimax_m3_vl_text": {"no sparse layers": _layers("full_attention")},
    "mistral": {"no sliding window": {"sliding_window": None}},
    "mixtral": {"no sliding window": {"sliding_window": None}},
    "phi3": {"no sliding window": {"sliding_window": None}},
    "qwen2": {"sliding window": {"use_sliding_window": True, "max_window_layers": 2}},
    "qwen3": {"sliding window": {"use_sliding_window": True, "max_window_layers": 2}},
    "starcoder2": {"no sliding window": {"sliding_window": None}},
}


def names():
    """All families, and behind each its variants as `family: variant`."""
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        yield family
        yield from (f"{family}: {variant}" for variant in VARIANTS.get(family, ()))


def build(name):
    """A tiny random model in float32.

    Args:
        name: a family, or `family: variant`.
    """
    family, _, variant = name.partition(": ")
    own = FAMILIES.get(family, {}) | (VARIANTS[family][variant] if variant else {})

    def make():
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**_arguments(CONFIG_MAPPING[family], own)))

    with torch.device("meta"):
        count = sum(p.numel() for p in make().parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{name} has {count:,} parameters: its configuration has sizes of other names.")
    torch.manual_seed(0)
    model = make().float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 or parameter.std() == 0:
                parameter += 0.05 * torch.randn_like(parameter)
            else:  # large enough that tokens and layers all count
                parameter *= max(1.0, 0.8 * parameter.shape[-1] ** -0.5 / parameter.std())
    settings = model.generation_config
    settings.pad_token_id = 0
    for name in ("eos_token_id", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens"):
        setattr(settings, name, None)
    settings.begin_suppress_tokens = None
    return model.to(DEVICE)


def _arguments(config_class, own):
    """Arguments for a configuration: the sizes that it has fields for, those of its parts, and its own."""
    if dataclasses.is_dataclass(config_class):
        fields = {field.name for field in dataclasses.fields(config_class)}
    else:
        fields = set(inspect.signature(config_class.__init__).parameters)
    arguments = {field: value for field, value in SIZES.items() if field in fields} | own
    for field, part in config_class.sub_configs.items():
        given = own.get(field, {})
        part = CONFIG_MAPPING[given["model_type"]] if "model_type" in given else part
        if part.__name__ != "AutoConfig":
            arguments[field] = _arguments(part, given)
    # None leaves a field out, save where it says that there is no window
    return {field: value for field, value in arguments.items() if value is not None or field == "sliding_window"}


# ----- what ACD does on them -----

EXACT = "exact"
GENERATE = "exact, as `generate()` runs the model"
ONE_LENGTH = "exact for two soft prompts of one length and a prompt without padding"

# The few reasons to refuse a model, and the words of the error
REFUSALS = {
    "keeps no transformers cache": "does not keep its state in a transformers Cache",
    "embeds tokens once per layer": "embeds tokens once per layer",
    "routes by token ids": "chooses experts by token ids",
    "takes no embeddings": "takes no inputs_embeds",
    "scales the embeddings of tokens alone": "scales the embeddings of its tokens",
}

# Every family that is not exact
KNOWN = {
    **_each("moshi nemotron_h zamba2", GENERATE),
    **_each("camembert data2vec-text roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod", GENERATE),
    **_each("bart bigbird_pegasus blenderbot blenderbot-small git marian mbart minimax_m3_vl_text mvp", ONE_LENGTH),
    **_each("pegasus plbart prophetnet recurrent_gemma trocr whisper", ONE_LENGTH),
    **_each("blt minimax openai-gpt reformer rwkv xlm xlnet xlstm", "refused: keeps no transformers cache"),
    "gemma3n_text": "refused: embeds tokens once per layer",
    "gemma4_text: embeddings per layer (E2B, E4B)": "refused: embeds tokens once per layer",
    "deepseek_v4": "refused: routes by token ids",
    "cpmant": "refused: takes no embeddings",
    "falcon_h1: as released, with a multiplier of embeddings": "refused: scales the embeddings of tokens alone",
}

# Families of which no tiny model can be built, and why
UNBUILT = {
    "gemma3n": "needs timm; its text model is gemma3n_text",
    **_each("gemma4_assistant gemma4_unified_assistant", "a drafter, which reads another model's keys and values"),
    **_each("musicgen musicgen_melody", "AutoModelForCausalLM does not build it"),
}


class GenerateReference(ReferenceProcessor):
    """The slow reference as generate() runs a model: positions from 0 on, and new tokens one by one behind a cache."""

    def stream(self, soft, row, ids):
        pads = int((self.mask[row] == 0).sum())
        prompt, new = ids[pads : self.start], ids[self.start :]
        embeds = torch.cat([soft, self.model.get_input_embeddings()(prompt)])[None]
        takes = inspect.signature(self.model.forward).parameters
        name = "cache_params" if "cache_params" in takes else "past_key_values"
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        positions = torch.arange(len(soft) + len(ids) - pads, device=ids.device)[None]
        for call in ({"inputs_embeds": embeds}, *({"input_ids": token[None, None]} for token in new)):
            here, positions = positions.split([n := next(iter(call.values())).shape[1], positions.shape[1] - n], 1)
            if "position_ids" in takes:
                call["position_ids"] = here
            with torch.no_grad():
                logits = self.model(**call, **{name: cache}, use_cache=True).logits
        return logits[:, -1].float()


def _pair(model, n_s, n_a, **config):
    """Random soft prompts, louder than tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = model.get_input_embeddings()(torch.tensor(TOKENS, device=model.device)).detach()
    prompts = (torch.randn(n, tokens.shape[-1], generator=generator).to(tokens) for n in (n_s, n_a))
    return PromptPair(*(1.5 * tokens.std() * prompt for prompt in prompts), PairConfig(**config))


def _generate(model, batch, processor=None):
    return model.generate(
        **batch,
        logits_processor=[processor] if processor else [],
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        suppress_tokens=[token for token in range(VOCAB) if token not in TOKENS],
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )


def _error(got, expected):
    """The largest difference, as a part of the largest score."""
    got, expected = got[:, TOKENS], expected[:, TOKENS]
    return float((got - expected).abs().max() / expected.abs().max())


def _worst(errors):
    return float(torch.tensor([*errors]).max())  # NaN, if any is


def acd_error(model, lengths, prompt_lengths, reference=ReferenceProcessor, **config):
    """How far ACD's scores are from a reference, over all new tokens of a left-padded batch.

    Args:
        model: the model.
        lengths: n_s and n_a, of the soft prompts.
        prompt_lengths: of each row's prompt.
        reference: the slow reference.
        config: of the pair.
    """
    pair, batch = _pair(model, *lengths, **config), build_batch(prompt_lengths)
    acd = ACDLogitsProcessor(model, pair, alpha=0.5, beta=0.0)
    output = _generate(model, batch, acd)
    acd.detach()
    swapped = PromptPair(pair.adversarial, pair.safeguarding)
    slow, other = (reference(model, p, alpha=0.5, mask=batch["attention_mask"]) for p in (pair, swapped))
    start = max(prompt_lengths)
    expected = [slow(output.sequences[:, : start + step], None) for step in range(NEW_TOKENS)]
    assert _error(other(output.sequences[:, :start], None), expected[0]) > 0.01, "the soft prompts change nothing"
    return _worst(map(_error, output.scores, expected))


def padding_error(model):
    """How far a model by itself, without ACD, is from itself on a row that is padded."""
    batch = build_batch((9, 5))
    padded = _generate(model, batch)
    tokens = iter(padded.sequences[1, 9:])

    def say_the_same(ids, scores):
        return scores.scatter(1, next(tokens).view(1, 1), torch.inf)

    alone = _generate(model, {name: value[1:, 4:] for name, value in batch.items()}, say_the_same)
    return _worst(_error(one[1:], other) for one, other in zip(padded.logits, alone.logits, strict=True))


def outcome(model):
    """What ACD does on a model: `EXACT`, `GENERATE`, `ONE_LENGTH`, `refused: ...` or `wrong: ...`."""
    cases = [((7, 4), (9, 5, 12)), ((3, 6), (9,))]
    padding = 0.0
    try:
        ACDLogitsProcessor(model, _pair(model, 7, 4)).detach()
    except ValueError as error:
        assert "\n" not in str(error), error
        if "does not handle left padding" not in str(error):
            return next((f"refused: {why}" for why, text in REFUSALS.items() if text in str(error)), f"wrong: {error}")
        cases, padding = [((5, 5), (9,))], padding_error(model)
        if padding < 0.01:
            return "wrong: refused, but left padding changes nothing"
    for reference, exact in ((ReferenceProcessor, EXACT), (GenerateReference, GENERATE)):
        error = _worst(acd_error(model, *case, reference) for case in cases)
        if error < TOLERANCE:
            return ONE_LENGTH if padding else exact
    return f"wrong: scores are off by {error:.0e} of the largest"


def shares(model, found):
    """Whether share_instruction_kv runs on a model with this `outcome`; then it is exact, or this raises."""
    if found.startswith("refused"):
        return False
    try:
        error = acd_error(model, (7, 4), (9, 5, 12), SharedReference, share_instruction_kv=True)
    except ValueError as refusal:
        assert "share_instruction_kv" in str(refusal), refusal
        return False
    assert error < TOLERANCE, f"share_instruction_kv is off by {error:.0e} of the largest score"
    return True


# ----- the page -----

HEAD = f"""# Model families

After this page you know whether acd-logits runs on your model, and whether `share_instruction_kv` does.

The table lists every family of `AutoModelForCausalLM` in transformers {VERSION}. The tests build a tiny random model
of each, and decode greedily: with a safeguarding prompt that is longer than the adversarial prompt in a left-padded
batch of three prompts, and with a shorter one on a single prompt.

- **{EXACT}**: the scores equal two full forward passes per row, without cache, padding or pairing. No score differs by
  more than {TOLERANCE:g} of the largest.
- **{GENERATE}**: the scores equal those of the plain model behind each soft prompt, with a cache, token by token.
  Such a model gives other logits in `generate()` than in one forward pass. RoBERTa and its relatives count positions
  from the padding token's id plus 1, but `generate()` counts from 0. Nemotron-H and Zamba 2 round short time steps up
  in a forward pass only. Moshi has its sliding window in the cache only.
- **{ONE_LENGTH}**: such a model gives other logits behind padding, with or without acd-logits. The shorter one of two
  soft prompts would stand behind padding, so prompts of two lengths are refused. A padded batch is as wrong as it is
  plain.
- **refused**: `ACDLogitsProcessor` raises an error that says why.
- **not tested**: no tiny model can be built.

The last column says whether `share_instruction_kv=True` runs. It needs rotary embeddings, and full attention in every
layer. It is exact where it runs: the reference hides the soft prompts from the prompt. Key-value pairs, the default of
`acd-logits train`, run where this column says yes, with two exceptions: models with compressed keys (`kv_lora_rank` in
`config.json`, as in DeepSeek V3) and `mllama`. Other models that are not refused take `--prompt_type embedding`.

A name with a colon is a variant of the family above it. All of this is about text: pictures and sounds are refused in
every family.

| family | class | acd-logits | `share_instruction_kv` |
|---|---|---|---|
"""


def row(name, found, shared):
    """A line of the table.

    Args:
        name: the family.
        found: its `outcome`, or `None` for a model that cannot be built.
        shared: what `shares` says of it, if it is not refused.
    """
    family = name.partition(": ")[0]
    says = f"not tested: {UNBUILT[name]}" if found is None else found
    return f"| `{name}` | {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]} | {says} | {'yes' if shared else 'no'} |"


def main():
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_file", type=Path, default=PAGE, help="Default: %(default)s.")
    output_file = parser.parse_args().output_file
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = []
    for name in names():
        if name in UNBUILT:
            rows.append(row(name, None, False))
            continue
        model = build(name)
        found = outcome(model)
        rows.append(row(name, found, shares(model, found)))
        if found != KNOWN.get(name, EXACT):
            print(f"{name}: {found}")
    output_file.write_text(HEAD + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
