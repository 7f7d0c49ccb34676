"""sae.report without a browser: the figures it shows, what it packs, what it refuses, how large it gets."""

import base64
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_refused, run_module, write_dataset

from sae import InputError
from sae.artifacts import fingerprint
from sae.autoencoder import Autoencoder, save_checkpoint
from sae.report import page as report
from sae.samples import Samples, save_samples

METRICS = {"l0": 12.34, "explained_variance": 0.876, "loss_recovered": 0.912, "dead_share": 0.25}


def write_run(folder, dataset_path, tokenizer, fires, length, documents=()):
    """Everything a report is made of, in `folder`: samples.pt, 7.pt, metrics.jsonl and a journal.

    fires: {feature: {row: {position: activation}}} of 320 features; a feature's first three rows are
    kept as top, spread and random context, a fourth one is missing. The first position is skipped.
    """
    info = json.loads((Path(dataset_path) / "tokenized_dataset.json").read_text())
    autoencoder = Autoencoder(8, 320, rng=torch.Generator().manual_seed(0)).requires_grad_(False)
    autoencoder.W_dec[12] = torch.nn.functional.normalize(autoencoder.W_dec[7] + 0.01, dim=0)
    frequency = torch.full((320,), -torch.inf)
    frequency[list(fires)] = -1.5
    config = {
        "act_vec_size": 8, "dict_vec_size": 320, "layer_id": 1, "layer_type": "mlp_activations",
        "hookpoint": "model.layers.1.mlp.act_fn", "model_name": tokenizer, "skip_positions": 1,
        "trained_batches": 7, "trained_tokens": 1792, "log_freq_lower": -2.0, "log_freq_upper": -0.1,
        "autoencoder_path": str(folder / "7.pt"),
    }  # fmt: skip
    save_checkpoint(folder / "7.pt", config, autoencoder, frequency)
    (folder / "metrics.jsonl").write_text(json.dumps({"event": "checkpoint", "batch": 7, **METRICS}) + "\n")
    rows = torch.full((len(fires), 4), -1)
    acts = torch.zeros(len(fires), 4, length)
    for f, contexts in enumerate(fires.values()):
        for k, (row, at) in enumerate(contexts.items()):
            rows[f, k] = row
            for position, value in at.items():
                acts[f, k, position] = value
    kind = torch.tensor([0, 1, 2, 2], dtype=torch.int8).repeat(len(fires), 1)
    samples = Samples(
        config, info["fingerprint"], fingerprint(folder / "7.pt"), 10_000, frequency,
        torch.tensor(list(fires)), acts.amax((1, 2)), rows, acts.half(), kind,
    )  # fmt: skip
    save_samples(folder / "samples.pt", samples)
    with open(folder / "samples.explanations.jsonl", "w") as handle:
        for document in documents:
            document = {"samples_fingerprint": fingerprint(folder / "samples.pt"), **document}
            handle.write(json.dumps(document) + "\n")


@pytest.fixture
def run(tmp_path, small_dataset, smollm2):
    """A run of two features on real contexts; [folder, the flags that name its dataset]."""
    fires = {7: {0: {3: 2.0, 5: 1.0}, 1: {4: 0.5}, 2: {}}, 12: {0: {9: 4.0}, 5: {1: 1.0}, 8: {}}}
    write_run(tmp_path, small_dataset, smollm2, fires, 64, [{"dim": 7, "interpretation": "a & <b>"}])
    return tmp_path, ["--dataset_path", small_dataset]


def data_of(page):
    """What the page's scripts read: the JSON, and the three packed arrays."""
    text = page.split('id="data">')[1].split("</script>")[0]
    data = json.loads(text)
    raw = gzip.decompress(base64.b64decode(page.split('id="pack">')[1].split("</script>")[0]))
    pairs, tokens = len(data["features"]) * len(data["kinds"]), data["distinct"] * data["length"]
    context = np.frombuffer(raw, "<u4", pairs).reshape(-1, len(data["kinds"]))
    token = np.frombuffer(raw, "<u4", tokens, 4 * pairs).reshape(-1, data["length"])
    activation = np.frombuffer(raw, "u1", -1, 4 * (pairs + tokens)).reshape(*context.shape, data["length"])
    return data, context, token, activation


