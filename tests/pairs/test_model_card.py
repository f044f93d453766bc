"""The model card: what it says of a pair, and whose README.md is kept."""

import re

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from acd_logits import PromptPair
from acd_logits.pairs.model_card import MARKER, generate_card
from conftest import build_pair

RESULTS = {
    "harmless_rate": [
        {"benchmark": "AdvBench", "method": "Base", "rate": 0.04, "n": 100, "judge": "keywords"},
        {"benchmark": "AdvBench", "method": "ACD", "rate": 0.975, "n": 100, "interval": [0.91, 0.994]},
    ],
    "over_refusal": [{"benchmark": "XSTest (safe)", "method": "ACD", "rate": 0.2, "n": 250}],
}
TRAINING = {"learning_rate": 0.01, "safe_prompt": "two\nlines | of it", "pairs": {"train": {"D_HR": 400}}}


def build_card(repo_id=None, license=None, **config):
    return generate_card(build_pair(**config), repo_id, license)


def metadata(card):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


def section(card, title):
    return re.search(rf"^## {title}\n\n(.*?)(?=^## |\Z)", card, re.DOTALL | re.MULTILINE)[1]


def test_metadata():
    data = metadata(build_card(base_model_name_or_path="org/tiny", license="apache-2.0"))
    assert (data["base_model"], data["base_model_relation"]) == ("org/tiny", "adapter")
    assert (data["library_name"], data["license"]) == ("acd-logits", "apache-2.0")
    assert {"acd", "safety", "prompt-tuning", "peft"} <= set(data["tags"])


def test_the_hub_reads_the_rates_of_the_pair_itself():
    """By huggingface_hub's own parser: those of other methods are not the pair's."""
    rows = [row | {"dataset": "walledai/AdvBench"} for row in RESULTS["harmless_rate"]]
    card = build_card(base_model_name_or_path="org/tiny", results=RESULTS | {"harmless_rate": rows})
    name, results = model_index_to_eval_results(metadata(card)["model-index"])
    assert name == "ACD of tiny"
    assert results == ModelCard(card).data.eval_results
    shown = [(r.dataset_type, r.dataset_name, r.metric_type, r.metric_value, r.metric_args) for r in results]
    assert shown == [
        ("walledai/AdvBench", "AdvBench", "harmless_rate", 0.975, {"n": 100, "interval_95": [0.91, 0.994]}),
        ("xstest-safe", "XSTest (safe)", "over_refusal", 0.2, {"n": 250}),
    ]
    assert results[0].metric_name == "Harmless rate, n = 100"
    assert "model-index" not in metadata(build_card())


@pytest.mark.parametrize("model", [None, "/home/me/models/tiny", "./models/tiny", "models/tiny"])
def test_what_is_not_a_hub_id_stays_out_of_the_metadata(model, tmp_path, monkeypatch):
    """The Hub refuses a card with a folder as `base_model`."""
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = build_card(base_model_name_or_path=model)
    assert not {"base_model", "license"} & set(metadata(card))
    assert "/home/me" not in card


def test_the_examples_name_the_pair_and_its_model():
    card = build_card("org/pair", base_model_name_or_path="org/tiny", base_model_revision="v2", alpha=0.4)
    assert 'AutoModelForCausalLM.from_pretrained("org/tiny", revision="v2", device_map="auto", dtype="auto")' in card
    assert 'PromptPair.from_pretrained("org/pair"))  # alpha 0.4, beta 0.1' in card
    assert 'PeftModel.from_pretrained(model, "org/pair", subfolder="safeguarding")' in card
    assert "path/to" not in card
    assert "$" not in card


@pytest.mark.parametrize("chat", [True, False])
def test_the_examples_are_python(chat):
    examples = re.findall(r"```python\n(.*?)```", build_card(training={"chat": chat}), re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        compile(example, "README.md", "exec")
    assert ("apply_chat_template" in examples[0]) == chat


def test_results_with_sample_sizes():
    results = section(build_card(results=RESULTS), "Results")
    assert "| AdvBench | Base | 4.0 % |  | 100 | keywords |" in results
    assert "| AdvBench | ACD | 97.5 % | 91.0 to 99.4 | 100 |  |" in results
    assert "| XSTest (safe) | ACD | 20.0 % |  | 250 |  |" in results
    assert "Not measured" not in results


def test_what_was_not_measured_is_said():
    assert section(build_card(), "Results").count("Not measured.") == 2
    assert (
        section(build_card(results={"over_refusal": RESULTS["over_refusal"]}), "Results").count("Not measured.") == 1
    )


@pytest.mark.parametrize("missing", ["benchmark", "method", "rate", "n"])
def test_a_result_that_lacks_something_is_an_error(missing):
    row = {key: value for key, value in RESULTS["harmless_rate"][0].items() if key != missing}
    with pytest.raises(ValueError, match=f"measured results has no '{missing}'"):
        build_card(results={"harmless_rate": [row]})


def test_training_settings():
    training = section(build_card(training=TRAINING), "Training")
    assert "| `learning_rate` | 0.01 |\n" in training
    assert '| `safe_prompt` | "two\\nlines \\| of it" |\n' in training
    assert '| `pairs` | {"train": {"D_HR": 400}} |\n' in training
    assert section(build_card(), "Training").startswith("Not trained, or not recorded.")


def test_limits_and_responsible_use():
    card = build_card(base_model_name_or_path="org/tiny", vocab_size=97, n_s=7, n_a=4)
    assert "org/tiny (hidden size 32, vocabulary 97)" in section(card, "Limits")
    assert "7 virtual tokens" in " ".join(card.split())
    assert "jailbreak" in card
    assert "private" in section(card, "Responsible use")


class TestSaving:
    def test_the_card_is_written_and_brought_up_to_date(self, tmp_path):
        build_pair().save_pretrained(tmp_path)
        before = (tmp_path / "README.md").read_text(encoding="utf-8")
        build_pair(results=RESULTS).save_pretrained(tmp_path)
        after = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert MARKER in before
        assert ("97.5 %" in before, "97.5 %" in after) == (False, True)

    @pytest.mark.parametrize("content", [b"# Mine\n", b"", b"\xff\xfe not UTF-8"])
    def test_the_users_own_is_kept(self, tmp_path, content):
        (tmp_path / "README.md").write_bytes(content)
        build_pair().save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_bytes() == content
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "README.md",
            "acd_config.json",
            "adversarial",
            "safeguarding",
        ]

    def test_a_generated_card_whose_mark_was_removed_is_the_users_own(self, tmp_path):
        build_pair().save_pretrained(tmp_path)
        card = (tmp_path / "README.md").read_text(encoding="utf-8").replace(MARKER, "")
        (tmp_path / "README.md").write_text(card, encoding="utf-8")
        PromptPair.from_pretrained(tmp_path).save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text(encoding="utf-8") == card
