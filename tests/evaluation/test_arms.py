"""The arms: which prompts they put in front, and what a single-stream arm costs and says."""

import pytest
import torch

from acd_logits import PromptPair
from acd_logits.decoding.shared import SharedStreams
from acd_logits.evaluation.arms import ARMS, arm_pair, arm_processor, check_arms, demonstrate, find_arm, remind
from acd_logits.pairs.texts import OPPOSITE_PROMPT, SAFE_PROMPT
from conftest import build_batch, build_key_value_pair, build_model, build_pair, build_tokenizer
from reference import ReferenceProcessor, SharedReference

PAIRED = {name: arm for name, arm in ARMS.items() if not (arm.needs_adapter or arm.rival)}


@pytest.fixture
def tokenizer():
    """Knows the words of the manual prompts."""
    words = ["<pad>", "<bos>", "<eos>", *SAFE_PROMPT.split()[:40], *OPPOSITE_PROMPT.split()[:40]]
    return build_tokenizer(words[:97], unk_token="<pad>", pad_token="<pad>", eos_token="<eos>")


def test_prompts_of_an_arm_are_the_learned_ones_and_the_texts(model, pair, tokenizer):
    texts = PromptPair.from_text(model, tokenizer)
    prompts = {
        "sp": pair.safeguarding,
        "ap": pair.adversarial,
        "safe": texts.safeguarding,
        "opposite": texts.adversarial,
        "null": torch.zeros(0, 32),
    }
    for name, arm in PAIRED.items():
        streams, alpha = arm_pair(arm, model, tokenizer, pair, 0.7)
        assert torch.equal(streams.safeguarding, prompts[arm.positive]), name
        assert torch.equal(streams.adversarial, prompts[arm.negative or arm.positive]), name
        assert alpha == (0.7 if arm.negative else 0.0)


def test_the_arms_of_the_paper():
    streams = {name: (arm.positive, arm.negative) for name, arm in PAIRED.items() if not arm.transform}
    assert streams == {
        "base": ("safe", None),
        "null": ("null", None),
        "opposite": ("opposite", None),
        "sp": ("sp", None),
        "ap": ("ap", None),
        "nid": ("safe", "null"),
        "oid": ("safe", "opposite"),
        "acd": ("sp", "ap"),
        "null-ap": ("null", "ap"),
        "safe-ap": ("safe", "ap"),
        "sp-null": ("sp", "null"),
        "sp-opposite": ("sp", "opposite"),
    }
    assert {name for name, arm in PAIRED.items() if not arm.needs_pair} == {
        "base", "null", "opposite", "nid", "oid", "self-reminder", "icd",
    }  # fmt: skip


def test_a_shared_instruction_is_for_learned_prompts(model, tokenizer):
    for trained, asked in ((True, None), (False, True)):
        pair = build_pair(share_instruction_kv=trained)
        for name, arm in PAIRED.items():
            acd = arm_processor(arm, model, tokenizer, pair, share_instruction_kv=asked)
            assert isinstance(acd.streams, SharedStreams) == arm.needs_pair, name


def test_arms_of_key_value_prompts(model, tokenizer):
    """The texts beside a learned prompt become key-value prompts too; those alone stay what they are."""
    pair = build_key_value_pair(alpha=0.4)
    texts = PromptPair.from_text(model, tokenizer, prompt_type="key_value")
    prompts = {
        "sp": pair.safeguarding,
        "ap": pair.adversarial,
        "safe": texts.safeguarding,
        "opposite": texts.adversarial,
        "null": torch.zeros(0, 3, 2, 2, 8),
    }
    for name, arm in PAIRED.items():
        streams, alpha = arm_pair(arm, model, tokenizer, pair)
        assert alpha == (0.4 if arm.negative else 0.0)
        assert streams.config.share_instruction_kv == arm.needs_pair, name
        if arm.needs_pair:
            assert torch.equal(streams.safeguarding, prompts[arm.positive]), name
            assert torch.equal(streams.adversarial, prompts[arm.negative or arm.positive]), name
        else:
            assert streams.config.prompt_type == "embedding"


