"""What `acd-logits export-vllm` writes and refuses, and the plugin's checks, without vLLM."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import processors
from transformers import AutoConfig, AutoTokenizer, BertConfig, BertLMHeadModel

import acd_logits.vllm
from acd_logits import PromptPair
from acd_logits.cli import main
from acd_logits.pairs.key_values import embeddings_to_key_values
from acd_logits.vllm import exported, requests, startup
from acd_logits.vllm.export import export
from acd_logits.vllm.exported import ExportedPair, read_pair
from conftest import VOCAB, build_key_value_pair, build_model, build_pair

TEMPLATE = "{% for message in messages %}<bos>{{ message.content }}<eos>{% endfor %}"
N = 5


@pytest.fixture
def base(tmp_path, tokenizer):
    """Writes a tiny base model with a chat template and a BOS token; returns its folder."""

    def write(name="llama", **kwargs):
        folder = tmp_path / "base"
        build_model(name).save_pretrained(folder, **kwargs)
        tokenizer.chat_template = TEMPLATE
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
        )
        tokenizer.save_pretrained(folder)
        return folder

    return write


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def equal_pair(**config):
    return build_pair(n_s=N, n_a=N, **config)


# ----- what is written -----


def test_config_names_the_plugins_architecture_and_the_pair(base, tmp_path):
    folder = base()
    export(folder, tmp_path / "out", equal_pair(alpha=0.3, beta=0.2))

    config = read(tmp_path / "out" / "config.json")
    assert config["architectures"] == ["ACDLlamaForCausalLM"]
    assert config["acd"] == {
        "format_version": 2,
        "prompt_type": "embedding",
        "alpha": 0.3,
        "beta": 0.2,
        "num_virtual_tokens": N,
        "hidden_size": 32,
        "placeholder_id": VOCAB,  # the tokenizer is as large as the model's vocabulary
    }
    assert config["model_type"] == "llama"
    AutoConfig.from_pretrained(tmp_path / "out")


def test_alpha_and_beta_can_be_set(base, tmp_path):
    pair = equal_pair()
    export(base(), tmp_path / "out", pair, alpha=1.5, beta=0)
    read_back = read_pair(tmp_path / "out")
    assert (read_back.alpha, read_back.beta) == (1.5, 0)
    assert torch.equal(read_back.safeguarding, pair.safeguarding)
    assert torch.equal(read_back.adversarial, pair.adversarial)

    entry = read(tmp_path / "out" / "config.json")["acd"]
    assert (entry["alpha"], entry["beta"]) == (1.5, 0)


def test_a_pair_trained_for_a_shared_instruction_warns(base, tmp_path, caplog):
    export(base(), tmp_path / "out", equal_pair(share_instruction_kv=True))
    assert "trained with share_instruction_kv" in caplog.text


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_tensors_are_the_pair_and_what_the_model_embeds(base, tmp_path, name):
    folder, pair = base(name), equal_pair()
    export(folder, tmp_path / "out", pair)

    tensors = load_file(tmp_path / "out" / "acd.safetensors")
    assert sorted(tensors) == sorted(exported.TENSORS["embedding"])
    assert torch.equal(tensors["acd.safeguarding"], pair.safeguarding)
    assert torch.equal(tensors["acd.adversarial"], pair.adversarial)
    embedding = build_model(name).get_input_embeddings()  # Gemma's multiplies by sqrt(hidden_size)
    assert torch.equal(tensors["acd.probe_embeddings"], embedding(tensors["acd.probe_ids"]))


def test_a_key_value_pair_goes_with_keys_and_values_of_the_model(base, tmp_path):
    folder, pair = base(), build_key_value_pair(n_s=N, n_a=N, alpha=0.3)
    export(folder, tmp_path / "out", pair)

    entry = read(tmp_path / "out" / "config.json")["acd"]
    assert (entry["prompt_type"], entry["num_virtual_tokens"], entry["hidden_size"]) == ("key_value", N, 32)
    tensors = load_file(tmp_path / "out" / "acd.safetensors")
    assert sorted(tensors) == sorted(exported.TENSORS["key_value"])
    ids, positions = tensors["acd.probe_ids"][None], tensors["acd.probe_positions"][None]
    layer = build_model()(ids, position_ids=positions).past_key_values.layers[0]
    found = torch.stack([layer.keys[0], layer.values[0]]).permute(2, 0, 1, 3)
    torch.testing.assert_close(tensors["acd.probe_key_values"], found)

    read_back = read_pair(tmp_path / "out")
    assert read_back.alpha == 0.3
    assert torch.equal(read_back.safeguarding, pair.safeguarding)
    assert torch.equal(read_back.adversarial, pair.adversarial)


def test_a_single_weight_file_is_linked(base, tmp_path):
    folder = base()
    export(folder, tmp_path / "out", equal_pair())

    assert (tmp_path / "out" / "model.safetensors").samefile(folder / "model.safetensors")
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_shards_are_linked_and_the_index_lists_the_pair(base, tmp_path):
    folder = base(max_shard_size="20KB")
    export(folder, tmp_path / "out", equal_pair())

    before = read(folder / "model.safetensors.index.json")["weight_map"]
    after = read(tmp_path / "out" / "model.safetensors.index.json")["weight_map"]
    assert len(set(before.values())) > 1
    assert after == before | dict.fromkeys(exported.TENSORS["embedding"], "acd.safetensors")
    for name in set(before.values()):
        assert (tmp_path / "out" / name).samefile(folder / name)


def test_weights_are_linked_across_file_systems(base, tmp_path, monkeypatch):
    folder = base()
    monkeypatch.setattr("pathlib.Path.hardlink_to", lambda *_: (_ for _ in ()).throw(OSError("cross-device")))
    export(folder, tmp_path / "out", equal_pair())

    link = tmp_path / "out" / "model.safetensors"
    assert link.is_symlink() and link.readlink() == (folder / "model.safetensors").resolve()


def test_the_texts_are_made_equally_long(base, tmp_path):
    folder = base()
    backend = read(folder / "tokenizer.json")
    backend["model"]["vocab"]["\n"] = backend["model"]["vocab"].pop("w96")
    backend["added_tokens"].append(backend["added_tokens"][0] | {"id": 96, "content": "\n", "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    export(folder, tmp_path / "out")

    model = build_model()
    texts = PromptPair.from_text(model, AutoTokenizer.from_pretrained(folder))
    tensors = load_file(tmp_path / "out" / "acd.safetensors")
    n = read(tmp_path / "out" / "config.json")["acd"]["num_virtual_tokens"]
    for stream in ("safeguarding", "adversarial"):
        text, written = getattr(texts, stream), tensors[f"acd.{stream}"]
        assert len(written) == n
        assert torch.equal(written[n - len(text) :], text)
        line_break = model.get_input_embeddings().weight[96]
        assert torch.equal(written[: n - len(text)], line_break.expand(n - len(text), -1))
    assert len(texts.safeguarding) != len(texts.adversarial)

    export(folder, tmp_path / "keys", prompt_type="key_value")
    keys = load_file(tmp_path / "keys" / "acd.safetensors")
    for stream in ("safeguarding", "adversarial"):
        expected = embeddings_to_key_values(model, tensors[f"acd.{stream}"])
        torch.testing.assert_close(keys[f"acd.{stream}"], expected)


# ----- the tokenizer -----


@pytest.mark.parametrize("template", [TEMPLATE, {"default": TEMPLATE, "tool_use": "w4" + TEMPLATE}])
def test_the_tokenizer_is_the_base_models(base, tmp_path, template):
    folder = base()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    export(folder, tmp_path / "out", equal_pair())

    written = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert written("w5 w9")["input_ids"] == [1, 5, 9]
    chat = [{"role": "user", "content": "w5"}]
    for name in template if isinstance(template, dict) else [None]:
        text = written.apply_chat_template(chat, tokenize=False, chat_template=name)
        assert written(text, add_special_tokens=False)["input_ids"] == [4] * (name == "tool_use") + [1, 5, 2]


def test_no_text_spells_the_placeholder(base, tmp_path):
    folder = base()
    backend = read(folder / "tokenizer.json")
    del backend["model"]["vocab"]["w96"]  # a row of the model that the tokenizer does not use
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    export(folder, tmp_path / "out", equal_pair())

    placeholder = read(tmp_path / "out" / "config.json")["acd"]["placeholder_id"]
    assert placeholder == VOCAB - 1
    assert placeholder not in AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab().values()


# ----- what is refused -----


def refused(folder, target, pair, message):
    with pytest.raises((OSError, ValueError), match=message):
        export(folder, target, pair)
    assert [path.name for path in target.parent.iterdir()] == ["base"]


def test_prompts_of_different_lengths(base, tmp_path):
    refused(base(), tmp_path / "out", build_pair(n_s=4, n_a=5), "4 and 5 virtual tokens")


def test_a_null_prompt(base, tmp_path):
    refused(base(), tmp_path / "out", build_pair(n_s=0, n_a=0), "0 and 0 virtual tokens")


def test_a_pair_of_another_model(base, tmp_path):
    refused(base(), tmp_path / "out", build_pair(n_s=N, n_a=N, hidden=16), "hidden size 16")


def test_an_exported_folder(base, tmp_path):
    folder = base()
    export(folder, tmp_path / "out", equal_pair())
    with pytest.raises(ValueError, match="exported already"):
        export(tmp_path / "out", tmp_path / "again", equal_pair())


def test_a_folder_that_exists(base, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="exists"):
        export(base(), tmp_path / "out", equal_pair())


def test_weights_that_are_not_safetensors(base, tmp_path):
    folder = base()
    torch.save(build_model().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, tmp_path / "out", equal_pair(), "safetensors")


def test_a_model_that_is_no_decoder(tmp_path):
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, vocab_size=9)
    BertLMHeadModel(config).save_pretrained(tmp_path / "base")
    settings = read(tmp_path / "base" / "config.json") | {"architectures": ["BertForMaskedLM"]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(settings))
    refused(tmp_path / "base", tmp_path / "out", equal_pair(), "BertForMaskedLM is not")


def test_a_tokenizer_with_more_tokens_than_the_model(base, tmp_path):
    folder = base()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["w97", "w98"])
    tokenizer.save_pretrained(folder)
    refused(folder, tmp_path / "out", equal_pair(), "more tokens than the model")


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_key_values_for_a_model_without_plain_keys(base, tmp_path, name):
    sizes = {"gemma3": (3, 2, 8), "gpt2": (3, 4, 8)}[name]
    refused(base(name), tmp_path / "out", build_key_value_pair(n_s=N, n_a=N, sizes=sizes), "use embedding prompts")


def test_key_values_of_another_model(base, tmp_path):
    refused(base(), tmp_path / "out", build_key_value_pair(n_s=N, n_a=N, sizes=(2, 2, 8)), "2 layers")


# ----- the command -----


def test_command(base, tmp_path, capsys):
    folder = base()
    equal_pair().save_pretrained(tmp_path / "pair")
    arguments = ["--model_name_or_path", str(folder), "--pair", str(tmp_path / "pair"), "--alpha", "0.7"]
    assert main(["export-vllm", *arguments, "--output_dir", str(tmp_path / "out")]) == 0

    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert read(tmp_path / "out" / "config.json")["acd"]["alpha"] == 0.7


def test_command_takes_two_texts_and_a_scale_of_guidance(base, tmp_path, capsys):
    folder = base()
    (tmp_path / "polite.txt").write_text("w5 w6 w7\n")
    (tmp_path / "rude.txt").write_text("w8 w9 w10\n")
    arguments = ["--model_name_or_path", str(folder), "--positive", str(tmp_path / "polite.txt")]
    arguments += ["--negative", str(tmp_path / "rude.txt"), "--guidance_scale", "1.25", "--beta", "0"]
    assert main(["export-vllm", *arguments, "--output_dir", str(tmp_path / "out")]) == 0

    pair = read_pair(tmp_path / "out")
    texts = PromptPair.from_text(build_model(), AutoTokenizer.from_pretrained(folder), "w5 w6 w7", "w8 w9 w10")
    assert (pair.alpha, pair.beta) == (pytest.approx(0.2), 0)  # S - 0.2 A over 0.8 is A + 1.25 (S - A)
    assert torch.equal(pair.safeguarding, texts.safeguarding)
    assert torch.equal(pair.adversarial, texts.adversarial)


def test_command_says_in_one_line_what_is_wrong(tmp_path, fails):
    assert "--prompt_type is about texts" in fails("export-vllm", "--prompt_type", "key_value", "--output_dir", "new")
    assert "exists" in fails("export-vllm", "--output_dir", str(tmp_path))
    assert "--pair" in fails("export-vllm", "--revision", "main", "--output_dir", str(tmp_path / "out"))
    assert "holds no model" in fails(
        "export-vllm", "--model_name_or_path", str(tmp_path), "--output_dir", str(tmp_path / "out")
    )


# ----- the plugin's checks -----


class ValidationError(ValueError):
    pass


@pytest.fixture
def config(monkeypatch):
    """A vLLM configuration under which everything is allowed."""
    stub = ModuleType("vllm.exceptions")
    stub.VLLMValidationError = ValidationError
    monkeypatch.setitem(sys.modules, "vllm.exceptions", stub)
    entry = {
        "format_version": 2,
        "prompt_type": "embedding",
        "alpha": 0.5,
        "beta": 0.1,
        "num_virtual_tokens": 3,
        "hidden_size": 32,
    }
    model = SimpleNamespace(
        architecture="ACDLlamaForCausalLM",
        hf_config=SimpleNamespace(acd=entry | {"placeholder_id": VOCAB}),
        logits_processors=None,
        get_vocab_size=lambda: VOCAB,
        max_model_len=16,
        runner_type="generate",
        is_multimodal_model=False,
        is_encoder_decoder=False,
        is_diffusion=False,
        use_mla=False,
        is_hybrid=False,
        is_attention_free=False,
        has_inner_state=False,
        requires_raw_input_tokens=False,
        uses_mrope=False,
        enable_prompt_embeds=False,
    )
    parallel = SimpleNamespace(
        pipeline_parallel_size=1,
        data_parallel_size=1,
        enable_expert_parallel=False,
        enable_eplb=False,
        prefill_context_parallel_size=1,
        decode_context_parallel_size=1,
        use_ubatching=False,
    )
    return SimpleNamespace(
        model_config=model,
        parallel_config=parallel,
        cache_config=SimpleNamespace(kv_offloading_size=None, kv_sharing_fast_prefill=False),
        compilation_config=SimpleNamespace(mode=3),
        aux_output_config=SimpleNamespace(enable_return_routed_experts=False),
        lora_config=None,
        speculative_config=None,
        kv_transfer_config=None,
        ec_transfer_config=None,
        additional_config={},
        use_v2_model_runner=False,
    )


def request(ids, **params):
    defaults = {
        "prompt_logprobs": None,
        "prompt_logprob_token_ids": None,
        "extra_args": None,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "bad_words_token_ids": None,
        "allowed_token_ids": None,
        "structured_outputs": None,
    }
    return SimpleNamespace(
        prompt_token_ids=ids,
        prompt_embeds=None,
        resumable=False,
        sampling_params=SimpleNamespace(**defaults | params),
    )


@pytest.fixture(params=["embedding", "key_value"])
def placed(request, config):
    """Puts the placeholders where the kind of prompts wants them."""
    config.model_config.hf_config.acd["prompt_type"] = request.param

    def place(ids):
        return [VOCAB] * 3 + ids if request.param == "embedding" else [*ids[:-1], *[VOCAB] * 3, ids[-1]]

    return place


def test_a_request_gets_the_placeholders(config, placed):
    for ids in ([5], [5, 6], list(range(3, 15))):
        admitted = request(ids)
        requests.admit_request(admitted, config)
        assert admitted.prompt_token_ids == placed(ids)
        requests.check_request(admitted, config)


@pytest.mark.parametrize(
    ("ids", "message"),
    [([5, VOCAB], "placeholder"), ([], "empty"), ([5] * 13, "leave no room"), (None, "embeddings")],
)
def test_a_prompt_that_cannot_take_the_placeholders_is_refused(config, ids, message):
    with pytest.raises(ValidationError, match=f"^ACD refuses this request: .*{message}"):
        requests.admit_request(request(ids), config)


@pytest.mark.parametrize(
    "ids",
    [
        [5, 6, 7, 8],
        [VOCAB, VOCAB, 5, 6],
        [1, VOCAB, VOCAB, VOCAB, 5, 6],
        [VOCAB],
        [VOCAB] * 3,
        [VOCAB] * 4,
        [VOCAB] * 6 + [5],
        [5, VOCAB, VOCAB, VOCAB, VOCAB, 6],
        [*[VOCAB] * 3, 5, *[VOCAB] * 3, 6],
    ],
)
def test_the_engine_refuses_placeholders_that_are_not_in_place(config, placed, ids):
    with pytest.raises(ValidationError, match="3 placeholder tokens"):
        requests.check_request(request(ids), config)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"extra_args": {"acd_alpha": 0.2}}, "--logits-processors"),
        ({"repetition_penalty": 0.01}, "between 0.1 and 10"),
        ({"bad_words_token_ids": [[5], [6, VOCAB]]}, "bad_words"),
        ({"allowed_token_ids": [5, VOCAB]}, "allowed_token_ids"),
    ],
)
def test_a_request_for_what_the_contrast_does_not_have_is_refused(config, params, message):
    with pytest.raises(ValidationError, match=message):
        requests.admit_request(request([5], **params), config)


def test_a_request_may_set_its_alpha_where_the_server_takes_it(config):
    for processor in (requests.PROCESSOR, type("RequestAlpha", (), {})):
        config.model_config.logits_processors = [processor]
        requests.admit_request(request([5], extra_args={"acd_alpha": 0.2}), config)
        for wrong in (-0.1, "0.5", float("nan"), True, None):
            with pytest.raises(ValidationError, match="acd_alpha must be"):
                requests.admit_request(request([5], extra_args={"acd_alpha": wrong}), config)


@pytest.mark.parametrize(
    "params",
    [{"repetition_penalty": 1.2}, {"structured_outputs": SimpleNamespace(_backend="guidance")}],
    ids=lambda params: next(iter(params)),
)
def test_what_the_second_runner_does_without_a_bound_is_refused(config, params):
    config.use_v2_model_runner = True
    with pytest.raises(ValidationError, match="V1 model runner"):
        requests.admit_request(request([5], **params), config)
    config.model_config.get_vocab_size = lambda: VOCAB + 1
    requests.admit_request(request([5], **params), config)


def test_requests_of_other_models_pass(config):
    config.model_config.architecture = "LlamaForCausalLM"
    others = request([5], prompt_logprobs=1, extra_args={"acd_alpha": "x"})
    requests.admit_request(others, config)
    requests.check_request(others, config)
    assert others.prompt_token_ids == [5]


def test_an_entry_of_another_version_is_refused(config):
    config.model_config.hf_config.acd["format_version"] = 1
    with pytest.raises(ValueError, match=r"format_version 2 \(found 1\): export the model again"):
        ExportedPair.of(config.model_config)
    del config.model_config.hf_config.acd
    with pytest.raises(ValueError, match="export the model again"):
        ExportedPair.of(config.model_config)


def test_start_up_passes_and_marks_the_compile_cache(config):
    base = type("Stock", (), {"verify_and_update_config": staticmethod(lambda c: setattr(c, "stock", True))})
    startup.config_hook(base).verify_and_update_config(config)
    assert config.stock and config.additional_config == {"acd_logits": f"{acd_logits.__version__} embedding"}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_config.runner_type", "pooling", "pooling"),
        ("model_config.is_multimodal_model", True, "multimodal"),
        ("model_config.is_encoder_decoder", True, "encoder-decoder"),
        ("model_config.use_mla", True, "MLA"),
        ("model_config.is_hybrid", True, "Mamba"),
        ("model_config.has_inner_state", True, "Mamba"),
        ("model_config.requires_raw_input_tokens", True, "token ids"),
        ("model_config.uses_mrope", True, "positions"),
        ("model_config.enable_prompt_embeds", True, "embeddings"),
        ("lora_config", object(), "LoRA"),
        ("speculative_config", object(), "speculative"),
        ("kv_transfer_config", object(), "KV connectors"),
        ("compilation_config.mode", 1, "STOCK_TORCH_COMPILE"),
        ("parallel_config.pipeline_parallel_size", 2, "pipeline"),
        ("parallel_config.data_parallel_size", 2, "data parallelism"),
        ("parallel_config.enable_expert_parallel", True, "expert"),
        ("parallel_config.decode_context_parallel_size", 2, "context"),
    ],
)
def test_start_up_refuses(config, path, value, message):
    owner, _, name = path.rpartition(".")
    setattr(getattr(config, owner) if owner else config, name, value)
    with pytest.raises(ValueError, match=f"^ACD on vLLM does not support .*{message}"):
        startup.check_config(config)


@pytest.mark.skipif("vllm" in sys.modules, reason="vLLM is there")
def test_without_vllm_registering_says_so_and_goes_on(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", None)
    acd_logits.vllm.register()
    assert "exported models will not load" in caplog.text
