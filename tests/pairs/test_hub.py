"""Prompt pairs over the Hub: the real client, in a process of its own, against a Hub on loopback.

A process of its own, because huggingface_hub reads HF_ENDPOINT once, when it is imported.
"""

import contextlib
import io
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import huggingface_hub
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from acd_logits import ACDLogitsProcessor, PromptPair, cli
from acd_logits.decoding.export import export
from conftest import PAIR_FILES, VOCAB, build_batch, build_distilled, build_key_value_pair, build_model, build_pair
from hub_server import Hub

SCRIPT_FILES = ["custom_generate/generate.py", "custom_generate/requirements.txt"]


@pytest.fixture(scope="module")
def client_and_hub(tmp_path_factory):
    environment = {
        "HF_HOME": str(tmp_path_factory.mktemp("hf_home")),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    with Hub() as hub, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, environment | {"HF_ENDPOINT": hub.url}):
            os.environ.pop("HF_TOKEN", None)
            pool.submit(os.getpid).result()  # the process starts now, in this environment
        yield pool, hub


@pytest.fixture
def client(client_and_hub):
    """Run a function of this module in the client's process."""

    def run(function, *args, **kwargs):
        return client_and_hub[0].submit(function, *args, **kwargs).result()

    return run


@pytest.fixture
def hub(client_and_hub):
    """The Hub, empty."""
    hub = client_and_hub[1]
    hub.reset()
    return hub


@pytest.fixture
def folder(tmp_path):
    """A saved pair."""
    return save(build_pair(base_model_name_or_path="org/tiny", vocab_size=VOCAB), tmp_path / "pair")


def save(pair, folder):
    pair.save_pretrained(folder)
    return folder


# What the client's process runs


def push(folder, repo_id="org/pair", token="hf_writer", **kwargs):
    with mock.patch("time.sleep"):  # the client waits before it tries again
        commit = PromptPair.from_pretrained(folder).push_to_hub(repo_id, token=token, **kwargs)
    return commit.oid, commit.pr_url


def load(source="org/pair", token="hf_reader", **kwargs):
    return contents(PromptPair.from_pretrained(source, token=token, **kwargs))


def contents(pair):
    """A pair down to the bit."""
    return pair.config, [(prompt.dtype, prompt.numpy().tobytes()) for prompt in (pair.safeguarding, pair.adversarial)]