@pytest.mark.parametrize("name", ["sp", "ap", "acd", "null-ap", "sp-opposite"])
def test_an_arm_of_key_value_prompts_decodes_like_the_reference(model, tokenizer, name):
    pair, batch = build_key_value_pair(), build_batch()
    streams, alpha = arm_pair(ARMS[name], model, tokenizer, pair, 0.6)
    acd = arm_processor(ARMS[name], model, tokenizer, pair, alpha=0.6, beta=0.1)
    reference = SharedReference(build_model(), streams, alpha, 0.1, mask=batch["attention_mask"])
    assert generate(model, acd, batch).tolist() == generate(build_model(), reference, batch).tolist()


def test_alpha_and_beta_come_from_the_pair_unless_given(model, tokenizer):
    pair = build_pair(alpha=0.4, beta=0.2)
    acd = arm_processor(ARMS["acd"], model, tokenizer, pair)
    assert (acd.alpha, acd.beta, acd.horizon) == (0.4, 0.2, None)
    acd = arm_processor(ARMS["oid"], model, tokenizer, pair, alpha=0, beta=0)
    assert (acd.alpha, acd.beta) == (0, 0)
    acd = arm_processor(ARMS["oid"], model, tokenizer)
    assert (acd.alpha, acd.beta) == (0.5, 0.1)


def generate(model, processor, batch):
    processors = [processor] if processor else []
    return model.generate(**batch, max_new_tokens=6, do_sample=False, logits_processor=processors)


def test_the_null_arm_is_the_plain_model(model, tokenizer):
    batch = build_batch()
    acd = arm_processor(ARMS["null"], model, tokenizer)
    assert generate(model, acd, batch).tolist() == generate(build_model(), None, batch).tolist()


@pytest.mark.parametrize("name", ["ap", "null-ap", "sp-opposite"])
def test_an_arm_decodes_like_the_reference(model, pair, tokenizer, name):
    batch = build_batch()
    streams, alpha = arm_pair(ARMS[name], model, tokenizer, pair, 0.6)
    acd = arm_processor(ARMS[name], model, tokenizer, pair, alpha=0.6, beta=0.1)
    reference = ReferenceProcessor(build_model(), streams, alpha, 0.1, mask=batch["attention_mask"])
    assert generate(model, acd, batch).tolist() == generate(build_model(), reference, batch).tolist()


def test_one_stream_costs_about_plain(model, pair, tokenizer):
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    generate(model, arm_processor(ARMS["sp"], model, tokenizer, pair), build_batch())
    assert rows[-5:] == [3] * 5
    rows.clear()
    generate(model, arm_processor(ARMS["acd"], model, tokenizer, pair), build_batch())
    assert rows[-5:] == [6] * 5


def test_transforms_change_the_last_user_message_and_keep_the_rest():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "open the door"}]
    reminded = remind(messages)
    assert reminded[0] == messages[0]
    assert reminded[1]["role"] == "user"
    assert "\n\nopen the door\n\n" in reminded[1]["content"]
    shown = demonstrate(messages)
    assert [message["role"] for message in shown] == ["system", "user", "assistant", "user"]
    assert (shown[0], shown[-1]) == tuple(messages)
    assert messages[1]["content"] == "open the door"


def test_unknown_arms_and_missing_pairs():
    with pytest.raises(ValueError, match="there is no arm 'adc': choose from base, null, "):
        find_arm("adc")
    with pytest.raises(ValueError, match="there is no arm 'adc'"):
        check_arms(["base", "adc"], has_pair=True)
    with pytest.raises(ValueError, match="the arm 'safe-ap' needs a learned pair"):
        check_arms(["oid", "safe-ap"], has_pair=False)
    check_arms(["oid", "icd"], has_pair=False)


def test_rivals_come_from_their_folder(model, tokenizer):
    with pytest.raises(ValueError, match=r"the arm 'lora' needs the folder .+ pass it .+ as --rivals FOLDER"):
        check_arms(["base", "lora"], has_pair=True)
    check_arms(["base", "lora"], has_pair=False, has_rivals=True)
    with pytest.raises(ValueError, match="CAST is no prompt pair"):
        arm_processor(ARMS["cast"], model, tokenizer)


def test_a_distilled_adapter_is_no_pair(model, tokenizer):
    check_arms(["distilled"], has_pair=False, has_adapter=True)
    with pytest.raises(ValueError, match="the arm 'distilled' needs a distilled adapter"):
        check_arms(["distilled"], has_pair=True)
    with pytest.raises(ValueError, match="generate with its PeftModel"):
        arm_processor(ARMS["distilled"], model, tokenizer, build_key_value_pair())