def test_top_tokens_by_hand():
    ids = np.array([[5, 6, 5], [7, 5, 6]])
    acts = np.array([[1.0, 0.0, 2.0], [1.0, 0.0, 0.0]])
    # Token 5 holds 3 of 4, and fires two times of three; token 6 never fires.
    assert report.top_tokens(ids, acts) == [(5, 0.75, 2, 3), (7, 0.25, 1, 1)]
    assert report.top_tokens(ids, acts, count=1) == [(5, 0.75, 2, 3)]
    assert report.top_tokens(ids, acts * 0) == []


def test_nearest_by_hand():
    rows = torch.tensor([[0.8, -0.6], [0.0, 2.0], [0.6, 0.8], [-1.0, 0.0]])
    assert report.nearest(rows, torch.tensor([1, 3]), count=2) == [
        [(2, 0.8), (3, 0.0)],
        [(1, 0.0), (2, -0.6)],
    ]


def test_histogram_places_bars_and_band():
    log10 = np.array([-1.999, -1.0, -1.0, -np.inf], dtype="float32")
    chart = report.histogram(log10, (-2.0, -0.5))
    assert chart["band"] == (0.0, 75.0)
    assert chart["ticks"] == [(0.0, "1%"), (50.0, "10%"), (100.0, "100%")]
    heights = {bar[0]: bar[2] for bar in chart["bars"] if bar[2]}
    assert heights == {0.0: 50.0, 50.0: 100.0}


def test_columns_shown_keeps_the_first_and_spreads_the_spread():
    kind = np.array([0] * 5 + [1] * 5 + [2] * 5)
    assert report.columns_shown(kind, 3).tolist() == [0, 1, 2, 5, 7, 9, 10, 11, 12]
    assert report.columns_shown(kind, 9).tolist() == list(range(15))


def test_as_data_holds_no_character_of_markup():
    content = {"</script>": ["<!--", "&lt;", "]]>", "\ud800", "'\""]}
    text = report.as_data(content)
    assert json.loads(text) == content
    assert not set(text) & set("<>&") and text.isascii()


def test_page_holds_what_the_samples_hold(run, small_dataset, smollm2):
    from sae.tokens import open_dataset

    folder, flags = run
    result = run_module(
        "sae.report",
        folder / "samples.pt",
        *flags,
        "--autoencoder_path",
        folder / "7.pt",
        "--out",
        folder / "r.html",
    )
    assert result.returncode == 0 and "r.html" in result.stdout, result.stderr
    page = (folder / "r.html").read_text()
    data, context, token, activation = data_of(page)
    assert [feature[:3] for feature in data["features"]] == [[7, 0.03162, 2.0], [12, 0.03162, 4.0]]
    assert data["skip"] == 1 and data["kinds"] == [0, 1, 2, 2]
    # Feature 7: 2.0 is its maximum, 255; 0.5 a quarter. Nothing in the missing fourth context.
    assert activation[0, 0].nonzero()[0].tolist() == [3, 5] and activation[0, 0, [3, 5]].tolist() == [
        255,
        128,
    ]
    assert activation[0, 1, 4] == 64 and not activation[0, 2].any() and context[0, 3] == 2**32 - 1
    assert context[0, 0] == context[1, 0], "one context serves both features"
    dataset, _ = open_dataset(small_dataset)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for f, k, row in ((0, 1, 1), (1, 1, 5)):
        shown = "".join(data["tokens"][id] for id in token[context[f, k]])
        assert shown == tokenizer.decode(dataset[row]["input_ids"])
    assert data["explained"]["7"]["interpretation"] == "a & <b>" and "a & <b>" not in page
    assert data["near"][0][0][0] == 12 and data["near"][1][0][0] == 7
    for figure in ("12.3", "0.876", "0.912", "25.0%"):
        assert f"<dd>{figure}</dd>" in page
    assert "src=" not in page.replace("src=x", "") and 'href="http' not in page
    # The samples name their checkpoint; without it the page says less.
    assert report.build(folder / "samples.pt", small_dataset) == page
    (folder / "7.pt").unlink()
    assert "0.876" not in report.build(folder / "samples.pt", small_dataset)


