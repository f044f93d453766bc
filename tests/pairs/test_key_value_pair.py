"""Key-value prompts as an artifact: saved as cartridges, checked, made from texts, shown in a card."""

import json
import re

import pytest
import torch
import yaml
from peft import PeftModel, PrefixTuningConfig
from safetensors.torch import load_file, save_file

from acd_logits import ACDLogitsProcessor, PromptPair
from acd_logits.pairs import PairConfig
from acd_logits.pairs.fit import check_fit_unloaded
from acd_logits.pairs.model_card import generate_card
from conftest import (
    ARCHITECTURES,
    HIDDEN,
    PAIR_FILES,
    VOCAB,
    assert_same,
    build_batch,
    build_key_value_pair,
    build_model,
    build_pair,
)
from reference import key_value_logits

STREAMS = ("safeguarding", "adversarial")
WIDTH = 3 * 2 * 2 * 8
CONFIG, WEIGHTS = "safeguarding/adapter_config.json", "safeguarding/adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    config = {"alpha": 0.4, "base_model_name_or_path": "org/tiny", "hidden_size": HIDDEN, "vocab_size": VOCAB}
    build_key_value_pair(**config).save_pretrained(tmp_path / "pair")
    return tmp_path / "pair"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestRoundTrip:
    def test_tensors_and_config_come_back(self, saved):
        pair, loaded = build_key_value_pair(), PromptPair.from_pretrained(saved)
        for stream in STREAMS:
            assert torch.equal(getattr(loaded, stream), getattr(pair, stream))
        assert (loaded.alpha, loaded.config.base_model_name_or_path) == (0.4, "org/tiny")
        config = loaded.config
        assert (config.prompt_type, config.share_instruction_kv, config.format_version) == ("key_value", True, 2)
        assert (config.num_layers, config.num_key_value_heads, config.head_dim) == (3, 2, 8)
        assert (config.hidden_size, config.vocab_size) == (HIDDEN, VOCAB)
        files = sorted(str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file())
        assert files == PAIR_FILES

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_dtype_is_kept(self, tmp_path, dtype):
        pair = build_key_value_pair()
        PromptPair(pair.safeguarding.to(dtype), pair.adversarial.to(dtype)).save_pretrained(tmp_path)
        loaded = PromptPair.from_pretrained(tmp_path)
        assert (loaded.safeguarding.dtype, loaded.adversarial.dtype) == (dtype, dtype)
        assert torch.equal(loaded.adversarial, pair.adversarial.to(dtype))

    def test_a_pair_replaces_one_of_the_other_kind(self, saved):
        build_pair().save_pretrained(saved)
        assert PromptPair.from_pretrained(saved).safeguarding.shape == (7, HIDDEN)
        build_key_value_pair().save_pretrained(saved)
        assert PromptPair.from_pretrained(saved).safeguarding.shape == (7, 3, 2, 2, 8)

    def test_null_prompt_cannot_be_saved(self, tmp_path):
        with pytest.raises(ValueError, match="adversarial prompt is the null prompt"):
            build_key_value_pair(4, 0).save_pretrained(tmp_path / "pair")

    def test_older_packages_read_embedding_pairs_and_refuse_these(self, saved, tmp_path):
        """They raise for another format_version, and for a key they do not know."""
        assert json.loads((saved / "acd_config.json").read_text())["format_version"] == 2
        build_pair().save_pretrained(tmp_path / "embedding")
        values = json.loads((tmp_path / "embedding" / "acd_config.json").read_text())
        assert values["format_version"] == 1
        assert not {"prompt_type", "num_layers", "num_key_value_heads", "head_dim"} & set(values)
        assert values["share_instruction_kv"] is False

    def test_digests_differ(self):
        assert build_key_value_pair().digest != build_key_value_pair(seed=2).digest


