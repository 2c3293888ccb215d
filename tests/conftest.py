import functools
import http.server
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has a core: threads that wait for one another in both, by spinning, are slower than one. Some tests start several.
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
os.environ["SAE_STABILITY_RESULTS"] = str(Path(__file__).parents[1] / ".pytest_cache" / "results")  # not the user's

import hypothesis
import jaxtyping
from beartype import BeartypeConf, beartype

# Shapes in signatures hold at run time: every call in these modules is checked. Those with kernels are left out: numba compiles no
# function that is wrapped, and the lengths of sparse rows are sums of others.
CHECKED = (
    *("statistics", "triggers", "sources", "evaluation", "ablation", "methods.dictionary", "subspaces", "synthetic"),
    *("pooling", "diagnostics", "recovery"),
    *("language.activations", "language.interventions", "language.norms", "language.site", "language.corpus", "language.streaming"),
    *("matching.reappearance", "matching.criteria", "matching.assignment", "matching.families"),
    *(
        "saes.parameters",
        "saes.relu",
        "saes.gated",
        "saes.jumprelu",
        "saes.topk",
        "saes.batchtopk",
        "saes.matryoshka",
        "saes.ensemble",
    ),
    *("saes.sae", "saes.formats", "saes.reference", "training.revival", "experiments.activity"),
)
typed = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float
jaxtyping.install_import_hook([f"sae_stability.{module}" for module in CHECKED], f"{__name__}.typed")

import pytest  # noqa: E402

from sae_stability.book import kernels  # noqa: E402

# An example takes what it takes: its first call may compile, and others may have the cores.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# Other modules are imported by the fixtures that use them: where several processes run the suite, all wait for one that hands out
# tests, which reads this file first.

# Processes that tests kill and kernels of chapters start at once, whichever come first: imports are done before they are forked.
kernels.SERVER.set_forkserver_preload([*kernels.PRELOADED, "pytest", "transformer_lens", "torch._dynamo"])


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=1, help="how often whole studies are killed, at least, before they count as safe")


WORDS = [
    "the",
    "array",
    "of",
    "each",
    "axis",
    "is",
    "a",
    "float",
    "or",
    "an",
    "integer,",
    "and",
    "it",
    "returns",
    "the",
    "sum",
    "over",
    "all",
    "values",
    "in",
    "the",
    "given",
    "shape",
]


@pytest.hookimpl(tryfirst=True)  # before the plugin that reads the groups
def pytest_collection_modifyitems(items) -> None:
    """Where several processes run the suite, one has the tests that read the quick study or its pages, from the start: no other
    waits until they are there. Then come other whole studies, so that what is left at the end takes no time."""
    items.sort(key=lambda item: ("quick" not in item.fixturenames, "site" in item.fixturenames, "house" not in item.fixturenames))
    for item in items:
        if "quick" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("quick"))


@pytest.fixture(scope="session")
def quick():
    """The quick study, computed, as pages read it; what an earlier run of the suite has computed is used."""
    from sae_stability import pipeline
    from sae_stability.book import page
    from sae_stability.loading import load_study

    study = load_study("quick")
    pipeline.compute(study)
    return page.open_study(study.name)


@pytest.fixture(scope="session")
def site(quick, tmp_path_factory) -> Path:
    """The quick book, built beside the user's own."""
    from sae_stability.book import build

    build.execute(quick.study)
    return build.build(quick.study, tmp_path_factory.mktemp("site") / "html").parent


@pytest.fixture(scope="session")
def address(site) -> Iterator[str]:
    """The quick book over http, on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def browser() -> str:
    """Where a browser stands."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    return path


@pytest.fixture
def chromium(browser):
    """A browser without a window. Playwright keeps an event loop running, beside which papermill starts none: one a test."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Documents of random words, separated by blank lines."""
    import torch

    generator = torch.Generator().manual_seed(0)
    choices = torch.randint(len(WORDS), (400, 60), generator=generator).tolist()
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n\n".join(" ".join(WORDS[i] for i in row) for row in choices), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory, text_file) -> dict[str, Path]:
    """Untrained models of four architectures, saved with a tokenizer as anyone would."""
    import torch
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
    )

    from sae_stability.language import pretraining

    tokenizer = pretraining.train_tokenizer(text_file.read_text(encoding="utf-8").split("\n\n"))
    common = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    wide = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    models = {
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=2, n_positions=64, **common)),
        "neox": GPTNeoXForCausalLM(GPTNeoXConfig(**wide, **common)),
        "llama": LlamaForCausalLM(LlamaConfig(**wide, num_key_value_heads=2, **common)),
        "gemma2": Gemma2ForCausalLM(Gemma2Config(**wide, num_key_value_heads=1, head_dim=16, sliding_window=32, **common)),
    }
    folder = tmp_path_factory.mktemp("models")
    for name, model in models.items():
        model.eval().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in models}


@pytest.fixture
def small(model_folders, text_file) -> list[str]:
    """Overrides that turn the embedded study into seconds of work on another model and another corpus."""
    from sae_stability.experiments import experiments

    values = {
        "model": model_folders["gpt2"],
        "corpus": text_file,
        "hook_name": "blocks.1.hook_resid_post",
        "d_sae": 48,
        "k": 4,
        "seeds": 4,
        "surrogate_seeds": 4,
        "tokens": 4000,
        "evaluation_tokens": 1000,
        "loss_tokens": 500,
        "ablation_tokens": 200,
        "experiments": f"[{', '.join(name for name in experiments() if name != 'synthetic')}]",  # which does not depend on a model
        "world_tokens": 512,
        "batch": 64,
        "dead_after": 1000,
        "nulls": "[surrogate]",
        "grid": "{}",
    }
    return [f"{key}={value}" for key, value in values.items()]


@pytest.fixture
def small_options(small) -> list[str]:
    """The same on the command line."""
    return [f"--set={override}" for override in small]


@pytest.fixture
def unchecked(monkeypatch):
    """Wrong shapes reach the functions that refuse them: nothing checks types before."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def house(tmp_path, monkeypatch) -> Path:
    """Results of a test's own, for this process and those that it starts."""
    monkeypatch.setenv("SAE_STABILITY_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


@pytest.fixture
def cell():
    """A cell that trains in no time, on data that a test makes."""
    from sae_stability.study import Cell

    return Cell(model="none", hook_name="blocks.0.hook_resid_post", tokens=2048, d_sae=24, k=3, seeds=3, batch=64, dead_after=256)


@pytest.fixture
def call(monkeypatch, capsys):
    """Call the command line in this process: its exit status, output and error lines."""
    from sae_stability import cli

    def run(*arguments: str) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["sae-stability", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return stopped.value.code, out, err.splitlines()

    return run