def test_what_does_not_belong_together_is_refused(run, tmp_path, stdlib_contexts, smollm2):
    folder, (_, dataset_path) = run
    ids, documents = stdlib_contexts
    samples = folder / "samples.pt"
    other = write_dataset(tmp_path / "other", ids[:3], documents[:3], smollm2)
    config = torch.load(samples, weights_only=True)["config"]
    save_checkpoint(folder / "8.pt", config, Autoencoder(8, 320), torch.zeros(320))
    none, journal = folder / "none.jsonl", folder / "other.jsonl"
    journal.write_text(json.dumps({"dim": 7, "samples_fingerprint": "elsewhere"}) + "\n")
    for flags, words in (
        ({"dataset_path": other}, ("samples.pt", other)),
        ({"dataset_path": str(none)}, (str(none), "no such folder")),
        ({"autoencoder_path": folder / "8.pt"}, ("samples.pt", "8.pt")),
        ({"explanations": none}, (str(none), "no such file")),
        ({"metrics_path": none}, (str(none), "no such file")),
        ({"explanations": journal}, (str(journal), "elsewhere")),
    ):
        with pytest.raises(InputError) as refused:
            report.build(samples, **{"dataset_path": dataset_path, **flags})
        for word in words:
            assert word in str(refused.value), (flags, refused.value)
    result = run_module("sae.report", samples, "--dataset_path", other, "--out", folder / "r.html")
    assert_refused(result, "samples.pt", other)
    assert not (folder / "r.html").exists()


def random_samples(F, T, R, rng):
    """Samples of F features whose contexts and activations are drawn, with 52 contexts kept of each."""
    acts = rng.random((F, 52, T), dtype="float32")
    acts = torch.from_numpy((acts * (acts < 0.05) * 20).astype("float16"))
    config = {"model_name": "m", "hookpoint": "h", "act_vec_size": 8, "dict_vec_size": F}
    kind = torch.tensor([0] * 24 + [1] * 12 + [2] * 16, dtype=torch.int8).repeat(F, 1)
    rows = torch.from_numpy(rng.integers(0, R, (F, 52)))
    frequency, features = torch.full((F,), -1.0), torch.arange(F)
    return Samples(config, "d", "a", R * T, frequency, features, acts.amax((1, 2)).float(), rows, acts, kind)


def test_five_thousand_features_stay_under_30_mb():
    rng = np.random.default_rng(0)
    samples = random_samples(5000, 64, 60_000, rng)
    # Tokens drawn evenly from a large vocabulary: text that hardly compresses.
    ids, texts = rng.integers(0, 30_000, (60_000, 64)), [f" t{id}" for id in range(30_000)]
    page = report.render(samples, samples.rows.numpy(), ids, texts, {}, None, {}, 12)
    assert len(page.encode()) < 30e6
    assert data_of(page)[3].shape == (5000, 36, 64)


def test_fewer_contexts_are_shown_where_the_page_would_be_too_large():
    rng = np.random.default_rng(0)
    samples = random_samples(50, 64, 500, rng)
    ids, texts = rng.integers(0, 1000, (500, 64)), [f" t{id}" for id in range(1000)]
    context_FK = samples.rows.numpy()
    pages = [report.render(samples, context_FK, ids, texts, {}, None, {}, 24, most) for most in (1e6, 1e5)]
    whole, small = (data_of(page)[0]["kinds"] for page in pages)
    assert len(whole) == 52 and set(small) == {0, 1, 2} and 3 <= len(small) < 52