class TestPeft:
    @pytest.mark.parametrize("stream", STREAMS)
    @pytest.mark.parametrize("name", ["llama", "qwen3"])
    def test_stock_peft_holds_the_same_keys_and_values(self, saved, stream, name):
        pair = PromptPair.from_pretrained(saved)
        peft_model = PeftModel.from_pretrained(build_model(name), saved, subfolder=stream)
        layers = peft_model.get_prompt(batch_size=1).layers
        assert len(layers) == 3
        for index, layer in enumerate(layers):
            keys, values = getattr(pair, stream)[:, index].permute(1, 2, 0, 3)  # each [heads, n, head_dim]
            assert torch.equal(layer.keys[0], keys)
            assert torch.equal(layer.values[0], values)

    @pytest.mark.parametrize("stream", STREAMS)
    def test_stock_peft_lets_the_whole_input_see_them(self, saved, stream):
        """And counts their slots as positions, so that the input begins at position n."""
        model, prompt = build_model(), getattr(PromptPair.from_pretrained(saved), stream)
        ids, n = build_batch((9,))["input_ids"], len(prompt)
        expected = [key_value_logits(model, prompt, ids[0], 1, start) for start in (n, 0)]
        peft_model = PeftModel.from_pretrained(model, saved, subfolder=stream)
        torch.testing.assert_close(peft_model(ids).logits[0], expected[0], atol=1e-5, rtol=0)
        before = peft_model(ids, position_ids=torch.arange(9)[None] - n).logits[0]  # to which peft adds n
        torch.testing.assert_close(before, expected[1], atol=1e-5, rtol=0)

    def test_what_peft_saves_again_loads(self, saved, tmp_path):
        pair = PromptPair.from_pretrained(saved)
        for stream in STREAMS:
            peft_model = PeftModel.from_pretrained(build_model(), saved, subfolder=stream)
            peft_model.save_pretrained(tmp_path / "again")
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                (tmp_path / "again" / name).replace(saved / stream / name)
        assert torch.equal(PromptPair.from_pretrained(saved).adversarial, pair.adversarial)


def weights(change):
    def damage(folder):
        flat = load_file(folder / WEIGHTS)["prompt_embeddings"]
        save_file({"prompt_embeddings": change(flat).contiguous()}, folder / WEIGHTS)

    return damage


def poison(flat):
    flat[3, WIDTH // 3 * 2] = torch.nan  # the third of three layers
    return flat


def truncate(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-40])


def mix(folder, stream, build):
    other = folder.parent / "other"
    build().save_pretrained(other)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (other / stream / name).replace(folder / stream / name)


