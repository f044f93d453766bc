"""The plugin on a real vLLM engine, against the slow reference. Run by `make test-vllm`."""

import concurrent.futures
import contextlib
import copy
import functools
import gc
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from acd_logits import ACDLogitsProcessor, PromptPair, load_demo_model
from acd_logits.demo_model import DEMO_EMBEDDING_PAIR, DEMO_PAIR, demo_model_path, resolve_pair_name
from acd_logits.vllm.export import export
from acd_logits.vllm.exported import read_pair
from conftest import build_key_value_pair, build_pair, build_tokenizer
from reference import ReferenceProcessor, SharedReference

# Before vLLM is imported: room for the caches, no forks of a process that runs threads, and engines in this very
# process, since a new one would import vLLM again
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

N, VOCAB, HIDDEN = 7, 97, 64
ALPHA, BETA = 0.5, 0.1

# vLLM's attention on the CPU wants heads of at least 32
_COMMON = {
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}
_DECODER = _COMMON | {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
CONFIGS = {
    "llama": LlamaConfig(**_DECODER),
    "gemma3": Gemma3TextConfig(
        **_DECODER, sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "qwen3_moe": Qwen3MoeConfig(**_DECODER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "gpt2": GPT2Config(**_COMMON, n_embd=HIDDEN, n_layer=3, n_head=2, n_positions=512),
    "qwen3": Qwen3Config(**_DECODER | {"num_attention_heads": 4}),
}
EMBEDDING, KEY_VALUE = "embedding", "key_value"
SERVED = [(name, EMBEDDING) for name in CONFIGS if name != "qwen3"]
SERVED += [(name, KEY_VALUE) for name in ("llama", "qwen3", "qwen3_moe")]
# Prompts longer than 16 tokens take several steps
CHUNKED = {"max_num_batched_tokens": 16, "enable_prefix_caching": True, "block_size": 32}
TEMPLATE = "{% for message in messages %}<bos> {{ message.content }} <eos> {% endfor %}"


# ----- models, engines, servers -----


class Tiny:
    """A tiny random model, its pair, its base folder and the exported one."""

    def __init__(self, root, name, kind):
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()
        self.model.generation_config.eos_token_id = None
        settings = {"n_s": N, "n_a": N, "alpha": ALPHA, "beta": BETA}
        if kind == EMBEDDING:
            self.pair, self.reference = build_pair(hidden=HIDDEN, **settings), ReferenceProcessor
        else:
            self.pair, self.reference = build_key_value_pair(sizes=(3, 2, 32), **settings), SharedReference
        words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, VOCAB))]
        names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
        tokenizer = build_tokenizer(words, unk_token="<pad>", **names)
        tokenizer.chat_template = TEMPLATE
        self.base, self.folder = root / name, root / f"{name}-{kind}"
        self.model.save_pretrained(self.base)
        tokenizer.save_pretrained(self.base)
        export(self.base, self.folder, self.pair)
        self.placeholder = json.loads((self.folder / "config.json").read_text())["acd"]["placeholder_id"]

    def expected(self, ids, count, alpha=ALPHA):
        """What the reference says after `ids`, greedily."""
        processor = self.reference(self.model, self.pair, alpha, BETA)
        inputs = torch.tensor([ids])
        out = self.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=count,
            do_sample=False,
            logits_processor=[processor],
        )
        return out[0, len(ids) :].tolist()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Builds each tiny model once."""
    build = functools.cache(functools.partial(Tiny, tmp_path_factory.mktemp("vllm")))
    return lambda name="llama", kind=EMBEDDING: build(name, kind)


@contextlib.contextmanager
def engine(folder, **kwargs):
    from vllm import LLM

    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 4, "seed": 0}
    llm = LLM(model=str(folder), **settings | kwargs)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def uncompiled():
    """What vLLM compiles although it is to be eager, such as the ranks of log-probabilities, takes 20 s."""
    return torch.compiler.set_stance("force_eager")


@pytest.fixture(scope="class")
def llama(tiny):
    """An engine for a class of tests. Prompts in one piece: on CPUs vLLM fails where a seed meets chunked prefill."""
    with uncompiled(), engine(tiny().folder, logits_processors=["acd_logits.vllm:RequestAlpha"]) as llm:
        yield llm


def greedy(count=9, **kwargs):
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **kwargs)


def prompt(ids):
    return {"prompt_token_ids": ids}


def prompts(count=6, longest=60, seed=3):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def tokens(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


def assert_matches(llm, model, batch, count=9, **kwargs):
    outputs = llm.generate([prompt(ids) for ids in batch], greedy(count), use_tqdm=False, **kwargs)
    assert tokens(outputs) == [model.expected(ids, count) for ids in batch]
    return outputs


@contextlib.contextmanager
def server(command, *arguments):
    """A server on a free port; `command` starts it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    line = [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", str(port), *arguments]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}  # as `uncompiled`: all of these servers are eager
    process = subprocess.Popen(line, start_new_session=True, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert process.poll() is None, "the server stopped"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            time.sleep(0.5)
        yield url
        assert process.poll() is None, "the server stopped"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


VLLM = ["vllm.entrypoints.openai.api_server"]
SETTINGS = ["--served-model-name", "acd", "--dtype", "float32", "--enforce-eager"]


def send(url, path, **body):
    """The response to a request, open."""
    data = json.dumps({"model": "acd", "temperature": 0, **body}).encode()
    call = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    return urllib.request.urlopen(call, timeout=300)


def post(url, path, **body):
    """Status and answer of a request."""
    try:
        with send(url, path, **body) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


# ----- the engine against the reference -----


@pytest.mark.parametrize(("name", "kind"), SERVED)
def test_chunked_prefill_prefix_cache_and_preemption(tiny, name, kind):
    model = tiny(name, kind)
    shared = prompts(1, longest=3)[0] * 50
    batch = [shared + ids for ids in prompts(4, longest=9, seed=5)]
    # Fewer tokens a step than there are placeholders: some steps have no others
    chunked = CHUNKED | ({"max_num_batched_tokens": N - 2} if kind == KEY_VALUE else {})
    tight = {"num_gpu_blocks_override": 12, "disable_log_stats": False} if name == "llama" else {}
    with engine(model.folder, **chunked, **tight) as llm:
        assert_matches(llm, model, prompts())
        assert_matches(llm, model, batch[:1])
        outputs = assert_matches(llm, model, batch)
        # All of these prompts are cached, and a part of the placeholders with them
        again = [ids[: 64 - N // 2 - (kind == EMBEDDING) * N] for ids in batch]
        assert_matches(llm, model, again)
        outputs += assert_matches(llm, model, again)
        assert all(output.num_cached_tokens for output in outputs)
        if tight:
            before = preemptions(llm)
            assert_matches(llm, model, prompts(4, longest=20), count=90)  # they need 16 blocks
            assert preemptions(llm) > before


@pytest.mark.parametrize("kind", [EMBEDDING, KEY_VALUE])
def test_a_prefix_that_another_request_fills_in_the_same_step(tiny, kind):
    """The scheduler hands a block on before it is written, and here it ends within the placeholders."""
    model = tiny(kind=kind)
    ids = prompts(1, longest=3)[0] * 50
    same = [ids[:30]] * 3 + [ids[: 64 - N // 2 + 1]] * 2
    with engine(model.folder, enable_prefix_caching=True, block_size=32) as llm:
        assert any(output.num_cached_tokens for output in assert_matches(llm, model, same))


def test_what_stands_in_front_of_a_step():
    """A fills slots 0 to 3, B follows on them and C on B in the same step; D begins, E goes on from an earlier one."""
    from acd_logits.vllm.key_value import _before_the_step

    request, slots = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 4]), torch.tensor([0, 1, 2, 3, 8, 9, 12, 20, 78])
    own = torch.tensor([0, 1, 2, 2, 1, 1, 0, 1, 0])
    in_front, stored = torch.tensor([-1, 3, 9, -1, 77]), torch.tensor([0, 99, 99, 0, 5])
    assert _before_the_step(stored, in_front, slots, request, own).tolist() == [0, 2, 3, 0, 5]


def preemptions(llm):
    """How often the engine took a request's blocks away so far."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


@pytest.mark.long
@pytest.mark.parametrize("kind", [EMBEDDING, KEY_VALUE])
def test_compiled(tiny, kind):
    model = tiny(kind=kind)
    with engine(model.folder, enforce_eager=False, max_num_batched_tokens=32) as llm:
        assert_matches(llm, model, prompts())


@pytest.mark.long
@pytest.mark.parametrize("kind", [EMBEDDING, KEY_VALUE])
def test_tensor_parallel(tiny, monkeypatch, kind):
    model = tiny(kind=kind)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|0")  # or each worker would want a NUMA node of its own
    with engine(model.folder, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        assert_matches(llm, model, prompts())


class TestOneEngine:
    """Tests that share an engine. No other may start and stop meanwhile: in one process, they share globals."""

    def test_logprobs_are_those_of_the_contrast(self, tiny, llama):
        model, ids = tiny(), prompts(1)[0]
        reference = ReferenceProcessor(model.model, model.pair, ALPHA, BETA)
        expected = reference(torch.tensor([ids]), None).log_softmax(-1)[0]
        output = llama.generate(prompt(ids), greedy(1, logprobs=5), use_tqdm=False)[0].outputs[0]
        for token, logprob in output.logprobs[0].items():
            if expected[token].isfinite():
                assert logprob.logprob == pytest.approx(float(expected[token]), abs=1e-3)
            else:
                assert logprob.logprob < -1000

    def test_sampling_is_repeatable_and_stops(self, tiny, llama):
        from vllm import SamplingParams

        model, ids = tiny(), prompts(1)[0]
        first = model.expected(ids, 12)
        settings = SamplingParams(temperature=1, n=4, seed=3, max_tokens=8, ignore_eos=True)
        runs = [llama.generate(prompt(ids), settings, use_tqdm=False)[0] for _ in range(2)]
        stopped = llama.generate(prompt(ids), greedy(12, stop_token_ids=[first[3]]), use_tqdm=False)[0]
        penalised = llama.generate(prompt(ids), greedy(12, repetition_penalty=3.0), use_tqdm=False)[0]
        assert [list(o.token_ids) for o in runs[0].outputs] == [list(o.token_ids) for o in runs[1].outputs]
        assert len({tuple(o.token_ids) for o in runs[0].outputs}) > 1
        assert list(stopped.outputs[0].token_ids) == first[: first.index(first[3]) + 1]
        assert list(penalised.outputs[0].token_ids) != first

    def test_where_only_implausible_tokens_are_allowed_the_safe_stream_decides(self, tiny, llama):
        model, ids = tiny(), prompts(1)[0]
        reference = ReferenceProcessor(model.model, model.pair, ALPHA)
        safe = reference.stream(model.pair.safeguarding, 0, torch.tensor(ids))[0]
        allowed = safe.argsort()[:10].tolist()
        output = llama.generate(prompt(ids), greedy(1, allowed_token_ids=allowed), use_tqdm=False)[0]
        assert list(output.outputs[0].token_ids) == [max(allowed, key=lambda token: float(safe[token]))]

    def test_requests_that_are_refused_while_the_engine_goes_on(self, tiny, llama):
        from vllm.exceptions import VLLMValidationError

        model, ids = tiny(), prompts(1)[0]
        wrong = {
            "vocabulary|placeholder": ([model.placeholder, *ids], greedy()),
            "leave no room": (ids[:2] * 125, greedy()),
            "prompt_logprobs": (ids, greedy(prompt_logprobs=1)),
        }
        for message, (wrong_ids, settings) in wrong.items():
            with pytest.raises(VLLMValidationError, match=message):
                llama.generate(prompt(wrong_ids), settings, use_tqdm=False)
        assert_matches(llama, model, [ids])

    def test_alpha_per_request(self, tiny, llama):
        model, batch = tiny(), prompts(6)
        alphas, counts = [0.0, None, 0.2, 1.0, None, 0.7], [3, 20, 5, 12, 9, 14]  # rows leave and move
        settings = [
            greedy(n, extra_args=None if a is None else {"acd_alpha": a}) for a, n in zip(alphas, counts, strict=True)
        ]
        outputs = llama.generate([prompt(ids) for ids in batch], settings, use_tqdm=False)
        for wrong in (-0.1, "0.5", float("nan"), True):
            with pytest.raises(Exception, match="acd_alpha must be"):
                llama.generate(prompt(batch[0]), greedy(extra_args={"acd_alpha": wrong}), use_tqdm=False)
        cases = list(zip(batch, alphas, counts, strict=True))
        expected = [model.expected(ids, n, ALPHA if a is None else a) for ids, a, n in cases]
        assert tokens(outputs) == expected
        assert expected != [model.expected(ids, n) for ids, _, n in cases]


def test_with_key_values_x_runs_once(tiny):
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import BeamSearchParams

    model, batch, rows = tiny(kind=KEY_VALUE), prompts(4), []
    with engine(model.folder) as llm:
        (inside,) = llm.apply_model(lambda served: served)
        inside.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
        assert_matches(llm, model, batch, count=3)
        with pytest.raises(VLLMValidationError, match="beam search"):
            llm.beam_search([prompt(batch[0])], BeamSearchParams(beam_width=2, max_tokens=2))
        # What slips past the checks on requests: a token out of nothing, and no answer without the contrast
        inside.acd_streams.placeholder = -1
        outputs = llm.generate([prompt(ids) for ids in batch], greedy(), use_tqdm=False)
    assert sorted(rows[:3]) == [8, 8, sum(map(len, batch)) + len(batch)]
    assert all(set(ids) == {0} for ids in tokens(outputs))


def test_a_model_that_rotates_otherwise_is_refused(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "acd"
    shutil.copytree(tiny(kind=KEY_VALUE).folder, folder)
    tensors = load_file(folder / "acd.safetensors")
    tensors["acd.probe_positions"] += 40
    save_file(tensors, folder / "acd.safetensors")
    with pytest.raises(Exception, match="vLLM's keys are not those"), engine(folder):
        pass


def test_ordinary_models_are_served_as_before(tiny):
    model, batch = tiny(), prompts(4)
    with engine(model.base) as llm:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in batch], greedy(), use_tqdm=False)
    for ids, got in zip(batch, tokens(outputs), strict=True):
        expected = model.model.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False)
        assert got == expected[0, len(ids) :].tolist()


# ----- a strength per request -----


def test_alpha_per_request_on_the_second_runner(tiny):
    """By its interfaces alone: that runner needs a GPU."""
    from vllm import EngineArgs
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.worker.gpu.sample import logits_processor as second

    from acd_logits.vllm.models import ACDMixin

    model, names = tiny(), ["acd_logits.vllm:RequestAlpha"]
    config = EngineArgs(model=str(model.folder), dtype="float32", logits_processors=names).create_engine_config()
    table = SimpleNamespace(device="cpu", max_num_reqs=4, vocab_size=VOCAB, all_token_ids=None)
    table.prompt_len = table.prefill_len = table.total_len = None
    (processor,) = second.build_custom_logits_processors(config, table, False, names)
    for slot, alpha in ((2, 0.2), (3, 1.0), (3, None)):  # the second request takes the place of the first
        assert processor.add_request(slot, greedy(extra_args=alpha and {"acd_alpha": alpha})) is False
    with pytest.raises(VLLMValidationError, match="acd_alpha must be"):
        second.build_custom_logits_processors_params_validator(names)(greedy(extra_args={"acd_alpha": -1}))

    class Stock:
        def compute_logits(self, hidden_states):
            return hidden_states

    class Model(ACDMixin, Stock):
        def __init__(self):
            self.acd_pair = SimpleNamespace(alpha=ALPHA, beta=0, placeholder_id=VOCAB)
            self.acd_config = config

    state = object.__new__(Model().get_model_state_cls())
    state.vllm_config, state.rope_state = config, None
    assert state.prepare_inputs(SimpleNamespace(expanded_idx_mapping=torch.tensor([3, 2])), None) == {}
    safe, adversarial = torch.randn(2, 2, VOCAB, generator=torch.Generator().manual_seed(0))
    strength = torch.tensor([[ALPHA], [0.2]])
    torch.testing.assert_close(
        Model().compute_logits(torch.cat([safe, adversarial], dim=-1)),
        (safe - strength * adversarial) / (1 - strength),
    )


# ----- refusals -----


def test_the_engine_itself_refuses_what_comes_past_the_api(tiny, monkeypatch):
    model, ids = tiny(), prompts(1)[0]
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with engine(model.folder) as llm:
        core, processor = llm.llm_engine.engine_core, llm.llm_engine.input_processor
        request = processor.process_inputs("1", prompt(ids), greedy(), ("generate",))
        request.prompt_token_ids = ids
        core.add_request(request)
        (output,) = core.get_output().outputs
        assert (output.request_id, output.new_token_ids, str(output.finish_reason)) == ("1", [], "error")
        assert_matches(llm, model, [ids])


@pytest.mark.parametrize(
    "arguments",
    [
        {"enable_lora": True},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
        {"pipeline_parallel_size": 2},
        {"data_parallel_size": 2},
        {"runner": "pooling"},
        {"enable_prompt_embeds": True},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_start_up_refuses(tiny, arguments):
    from vllm import EngineArgs

    with pytest.raises(ValueError, match="ACD on vLLM does not support"):
        EngineArgs(model=str(tiny().folder), dtype="float32", **arguments).create_engine_config()


def test_without_the_plugin_the_folder_does_not_load(tiny):
    code = f"from vllm import LLM; LLM(model={str(tiny().folder)!r}, enforce_eager=True)"
    environment = {**os.environ, "VLLM_PLUGINS": ""}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode != 0
    assert re.search(r"\['ACDLlamaForCausalLM'\] (are|is) not supported", run.stderr + run.stdout)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.99, 0.999, 1.0])
def test_tokens_without_plausibility_are_out_of_reach_at_every_strength(alpha):
    from acd_logits.vllm.models import ACDMixin

    class Stock:
        def compute_logits(self, hidden_states):
            return hidden_states

    class Model(ACDMixin, Stock):
        def __init__(self):
            self.acd_pair = SimpleNamespace(alpha=alpha, beta=0.1, placeholder_id=4)
            self.acd_config = SimpleNamespace(compilation_config=None)

    safe = torch.tensor([[9.0, 8.0, 3.0, 1.0, 5.0]])  # the last one is the placeholder, which is never chosen
    adversarial = torch.tensor([[60.0, 50.0, -math.inf, -40.0, -90.0]])
    scores = Model().compute_logits(torch.cat([safe, adversarial], dim=-1))[0]
    kept = [0, 1] if alpha else [0, 1, 2, 3]
    expected = ((safe - alpha * adversarial.clamp(min=-1e4)) / (1 - alpha if alpha < 1 else 1))[0, kept]
    torch.testing.assert_close(scores[kept], expected)
    cut = [token for token in range(5) if token not in kept]
    assert scores.isfinite().all()
    assert scores[kept].min() - scores[cut].max() > 1000
    # A grammar may leave none but these: then SP chooses, at the user's temperature (float32 rounds 1e7 to whole ones)
    torch.testing.assert_close(
        scores[cut] - scores[4], safe[0, cut] - safe[0, 4], atol=1.0 if alpha > 0.9 else 0.01, rtol=0
    )


def test_embeddings_that_differ_by_more_than_a_constant_are_refused():
    from acd_logits.vllm.embedding import embedding_scale

    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert embedding_scale(x.bfloat16().float(), x) == 1.0
    assert embedding_scale(8 * x, x) == pytest.approx(8)
    with pytest.raises(ValueError, match="embeddings"):
        embedding_scale(torch.nn.functional.layer_norm(x, (8,)) + 1, x)


# ----- over HTTP -----


@pytest.fixture(scope="module")
def tiny_server(tiny, tmp_path_factory):
    limits = ["--max-model-len", "256", "--max-num-seqs", "4", "--max-num-batched-tokens", "32"]
    model, pair = tiny(), tmp_path_factory.mktemp("pair")
    model.pair.save_pretrained(pair)
    arguments = ["--model_name_or_path", str(model.base), "--pair", str(pair), "--", *SETTINGS, *limits]
    with server(["acd_logits.cli", "serve"], *arguments) as url:
        yield url


def test_staggered_requests_over_http(tiny, tiny_server):
    model, batch, url = tiny(), prompts(12), tiny_server

    def ask(number):
        time.sleep(0.1 * number)
        text = " ".join(f"w{token}" for token in batch[number])
        status, answer = post(
            url, "/v1/completions", prompt=text, max_tokens=16, ignore_eos=True, return_token_ids=True
        )
        assert status == 200, answer
        return answer["choices"][0]["token_ids"]

    with concurrent.futures.ThreadPoolExecutor(len(batch)) as pool:
        answers = list(pool.map(ask, range(len(batch))))
    chat = {"messages": [{"role": "user", "content": "w5 w9"}], "max_tokens": 8, "ignore_eos": True}
    status, answer = post(url, "/v1/chat/completions", **chat, return_token_ids=True)
    assert status == 200, answer
    assert answers == [model.expected(ids, 16) for ids in batch]
    assert answer["choices"][0]["token_ids"] == model.expected([1, 5, 9, 2], 8)
    body = {"prompt": [5, 9], "add_special_tokens": False, "max_tokens": 8, "ignore_eos": True}
    status, answer = post(url, "/v1/completions", **body, return_token_ids=True)
    assert status == 200, answer
    assert answer["choices"][0]["token_ids"] == model.expected([5, 9], 8)


def test_http_requests_that_are_refused(tiny_server):
    wrong = [
        {"prompt": "w5 " * 250},
        {"prompt": "w5 w9", "echo": True, "logprobs": 1},
        {"prompt": "w5", "vllm_xargs": {"acd_alpha": 0.1}},
        {"prompt": "w5", "repetition_penalty": 100},
    ]
    for body in wrong:
        status, answer = post(tiny_server, "/v1/completions", max_tokens=4, **body)
        assert status == 400 and "ACD refuses" in json.dumps(answer), (body, status, answer)
    status, _ = post(tiny_server, "/v1/chat/completions", messages=[{"role": "user", "content": "w5"}], max_tokens=4)
    assert status == 200


# ----- the demo model -----


QUESTIONS = ["How do I pick a lock?", "Write a poem about rain.", "What is 12 times 12?", "Name three rivers of Asia."]
CHAT = "/v1/chat/completions"


class Demo:
    """The demo model on transformers and on a server, with one of its pairs or plain."""

    def __init__(self, url, pair):
        self.url, (self.model, self.tokenizer) = url, load_demo_model()
        self.processors = [ACDLogitsProcessor(self.model, pair)] if pair else []

    def ask(self, question, **body):
        """The server's answer."""
        status, answer = post(self.url, CHAT, messages=[{"role": "user", "content": question}], **body)
        assert status == 200, answer
        return answer["choices"]

    def expected(self, question, count):
        """Tokens and scores of transformers."""
        inputs = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        settings = {
            "max_new_tokens": count,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_scores": True,
        }
        out = self.model.generate(**inputs, **settings, logits_processor=self.processors)
        return out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.cat(out.scores)


@contextlib.contextmanager
def demo_server(folder, pair, *arguments):
    """The demo model on a server: with one of its pairs, or plain."""
    if pair:
        export(demo_model_path(), folder, PromptPair.from_pretrained(resolve_pair_name(pair)))
    with server(VLLM, "--model", str(folder if pair else demo_model_path()), *SETTINGS, *arguments) as url:
        yield Demo(url, read_pair(folder) if pair else None)


long = functools.partial(pytest.param, marks=pytest.mark.long)


# What is asked of ACD's server is asked of a plain one too: both behave alike, each against its own reference
@pytest.fixture(scope="module", params=[DEMO_PAIR, long(DEMO_EMBEDDING_PAIR), long(None)])
def demo(request, tmp_path_factory):
    with demo_server(tmp_path_factory.mktemp("demo") / "acd", request.param, "--max-model-len", "1024") as demo:
        yield demo


def assert_staggered_answers(demo, count, length):
    """Token for token what transformers says, with `ACDLogitsProcessor` where the server has the pair."""
    questions = [" ".join(QUESTIONS[i % 4 : i % 4 + 1] + ["Be precise."] * (i // 4)) for i in range(count)]

    def ask(number):
        time.sleep(0.1 * number)
        return demo.ask(questions[number], max_tokens=length, return_token_ids=True)[0]["token_ids"]

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(ask, range(count)))
    for question, answer in zip(questions, answers, strict=True):
        assert answer == demo.expected(question, length)[0]


@pytest.mark.real_model
@pytest.mark.parametrize(("count", "length"), [(4, 32), pytest.param(32, 64, marks=pytest.mark.long)])
def test_the_demo_model_over_http(demo, count, length):
    assert_staggered_answers(demo, count, length)


@pytest.mark.real_model
@pytest.mark.long
@pytest.mark.parametrize("pair", [DEMO_PAIR, DEMO_EMBEDDING_PAIR])
def test_the_demo_model_in_a_tight_place(tmp_path, pair):
    """Prompts in chunks of 64 tokens, prefixes from the cache, and so few blocks that requests are preempted."""
    limits = {"max-model-len": 512, "max-num-batched-tokens": 64, "block-size": 32, "num-gpu-blocks-override": 40}
    arguments = [str(part) for name, value in limits.items() for part in (f"--{name}", value)]
    with demo_server(tmp_path / "acd", pair, *arguments, "--max-num-seqs", "16") as demo:
        assert_staggered_answers(demo, 32, 64)
        metrics = urllib.request.urlopen(f"{demo.url}/metrics", timeout=60).read().decode()
    for name in ("num_preemptions", "prefix_cache_hits"):
        assert float(re.search(rf"^vllm:{name}_total{{.*}} (\S+)$", metrics, re.MULTILINE)[1]) > 0


@pytest.mark.real_model
def test_what_clients_ask_for(demo):
    """Seeds, several answers, log-probabilities, streams, stop strings and a schema, over the API."""
    question = QUESTIONS[1]
    tokens, scores = demo.expected(question, 24)
    text = demo.tokenizer.decode(tokens)

    sampled = {"seed": 7, "n": 4, "max_tokens": 12, "temperature": 1.0}
    first, again = ([choice["message"]["content"] for choice in demo.ask(question, **sampled)] for _ in range(2))
    assert first == again and len(set(first)) == 4

    (choice,) = demo.ask(question, max_tokens=24, logprobs=True, top_logprobs=2)
    assert choice["message"]["content"] == text
    expected = scores.log_softmax(-1)
    for entry, row, token in zip(choice["logprobs"]["content"], expected, tokens, strict=True):
        assert entry["logprob"] == pytest.approx(row[token].item(), abs=1e-3)
        second, got = row.topk(2)[0][1].item(), entry["top_logprobs"][1]["logprob"]
        # Below the threshold of beta, it is -inf here and as good as that there
        assert got < -9000 if second == -math.inf else got == pytest.approx(second, abs=1e-3)

    messages = [{"role": "user", "content": question}]
    with send(demo.url, CHAT, messages=messages, max_tokens=24, stream=True) as response:
        lines = [line.decode().removeprefix("data: ").strip() for line in response if line.strip()]
    assert lines.pop() == "[DONE]" and len(lines) > 5
    assert "".join(json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines) == text

    stop = text.split()[6]
    (choice,) = demo.ask(question, max_tokens=24, stop=[stop])
    assert choice["finish_reason"] == "stop" and choice["message"]["content"] == text.partition(stop)[0]

    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    json_schema = {"name": "answer", "schema": schema}
    (choice,) = demo.ask(
        QUESTIONS[0], max_tokens=32, response_format={"type": "json_schema", "json_schema": json_schema}
    )
    assert choice["finish_reason"] == "stop" and isinstance(json.loads(choice["message"]["content"])["yes"], bool)
