"""A loaded folder generates under the contrast by itself, and never without it."""

import copy
import json
import pickle
import shutil
import sys
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MinLengthLogitsProcessor, pipeline
from transformers.generation import GenerationMixin

from acd_logits import ACDLogitsProcessor, PromptPair
from acd_logits.decoding.export import export
from conftest import VOCAB, build_batch, build_key_value_pair, build_model, build_pair, build_tokenizer

PAIRS = {"embedding": build_pair, "key_value": build_key_value_pair}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module", params=PAIRS)
def folder(request, tmp_path_factory, tokenizer):
    top = tmp_path_factory.mktemp(request.param)
    build_model().save_pretrained(top / "base")
    tokenizer.save_pretrained(top / "base")
    export(top / "base", top / "out", PAIRS[request.param](base_model_name_or_path="org/base", vocab_size=VOCAB))
    return top / "out"


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<pad>", *(f"w{i}" for i in range(1, VOCAB))]
    return build_tokenizer(words, unk_token="<pad>", pad_token="<pad>", padding_side="left")


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs)


def expected(folder, alpha=None, **kwargs):
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    acd = ACDLogitsProcessor(model, PromptPair.from_pretrained(folder / "pair"), alpha)
    return model.generate(**build_batch(), **GREEDY | kwargs, logits_processor=[acd]).tolist()


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model").generate(**build_batch(), **GREEDY).tolist()


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_the_tokens_are_those_of_the_processor(folder, mode, caplog):
    model = load(folder)
    assert caplog.text == ""
    assert isinstance(model, LlamaForCausalLM)
    torch.manual_seed(0)
    got = model.generate(**build_batch(), **GREEDY | mode).tolist()
    torch.manual_seed(0)
    assert got == expected(folder, **mode) != plain(folder)


def test_positional_arguments_and_other_processors(folder):
    model, batch = load(folder), build_batch()
    minimum = MinLengthLogitsProcessor(5, 2, device="cpu")
    settings = model.generation_config.__class__(**GREEDY)
    got = model.generate(batch["input_ids"], settings, iter([minimum]), attention_mask=batch["attention_mask"])
    assert got.tolist() == expected(folder)


def test_options_of_loading_reach_the_base_model(folder):
    model, info = load(folder, dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True)
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "eager")
    assert not info["missing_keys"]
    assert model.generate(**build_batch(), **GREEDY).shape[1] == 17


def test_a_processor_in_the_call_takes_the_place_of_the_models_own(folder):
    model = load(folder)
    stronger = ACDLogitsProcessor(model, PromptPair.from_pretrained(folder / "pair"), alpha=0.9)
    got = model.generate(**build_batch(), **GREEDY, logits_processor=[stronger]).tolist()
    assert got == expected(folder, alpha=0.9)
    assert got != expected(folder)
    stronger.detach()
    assert model.generate(**build_batch(), **GREEDY).tolist() == expected(folder)


def test_it_stays_safeguarded_when_detached_and_when_copied(folder):
    model = load(folder)
    copied = copy.deepcopy(model)
    model.acd.detach()
    for each in (copied, model):
        assert each.generate(**build_batch(), **GREEDY).tolist() == expected(folder)
    assert copied.acd.model is copied
    with pytest.raises((TypeError, pickle.PicklingError)):
        pickle.dumps(model)


def test_a_pipeline_generates_under_the_contrast(folder, tokenizer):
    ids = build_batch((9,))["input_ids"]
    text = tokenizer.decode(ids[0])
    generator = pipeline("text-generation", model=str(folder), tokenizer=tokenizer, trust_remote_code=True)
    [answer] = generator(text, return_tensors=True, **GREEDY)
    model = load(folder)
    assert answer["generated_token_ids"] == model.generate(ids, **GREEDY)[0].tolist()


@pytest.mark.parametrize(
    "around",
    [
        lambda model: GenerationMixin.generate(model, **build_batch(), **GREEDY),
        lambda model: model.generate_batch([[3, 4, 5]]),
        lambda model: model.init_continuous_batching(),
        lambda model: model.generate(**build_batch(), **GREEDY, cache_implementation="paged"),
    ],
    ids=["the mixin's", "generate_batch", "a manager", "paged"],
)
def test_ways_around_are_refused(folder, around):
    with pytest.raises(ValueError, match="contrast"):
        around(load(folder))


def test_it_is_not_saved_as_the_plain_model(folder, tmp_path):
    with pytest.raises(ValueError, match="without its contrast"):
        load(folder).save_pretrained(tmp_path / "saved")


# ----- what does not load -----


def test_without_trust_there_is_no_model(folder):
    for kind in (AutoModelForCausalLM, LlamaForCausalLM):
        with pytest.raises(OSError, match="no file named"):
            kind.from_pretrained(folder)


def test_without_the_package_one_sentence_says_so(folder, tmp_path):
    out = shutil.copytree(folder, tmp_path / "missing package")
    with (
        mock.patch.dict(sys.modules, {"acd_logits.decoding.safeguarded": None}),
        pytest.raises(ImportError, match=r"^this model's generate\(\) is safeguarded by acd-logits [^\n]+$"),
    ):
        load(out)


def test_another_format_is_refused(folder, tmp_path):
    out = shutil.copytree(folder, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    for entry in ({"format_version": 99}, None):
        (out / "config.json").write_text(json.dumps(config | {"acd": entry}))
        with pytest.raises(ValueError, match=r"^config.json has no acd entry of format_version 1[^\n]+$"):
            load(out)


def test_another_model_is_refused(folder, tmp_path):
    out = shutil.copytree(folder, tmp_path / "out")
    pair = build_pair(hidden=16) if "embedding" in str(folder) else build_key_value_pair(sizes=(2, 2, 8))
    pair.save_pretrained(out / "pair")
    with pytest.raises(ValueError, match=r"^this prompt pair was made for [^\n]+$"):
        load(out)
    (out / "pair" / "acd_config.json").unlink()
    with pytest.raises(OSError, match="holds no prompt pair"):
        load(out)