DAMAGE = {
    "NaN": (
        weights(poison),
        ValueError,
        r"safetensors: the safeguarding prompt holds NaN .* in layer 2: its training",
    ),
    "cut off": (truncate, OSError, "is damaged"),
    "narrow": (weights(lambda flat: flat[:, :-1]), ValueError, r"safetensors: its tensor is \[7, 95\], .* 3, 2, 16"),
    "five dimensions": (
        weights(lambda flat: flat.view(7, 3, 2, 2, 8)),
        ValueError,
        r"safetensors: .* must be a float tensor \[num_virtual_tokens, hidden_size\] \(float16.* got \[7, 3",
    ),
    "integers": (weights(lambda flat: flat.long()), ValueError, r"of torch\.int64"),
    "another length": (weights(lambda flat: flat[:6]), ValueError, "holds 6 virtual tokens, .* says 7"),
    "no layers": (
        lambda f: edit(f / CONFIG, num_layers=None),
        ValueError,
        "says num_layers, .* None, 2, 16, which do",
    ),
    "layers as text": (lambda f: edit(f / CONFIG, num_layers="3"), ValueError, "'3', 2, 16, which do not make 96"),
    "other heads": (lambda f: edit(f / CONFIG, num_attention_heads=3), ValueError, "3, 3, 16, which do not make 96"),
    "no heads": (lambda f: edit(f / CONFIG, num_attention_heads=0), ValueError, "3, 0, 16, which do not make 96"),
    "a kind of heads": (
        lambda f: edit(f / CONFIG, num_attention_heads=4),
        ValueError,
        "the safeguarding prompt has 4 key-value heads, the adversarial one 2",
    ),
    "prefix tuning": (
        lambda f: PrefixTuningConfig(num_virtual_tokens=7).save_pretrained(f / "safeguarding"),
        ValueError,
        r"adapter_config\.json is a PREFIX_TUNING adapter, not a cartridge one",
    ),
    "embeddings in one stream": (
        lambda f: mix(f, "adversarial", build_pair),
        ValueError,
        r"adapter_config\.json is a PROMPT_TUNING adapter, not a cartridge one",
    ),
    "a type of today's": (
        lambda f: edit(f / "acd_config.json", prompt_type="embedding"),
        ValueError,
        r"acd_config\.json: format_version must be 1, got 2, for prompt_type 'embedding'",
    ),
    "an unknown type": (
        lambda f: edit(f / "acd_config.json", prompt_type="prefix"),
        ValueError,
        r"acd_config\.json: prompt_type must be 'embedding' or 'key_value', got 'prefix'",
    ),
    "an older version": (
        lambda f: edit(f / "acd_config.json", format_version=1),
        ValueError,
        r"acd_config\.json: format_version must be 2, got 1",
    ),
    "a later version": (
        lambda f: edit(f / "acd_config.json", format_version=3),
        ValueError,
        r"has format_version 3, this acd-logits .* reads 1 and 2",
    ),
    "not shared": (
        lambda f: edit(f / "acd_config.json", share_instruction_kv=False),
        ValueError,
        r"acd_config\.json: share_instruction_kv must be true for key-value prompts",
    ),
    "head size": (
        lambda f: edit(f / "acd_config.json", head_dim=16),
        ValueError,
        r"says head_dim 16, the prompts have 8",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_key_value_pairs(saved, what):
    damage, kind, message = DAMAGE[what]
    damage(saved)
    with pytest.raises(kind, match=message) as error:
        PromptPair.from_pretrained(saved)
    assert "\n" not in str(error.value)


def test_cartridges_in_an_embedding_pair(tmp_path):
    build_pair().save_pretrained(tmp_path / "pair")
    for stream in STREAMS:
        mix(tmp_path / "pair", stream, build_key_value_pair)
    with pytest.raises(ValueError, match=r"adapter_config\.json is a CARTRIDGE adapter, not a prompt-tuning one"):
        PromptPair.from_pretrained(tmp_path / "pair")


def zeros(n=3, layers=3, heads=2, size=8):
    return torch.zeros(n, layers, 2, heads, size)


@pytest.mark.parametrize(
    ("safeguarding", "adversarial", "message"),
    [
        (zeros(), torch.zeros(3, 32), "safeguarding prompt is of type 'key_value', the adversarial one 'embedding'"),
        (zeros(layers=4), zeros(), "the safeguarding prompt has 4 layers, the adversarial one 3"),
        (zeros(heads=4), zeros(), "the safeguarding prompt has 4 key-value heads, the adversarial one 2"),
        (zeros(size=4), zeros(), "the safeguarding prompt has heads of size 4, the adversarial one 8"),
        (torch.zeros(3, 3, 1, 2, 8), zeros(), r"must be .* or \[num_virtual_tokens, layers, 2, kv_heads, head_dim\]"),
        (torch.zeros(3, 3, 2, 16), zeros(), r"must be .* got \[3, 3, 2, 16\]"),
        (zeros(layers=0), zeros(), r"must be .* got \[3, 0, 2, 2, 8\]"),
        (zeros().long(), zeros(), r"must be .* torch\.int64"),
        (zeros(), torch.full_like(zeros(), torch.inf), "adversarial prompt holds NaN or infinite values in layer 0"),
    ],
)
def test_bad_tensors(safeguarding, adversarial, message):
    with pytest.raises(ValueError, match=message) as error:
        PromptPair(safeguarding, adversarial)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_type": "keys"}, "prompt_type must be 'embedding' or 'key_value', got 'keys'"),
        ({"prompt_type": None}, "prompt_type must be text, got null"),
        ({"prompt_type": "key_value", "format_version": 1}, "format_version must be 2, got 1"),
        (
            {"prompt_type": "key_value", "share_instruction_kv": False},
            "share_instruction_kv must be true for key-value",
        ),
        ({"prompt_type": "key_value", "num_layers": 0}, "num_layers must be at least 1"),
        ({"num_layers": 3}, "num_layers must be null for embedding prompts"),
    ],
)
def test_bad_config_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        PairConfig(**fields)