def command(*arguments):
    """Run `acd-logits`; returns its exit code and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = cli.main(list(arguments))
    return code, out.getvalue(), err.getvalue()


def peft_logits(stream):
    model, ids = build_model(), build_batch((9,))["input_ids"]
    peft_model = PeftModel.from_pretrained(model, "org/pair", subfolder=stream)
    return peft_model(ids).logits[:, -9:].tolist()


def generate_by_id(package_is_there=True, model=None, **kwargs):
    """Tokens of `custom_generate="org/pair"`, and whether it left something on the model."""
    model, settings = model or build_model(), {"max_new_tokens": 8, "do_sample": False}
    kwargs = {"custom_generate": "org/pair", "trust_remote_code": True, "token": "hf_reader"} | kwargs
    with mock.patch.dict(sys.modules, {} if package_is_there else {"acd_logits": None}):
        tokens = model.generate(**build_batch(), **settings, **kwargs)
    return tokens.tolist(), "_acd_attachment" in model.__dict__


def generate_by_itself(token="hf_reader", **kwargs):
    model = AutoModelForCausalLM.from_pretrained("org/safe", token=token, **{"trust_remote_code": True} | kwargs)
    model.generation_config.eos_token_id = None
    return model.generate(**build_batch(), max_new_tokens=8, do_sample=False).tolist()


def generate_by_processor(folder, **options):
    model = build_model()
    acd = ACDLogitsProcessor(model, PromptPair.from_pretrained(folder), **options)
    return model.generate(**build_batch(), max_new_tokens=8, do_sample=False, logits_processor=[acd]).tolist()


def run_example(card):
    """Run the first example of a model card; returns what it printed."""
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    return out.getvalue()


# The round trip


def test_a_pushed_pair_comes_back_bit_by_bit(client, hub, folder, tmp_path):
    sha, _ = client(push, folder)
    expected = contents(PromptPair.from_pretrained(folder))
    assert client(load, cache_dir=tmp_path / "by id") == expected
    assert client(load, revision="main", cache_dir=tmp_path / "by branch") == expected
    assert client(load, revision=sha, cache_dir=tmp_path / "by commit") == expected

    repo = hub.repos["org/pair"]
    assert sorted(repo.files("main")) == sorted([".gitattributes", *PAIR_FILES, *SCRIPT_FILES])
    assert repo.resolve("main") == sha
    assert len(repo.commits) == 2  # the one that made the repository, and ours
    weights = (folder / "adversarial" / "adapter_model.safetensors").read_bytes()
    assert repo.files("main")["adversarial/adapter_model.safetensors"] == weights
    assert hub.asked("PUT /lfs/")


def test_a_pushed_key_value_pair_comes_back_bit_by_bit(client, hub, tmp_path):
    folder = save(build_key_value_pair(base_model_name_or_path="org/tiny", hidden_size=32), tmp_path / "pair")
    client(push, folder)
    expected = contents(PromptPair.from_pretrained(folder))
    assert expected[0].prompt_type == "key_value"
    assert client(load, cache_dir=tmp_path / "cache") == expected
    assert sorted(hub.repos["org/pair"].files("main")) == sorted([".gitattributes", *PAIR_FILES, *SCRIPT_FILES])
    assert b"Two key-value prompts" in hub.repos["org/pair"].files("main")["README.md"]


def test_a_branch_is_made_and_leaves_main_alone(client, hub, folder, tmp_path):
    client(push, folder)
    other = save(build_pair(3, 2, seed=9), tmp_path / "other")
    client(push, other, revision="tries/short", commit_message="Shorter")
    assert client(load, cache_dir=tmp_path / "main") == contents(PromptPair.from_pretrained(folder))
    assert client(load, revision="tries/short", cache_dir=tmp_path / "branch") == contents(
        PromptPair.from_pretrained(other)
    )


def test_a_pull_request_leaves_the_branch_alone(client, hub, folder):
    before = hub.add("org/pair", private=True).resolve("main")
    sha, url = client(push, folder, create_pr=True)
    assert url == f"{hub.url}/org/pair/discussions/1"
    assert hub.repos["org/pair"].resolve("main") == before
    assert hub.repos["org/pair"].resolve("refs/pr/1") == sha


def test_pushing_the_same_again_makes_no_commit(client, hub, folder):
    first, _ = client(push, folder)
    assert client(push, folder) == (first, None)


@pytest.mark.parametrize("subfolder", ["pairs/short", "./pairs/short/"])
def test_a_pair_in_a_subfolder(client, hub, folder, tmp_path, subfolder):
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    hub.add("org/many", {f"pairs/{place}/{name}": data for place in ("short", "long") for name, data in files.items()})
    expected = contents(PromptPair.from_pretrained(folder))
    assert client(load, "org/many", subfolder=subfolder, cache_dir=tmp_path) == expected
    assert not hub.asked("pairs/long")


def test_a_subfolder_outside_of_the_repository_is_not_asked_for(client, hub, folder, tmp_path):
    client(push, folder)
    asked = len(hub.requests)
    with pytest.raises(
        ValueError, match=r"subfolder must lie inside of the folder or repository, got '\.\./x'"
    ) as error:
        client(load, subfolder="../x", cache_dir=tmp_path)
    assert_one_sentence(error)
    assert len(hub.requests) == asked


def test_offline_needs_a_warm_cache(client, hub, folder, tmp_path):
    assert huggingface_hub.constants.HF_HUB_OFFLINE  # this process is offline, the client's is not
    client(push, folder)
    warm = client(load, cache_dir=tmp_path / "warm")
    assert load(cache_dir=tmp_path / "warm") == warm
    asked = len(hub.requests)
    assert client(load, cache_dir=tmp_path / "warm", local_files_only=True) == warm
    for run in (lambda f, **kw: f(**kw), client):
        with pytest.raises(OSError, match="not in the local cache") as error:
            run(load, cache_dir=tmp_path / "cold", local_files_only=True)
        assert_one_sentence(error)
    assert len(hub.requests) == asked


def test_stock_peft_loads_one_stream_and_gives_its_logits(client, hub, folder):
    client(push, folder, private=False)
    model, pair, ids = build_model(), PromptPair.from_pretrained(folder), build_batch((9,))["input_ids"]
    for stream in ("safeguarding", "adversarial"):
        embeds = torch.cat([getattr(pair, stream)[None], model.get_input_embeddings()(ids)], dim=1)
        expected = model(inputs_embeds=embeds).logits[:, -9:]
        got = torch.tensor(client(peft_logits, stream))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_the_example_of_the_pushed_card_runs(client, hub, folder, tokenizer, tmp_path):
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    build_model().save_pretrained(tmp_path / "model")
    hub.add("org/tiny", {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()})
    client(push, folder, private=False)
    printed = client(run_example, hub.repos["org/pair"].files("main")["README.md"].decode())
    assert len(printed.split()) > 100


# Who may see it


def test_private_unless_told_otherwise(client, hub, folder):
    client(push, folder, "org/default")
    client(push, folder, "org/published", private=False)
    assert hub.repos["org/default"].private
    assert not hub.repos["org/published"].private
    first, second = (body for _, path, body in hub.requests if path == "/api/repos/create")
    assert (first["visibility"], second["visibility"]) == ("private", "public")


@pytest.mark.parametrize("create_pr", [False, True])
def test_a_public_repository_is_refused(client, hub, folder, create_pr):
    repo = hub.add("org/pair")
    with pytest.raises(ValueError, match=r"org/pair is public, .* a jailbreak for its model") as error:
        client(push, folder, create_pr=create_pr)
    assert_one_sentence(error)
    assert list(repo.files("main")) == [".gitattributes"]
    assert not hub.asked("^PUT|preupload|commit|branch")  # nothing of the pair left this machine
    client(push, folder, private=False)
    assert "acd_config.json" in repo.files("main")


# Interruptions


def test_an_upload_that_broke_off_once_is_tried_again(client, hub, folder, tmp_path):
    hub.broken_uploads = 1
    client(push, folder)
    assert client(load, cache_dir=tmp_path / "cache") == contents(PromptPair.from_pretrained(folder))


@pytest.mark.parametrize("what", ["upload", "commit"])
def test_a_failed_push_leaves_what_was_there(client, hub, folder, tmp_path, what):
    client(push, folder)
    repo = hub.repos["org/pair"]
    before = repo.resolve("main")
    big = save(build_pair(4000, 4000, seed=5, hidden=256), tmp_path / "big")  # more than the buffers on the way hold
    if what == "upload":
        hub.broken_uploads = 1000
    else:
        hub.failures = {"/commit/": 500}
    with pytest.raises(OSError, match="connection to the Hub failed" if what == "upload" else "status 500") as error:
        client(push, big)
    assert_one_sentence(error)
    assert (repo.resolve("main"), len(repo.commits)) == (before, 2)
    assert client(load, cache_dir=tmp_path / "cache") == contents(PromptPair.from_pretrained(folder))
    hub.broken_uploads, hub.failures = 0, {}
    client(push, big)
    assert client(load, cache_dir=tmp_path / "cache") == contents(PromptPair.from_pretrained(big))


def test_a_first_push_that_failed_shows_no_pair(client, hub, folder):
    hub.broken_uploads = 1000
    with pytest.raises(OSError, match="connection to the Hub failed"):
        client(push, folder)
    assert list(hub.repos["org/pair"].files("main")) == [".gitattributes"]
    with pytest.raises(OSError, match="holds no prompt pair"):
        client(load)


# Refusals


def test_a_hub_out_of_order(client, hub, tmp_path):
    hub.failures = {"/api/": 503}
    with pytest.raises(OSError, match="the Hub refused org/pair with status 503: out of order") as error:
        client(load, cache_dir=tmp_path)
    assert_one_sentence(error)


def test_pickled_weights_are_refused_and_not_even_fetched(client, hub, folder):
    for stream in ("safeguarding", "adversarial"):
        (folder / stream / "adapter_model.safetensors").rename(folder / stream / "adapter_model.bin")
    hub.add("org/pair", {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()})
    with pytest.raises(OSError, match="weights are read from safetensors only") as error:
        client(load)
    assert_one_sentence(error)
    assert hub.asked(r"acd_config\.json")
    assert not hub.asked(r"\.bin")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"source": "org/absent"}, "org/absent is neither a folder nor a repository on the Hub"),
        ({"source": "org/absent", "token": None}, "org/absent is neither a folder nor a repository on the Hub"),
        ({"token": None}, "org/pair is neither a folder nor a repository on the Hub that you can read"),
        ({"token": "hf_wrong"}, "status 401: your token is missing or not valid"),
        ({"revision": "absent"}, "org/pair has no revision 'absent'"),
        ({"revision": "0" * 40}, "org/pair has no revision '0000"),
    ],
)
def test_what_cannot_be_loaded(client, hub, kwargs, message, tmp_path):
    hub.add("org/pair", private=True)
    with pytest.raises(OSError, match=message) as error:
        client(load, **kwargs, cache_dir=tmp_path)
    assert_one_sentence(error)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"token": None}, "status 401: your token is missing or not valid"),
        ({"token": "hf_wrong"}, "status 401: your token is missing or not valid"),
        ({"token": "hf_wrong\n"}, "the connection to the Hub failed"),  # httpx quotes this one in its message
        ({"token": "hf_reader"}, "status 403: your token does not allow it"),
        ({"repo_id": "org/pair/too/long"}, "neither a folder nor a valid Hub id"),
        ({"revision": "refs/pr/7"}, "org/new has no revision 'refs/pr/7'"),
    ],
)
def test_what_cannot_be_pushed(client, hub, folder, kwargs, message):
    with pytest.raises(OSError, match=message) as error:
        client(push, folder, **{"repo_id": "org/new"} | kwargs)
    assert_one_sentence(error)
    assert "hf_" not in str(error.value)
    assert not hub.asked("^PUT")


def test_no_hub_at_all(client, hub, folder):
    with pytest.raises(OSError, match=r"connection to the Hub failed at org/pair \(OfflineModeIsEnabled\)") as error:
        push(folder)  # in this process, which is offline
    assert_one_sentence(error)


# The command


def test_the_command_pushes_and_keeps_the_token_to_itself(client, hub, folder):
    arguments = ["push", "--pair", str(folder), "--hub_model_id", "org/pair", "--token", "hf_writer"]
    code, out, err = client(command, *arguments, "--license", "apache-2.0", "--commit_message", "First")
    repo = hub.repos["org/pair"]
    assert (code, out) == (0, f"{hub.url}/org/pair/commit/{repo.resolve('main')}\n")
    assert "hf_writer" not in err
    assert repo.private
    card = repo.files("main")["README.md"].decode()
    assert "license: apache-2.0\n" in card
    assert 'PromptPair.from_pretrained("org/pair")' in card


def test_the_command_pushes_a_distilled_adapter(client, hub, tmp_path):
    build_distilled(base_model_name_or_path="org/tiny").save_pretrained(tmp_path)
    (tmp_path / "teacher.jsonl").write_text("what the pair said stays at home")
    arguments = ["push", "--adapter", str(tmp_path), "--hub_model_id", "org/distilled", "--token", "hf_writer"]
    code, _, err = client(command, *arguments)
    assert code == 0, err
    files = hub.repos["org/distilled"].files("main")
    assert {"README.md", "acd_distilled.json", "adapter_config.json", "adapter_model.safetensors"} == {
        name for name in files if name != ".gitattributes"
    }
    assert '"org/distilled")' in files["README.md"].decode()
    assert hub.repos["org/distilled"].private


def test_the_command_takes_a_card_of_the_users_own(client, hub, folder):
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMine\n")
    code, _, _ = client(
        command, "push", "--pair", str(folder), "--hub_model_id", "org/pair", "--public", "--token", "hf_writer"
    )
    assert (code, hub.repos["org/pair"].private) == (0, False)
    assert hub.repos["org/pair"].files("main")["README.md"] == b"---\nlicense: mit\n---\nMine\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "org/pair is public, and the adversarial prompt is a jailbreak"),
        ({"--token": "hf_wrong"}, "your token is missing or not valid"),
        ({"--pair": "no/such/folder"}, "no/such/folder is not a folder"),
    ],
)
def test_the_commands_errors_are_one_line(client, hub, folder, change, message):
    hub.add("org/pair")
    options = {"--pair": str(folder), "--hub_model_id": "org/pair", "--token": "hf_writer"} | change
    code, out, err = client(command, "push", *(part for option in options.items() for part in option))
    assert (code, out) == (1, "")
    assert re.fullmatch(rf"acd-logits: error: .*{message}.*\n", err)
    assert "hf_" not in err


def test_a_model_of_the_hub_is_exported(client, hub, folder, tokenizer, tmp_path):
    for part in build_model(), tokenizer:
        part.save_pretrained(tmp_path / "base")
    hub.add("org/tiny", {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()})
    line = ["--model_name_or_path", "org/tiny", "--pair", str(folder), "--output_dir", str(tmp_path / "safe")]
    code, _, err = client(command, "export", *line)
    assert code == 0, err
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("base", "safe/model")]
    assert weights[0] == weights[1]
    assert (tmp_path / "safe" / "tokenizer.json").is_file()


def assert_one_sentence(error):
    assert re.fullmatch(r"[^\n]+", str(error.value))


# In one line, without a processor


def test_custom_generate_gives_the_tokens_of_the_processor(client, hub, folder):
    client(push, folder)
    plain = build_model().generate(**build_batch(), max_new_tokens=8, do_sample=False).tolist()
    tokens, left_behind = client(generate_by_id)
    assert tokens == generate_by_processor(folder) != plain
    assert not left_behind
    assert client(generate_by_id, alpha=0.9, beta=0.0)[0] == generate_by_processor(folder, alpha=0.9, beta=0.0)
    assert client(generate_by_id, alpha=0.9, beta=0.0)[0] != tokens
    for option in {"horizon": 2}, {"share_instruction_kv": True}:
        assert client(generate_by_id, **option)[0] == generate_by_processor(folder, **option)


def test_custom_generate_from_a_branch(client, hub, folder, tmp_path):
    client(push, folder)
    other = save(build_pair(3, 2, seed=9, base_model_name_or_path="org/tiny"), tmp_path / "other")
    client(push, other, revision="short")
    assert client(generate_by_id, revision="short")[0] == generate_by_processor(other)
    assert client(generate_by_id)[0] == generate_by_processor(folder)


def test_custom_generate_gives_no_plain_text_where_it_cannot_run(client, hub, folder):
    client(push, folder)
    with pytest.raises(ImportError, match="acd_logits"):
        client(generate_by_id, package_is_there=False)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="hidden"):
        client(generate_by_id, model=LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes)))
    with pytest.raises(ValueError, match="trust_remote_code"):
        client(generate_by_id, trust_remote_code=False)
    repo = hub.repos["org/pair"]
    repo.commit("main", {"custom_generate/requirements.txt": b"acd-logits>=99\n"})
    with pytest.raises(ImportError, match="acd-logits>=99"):
        client(generate_by_id)


def test_the_card_says_how_to_use_it_in_one_line(client, hub, folder):
    client(push, folder)
    card = hub.repos["org/pair"].files("main")["README.md"].decode()
    assert "- custom_generate\n" in card
    assert 'custom_generate="org/pair", trust_remote_code=True' in card
    assert "custom_generate" not in (folder / "README.md").read_text(encoding="utf-8"), "a folder carries no script"


# A model that is safeguarded by itself


def test_an_exported_model_gives_the_tokens_of_the_processor(client, hub, folder, tokenizer, tmp_path):
    build_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    export(tmp_path / "base", tmp_path / "safe", PromptPair.from_pretrained(folder))
    files = [path for path in (tmp_path / "safe").rglob("*") if path.is_file()]
    contents = {path.relative_to(tmp_path / "safe").as_posix(): path.read_bytes() for path in files}
    hub.add("org/safe", contents, private=True)
    assert client(generate_by_itself) == generate_by_processor(folder)
    with pytest.raises(OSError, match="safetensors"):
        client(generate_by_itself, trust_remote_code=False)