def test_a_config_of_the_other_kind():
    with pytest.raises(ValueError, match=r"says prompt_type 'embedding', the prompts are of type 'key_value'"):
        PromptPair(zeros(), zeros(), PairConfig())
    with pytest.raises(ValueError, match=r"says prompt_type 'key_value', the prompts are of type 'embedding'"):
        PromptPair(torch.zeros(3, 4), torch.zeros(3, 4), PairConfig(prompt_type="key_value"))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((4, 2, 8), "for 4 layers, {} has 3"),
        ((3, 4, 8), "for 4 key-value heads, {} has 2"),
        ((3, 2, 16), "for heads of size 16, {} has 8"),
    ],
)
def test_a_pair_of_another_size_fits_no_model(model, sizes, message):
    pair = build_key_value_pair(sizes=sizes)
    with pytest.raises(ValueError, match=message.format("the model")):
        pair.check(model)
    with pytest.raises(ValueError, match=message.format("org/tiny")):
        check_fit_unloaded(pair.config, ARCHITECTURES["llama"], "org/tiny", transfer=True)


def test_a_pair_of_the_same_sizes_fits(model):
    for pair in (build_key_value_pair(), build_key_value_pair(hidden_size=HIDDEN, vocab_size=VOCAB)):
        pair.check(model)
        assert not check_fit_unloaded(pair.config, ARCHITECTURES["llama"], "org/tiny", transfer=False)
    with pytest.raises(ValueError, match="for hidden size 64, the model has 32"):
        build_key_value_pair(hidden_size=64).check(model)


class TestFromText:
    def test_the_models_own_keys_and_values(self, model, tokenizer):
        pair = PromptPair.from_text(model, tokenizer, "w5 w6", "w7", prompt_type="key_value")
        assert (pair.safeguarding.shape, pair.adversarial.shape) == ((2, 3, 2, 2, 8), (1, 3, 2, 2, 8))
        ids = torch.tensor([[5, 6]])
        cache = model(ids, position_ids=torch.tensor([[-2, -1]])).past_key_values
        for index, layer in enumerate(cache.layers):
            keys, values = pair.safeguarding[:, index].permute(1, 2, 0, 3)
            torch.testing.assert_close(keys, layer.keys[0])
            torch.testing.assert_close(values, layer.values[0])
        assert (pair.config.vocab_size, pair.config.hidden_size) == (VOCAB, HIDDEN)
        assert not pair.safeguarding.requires_grad

    @pytest.mark.parametrize("adversarial", ["w7 w8 w9", ""])
    def test_it_decodes_as_the_embedding_pair_with_a_shared_instruction(self, model, tokenizer, adversarial):
        options = {"max_new_tokens": 5, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
        results = []
        for prompt_type in ("embedding", "key_value"):
            pair = PromptPair.from_text(model, tokenizer, "w5 w6", adversarial, prompt_type)
            acd = ACDLogitsProcessor(model, pair, share_instruction_kv=True)
            results.append(model.generate(**build_batch(), logits_processor=[acd], **options))
        assert_same(*results)

    def test_the_null_prompt(self, model, tokenizer):
        pair = PromptPair.from_text(model, tokenizer, "w5", "", prompt_type="key_value")
        assert pair.adversarial.shape == (0, 3, 2, 2, 8)

    def test_an_unknown_type(self, model, tokenizer):
        with pytest.raises(ValueError, match="prompt_type must be 'embedding' or 'key_value', got 'kv'"):
            PromptPair.from_text(model, tokenizer, prompt_type="kv")


def test_the_card_says_what_they_are():
    card = generate_card(build_key_value_pair(hidden_size=HIDDEN))
    text = " ".join(card.split())
    assert "Two key-value prompts that make" in text
    assert "(SP) of 7 virtual tokens" in text
    assert "a key and a value in every layer" in text
    assert "the instruction does not see them, only its last token and the new tokens do" in text
    assert "with stock peft. There the whole input sees the prompt" in text
    assert "(hidden size 32, layers 3, key-value heads 2, head size 8)" in text
    tags = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])["tags"]
    assert "cartridge" in tags
    assert "prompt-tuning" not in tags
    assert "$" not in card
    embedding = generate_card(build_pair())
    assert "Two soft prompts that make" in embedding
    assert "key" not in embedding
