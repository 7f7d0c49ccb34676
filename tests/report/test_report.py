"""sae.report without a browser: the figures it shows, what it packs, what it refuses, how large it gets."""

import base64
import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_refused, run_module, write_dataset

from sae import InputError
from sae.artifacts import fingerprint
from sae.autoencoder import Autoencoder, load_checkpoint, save_checkpoint
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
    at = {7: METRICS, 8: dict.fromkeys(METRICS, 0.5)}  # the run went on
    lines = [json.dumps({"event": "checkpoint", "batch": batch, **at[batch]}) + "\n" for batch in at]
    (folder / "metrics.jsonl").write_text("".join(lines))
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
    fires = {7: {0: {3: 2.0, 5: 1.0}, 1: {4: 0.5, 5: 0.001}, 2: {}}, 12: {0: {9: 4.0}, 5: {1: 1.0}, 8: {}}}
    write_run(tmp_path, small_dataset, smollm2, fires, 64, [{"dim": 7, "interpretation": "a & <b>"}])
    return tmp_path, ["--dataset_path", small_dataset]


def data_of(page, r=0):
    """What the page's script reads about run `r`: its JSON, and its packed contexts by name."""
    text = page.split('id="data">')[1].split("</script>")[0]
    data = json.loads(text)[r]
    raw = gzip.decompress(base64.b64decode(page.split(f'id="pack{r}">')[1].split("</script>")[0]))
    pairs, length, found, at = data["pairs"], data["length"], {}, 0
    for name, kind, shape in (
        ("start", "<u4", (len(data["features"]) + 1,)), ("context", "<u4", (pairs,)),
        ("token", "<u4", (data["distinct"], length)), ("read", "<u2", (pairs, 2)), ("kind", "u1", (pairs,)),
        ("role", "u1", (pairs,)), ("activation", "u1", (pairs, length)), ("simulated", "u1", (-1, length)),
    ):  # fmt: skip
        count = int(np.prod(shape)) if min(shape) >= 0 else -1
        found[name] = np.frombuffer(raw, kind, count, at).reshape(shape)
        at += found[name].nbytes
    assert at == len(raw)
    return data, SimpleNamespace(**found)


def test_top_tokens_by_hand():
    ids = np.array([[5, 6, 5], [7, 5, 6]])
    acts = np.array([[1.0, 0.0, 2.0], [1.0, 0.0, 0.0]])
    # Token 5 holds 3 of 4, and fires two times of three; token 6 never fires.
    assert report.top_tokens(ids, acts) == [(5, 0.75, 2, 3), (7, 0.25, 1, 1)]
    assert report.top_tokens(ids, acts, count=1) == [(5, 0.75, 2, 3)]
    assert report.top_tokens(ids, acts * 0) == []
    samples = random_samples(1, 4, 9, np.random.default_rng(0))
    samples.config["skip_positions"], samples.rows[0, 51] = 1, -1
    content = report.content(as_run(samples, np.zeros((9, 4), int), ["a"], {}))
    assert content["features"][0][3][0][3] == 51 * 3, "how often it was seen at positions that count"


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
    page_path, checkpoint = folder / "r.html", folder / "7.pt"
    flags = [*flags, "--autoencoder_path", checkpoint, "--out", page_path]
    result = run_module("sae.report", folder / "samples.pt", *flags, fresh=True)
    assert result.returncode == 0 and "r.html" in result.stdout, result.stderr
    page = page_path.read_text()
    data, packed = data_of(page)
    assert [feature[:3] for feature in data["features"]] == [[7, 0.03162, 2.0], [12, 0.03162, 4.0]]
    assert data["config"]["skip_positions"] == 1 and data["dead"] == 318 and sum(data["counts"]) == 2
    # 10^-1.5, in 60 bins from 1% to 100%.
    assert data["lowest"] == -2 and data["counts"][15] == 2
    assert packed.start.tolist() == [0, 3, 6] and packed.kind.tolist() == [0, 1, 2] * 2, (
        "a missing one is left out"
    )
    # Feature 7: 2.0 is its maximum, 255; 0.5 a quarter.
    assert packed.activation[0].nonzero()[0].tolist() == [3, 5]
    assert packed.activation[0, [3, 5]].tolist() == [255, 128]
    assert packed.activation[1, [3, 4, 5]].tolist() == [0, 64, 1] and not packed.activation[2].any()
    assert packed.context[0] == packed.context[3], "one context serves both features"
    dataset, _ = open_dataset(small_dataset)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for pair, row in ((1, 1), (4, 5)):
        shown = "".join(data["tokens"][id] for id in packed.token[packed.context[pair]])
        assert shown == tokenizer.decode(dataset[row]["input_ids"])
    assert data["features"][0][5] == {"interpretation": "a & <b>"} and "a & <b>" not in page
    rows = load_checkpoint(checkpoint).autoencoder.W_dec
    cosine = round((rows[7] @ rows[12]).item(), 3)
    assert data["near"][0][0] == [12, cosine] and data["near"][1][0] == [7, cosine]
    assert len(data["near"][0]) == 6
    assert data["metrics"]["explained_variance"] == 0.876
    assert "src=" not in page.replace("src=x", "") and 'href="http' not in page
    # The samples name their checkpoint; without it the page says less.
    assert report.build([folder / "samples.pt"], small_dataset) == page
    own = [folder / "own.jsonl"]
    own[0].write_text(json.dumps({"event": "checkpoint", "batch": 7, **METRICS, "l0": 5.0}) + "\n")
    assert data_of(report.build([folder / "samples.pt"], small_dataset, metrics=own))[0]["metrics"]["l0"] == 5
    for content in (b"of a later run", None):
        checkpoint.write_bytes(content) if content else checkpoint.unlink()
        less, _ = data_of(report.build([folder / "samples.pt"], small_dataset))
        assert less["near"] is None and less["metrics"] == {}


def test_contexts_shown_and_scored_keep_their_roles_and_their_simulation(tmp_path, small_dataset, smollm2):
    from sae.explanations import token_texts
    from sae.models import load_tokenizer
    from sae.tokens import open_dataset

    dataset, _ = open_dataset(small_dataset)
    tokenizer = load_tokenizer(smollm2)
    texts = {row: token_texts(tokenizer, dataset[row]["input_ids"]) for row in range(4)}
    whole = {row: "".join(texts[row][1:]) for row in texts}
    simulated = [np.linspace(0.2, 0.7, 63).tolist(), [0.7, 0.2, 0.45]]
    document = {
        "dim": 7, "interpretation": "x", "shown": [{"row": 0, "text": whole[0], "marks": [[0, 2]]}],
        "scored": [
            {"row": 1, "text": whole[1], "marks": []},
            {"row": 2, "text": "".join(texts[2][10:13]), "marks": []},
            {"row": 200, "text": "not among the samples", "marks": []},
        ],
        "simulated": [*simulated, [1.0]],
    }  # fmt: skip
    fires = {7: {0: {3: 2.0}, 1: {4: 0.5}, 2: {}}, 12: {0: {9: 4.0}}}
    other = {"dim": 12, "interpretation": "y", "scored": document["shown"]}  # no simulation is known
    write_run(tmp_path, small_dataset, smollm2, fires, 64, [document, other])
    _, packed = data_of(report.build([tmp_path / "samples.pt"], small_dataset))
    assert packed.role.tolist() == [report.SHOWN, report.SIMULATED, report.SIMULATED, report.SCORED]
    assert packed.read.tolist() == [[1, 64], [1, 64], [10, 13], [1, 64]], "position 0 is skipped"
    # In 255ths between the least and the greatest value anywhere: here 0.2 and 1.
    assert len(packed.simulated) == 2 and packed.simulated[1].nonzero()[0].tolist() == [10, 12]
    assert packed.simulated[1, [10, 11, 12]].tolist() == [159, 0, 79]
    assert packed.simulated[0, 0] == 0 and packed.simulated[0, 1] == 0 and packed.simulated[0, 63] == 159


def test_tokens_read_finds_a_cut_context():
    texts = ["ab", "ab", "c", "", "d", "ab"]
    assert report.tokens_read(texts, "ababcdab", 0) == (0, 6)
    assert report.tokens_read(texts, "abc", 1) == (1, 3)
    assert report.tokens_read(texts, "dab", 1) == (4, 6)
    assert report.tokens_read(texts, "nowhere", 1) == (1, 6)


def test_promoted_tokens_come_from_the_samples(run, small_dataset, smollm2):
    from sae.explanations import token_texts
    from sae.models import load_tokenizer
    from sae.samples import load_samples

    folder, _ = run
    content = torch.load(folder / "samples.pt", weights_only=True)
    ids = torch.tensor([[40_000, 17], [3, 40_001]])
    content |= {
        "promoted": ids, "promoted_logits": torch.tensor([[2.5, 1.0], [0.5, 0.25]]),
        "suppressed": ids.flip(1), "suppressed_logits": torch.tensor([[-2.0, -1.0], [-3.0, -0.5]]),
    }  # fmt: skip
    torch.save(content, folder / "samples.pt")
    if not hasattr(load_samples(folder / "samples.pt"), "promoted"):
        pytest.skip("this version's samples hold no promoted tokens")
    (folder / "samples.explanations.jsonl").unlink()
    data, _ = data_of(report.build([folder / "samples.pt"], small_dataset))
    said = [[[data["tokens"][token], logit] for token, logit in side] for side in data["features"][0][4]]
    a, b = token_texts(load_tokenizer(smollm2), [40_000, 17])
    assert said == [[[a, 2.5], [b, 1.0]], [[b, -2.0], [a, -1.0]]]


def test_several_runs_share_a_page(run, tmp_path, small_dataset, smollm2):
    folder, (_, dataset_path) = run
    other = tmp_path / "other"
    other.mkdir()
    write_run(other, small_dataset, smollm2, {30: {3: {3: 1.0}}}, 64, [{"dim": 30, "interpretation": "y"}])
    files = [folder / "samples.pt", other / "samples.pt"]
    page = report.build(files, dataset_path)
    assert [data_of(page, r)[0]["features"][0][0] for r in (0, 1)] == [7, 30]
    assert data_of(page, 1)[1].activation.max() == 255
    for flag, given in (
        ("explanations", [other / "samples.explanations.jsonl"]),
        ("metrics", [other / "metrics.jsonl"]),
    ):
        with pytest.raises(InputError, match=f"--{flag} of each samples file needed, 2, got 1"):
            report.build(files, dataset_path, **{flag: given})


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
        ({"autoencoder_path": [folder / "8.pt"]}, ("samples.pt", "8.pt")),
        ({"explanations": [none]}, (str(none), "no such file")),
        ({"metrics": [none]}, (str(none), "no such file")),
        ({"explanations": [journal]}, (str(journal), "elsewhere")),
    ):
        with pytest.raises(InputError) as refused:
            report.build([samples], **{"dataset_path": dataset_path, **flags})
        for word in words:
            assert word in str(refused.value), (flags, refused.value)
    result = run_module("sae.report", samples, "--dataset_path", other, "--out", folder / "r.html")
    assert_refused(result, "samples.pt", other)
    assert not (folder / "r.html").exists()
    before = samples.read_bytes()
    result = run_module("sae.report", samples, "--dataset_path", dataset_path, "--out", samples)
    assert_refused(result, "--out needs a new file or a page to replace", samples)
    assert samples.read_bytes() == before


def random_samples(F, T, R, rng):
    """Samples of F features whose contexts and activations are drawn, with 52 contexts kept of each."""
    acts = rng.random((F, 52, T), dtype="float32")
    acts = torch.from_numpy((acts * (acts < 0.05) * 20).astype("float16"))
    config = {"model_name": "m", "hookpoint": "h", "act_vec_size": 8, "dict_vec_size": F}
    kind = torch.tensor([0] * 24 + [1] * 12 + [2] * 16, dtype=torch.int8).repeat(F, 1)
    rows = torch.from_numpy(rng.integers(0, R, (F, 52)))
    frequency, features = torch.full((F,), -1.0), torch.arange(F)
    return Samples(config, "d", "a", R * T, frequency, features, acts.amax((1, 2)).float(), rows, acts, kind)


def as_run(samples, ids, texts, journal):
    effects = [[] for _ in samples.features]
    return report.Run(samples, journal, None, {}, samples.rows.numpy(), ids, texts, effects)


def explained_at_random(samples, ids, texts, rng):
    """A journal in which every feature has 20 shown and 20 scored contexts, these with a simulation."""
    journal = {}
    for dim, rows_K in enumerate(samples.rows.tolist()):
        contexts = [
            {"row": row, "text": "".join(texts[id] for id in ids[row]), "marks": []} for row in rows_K
        ]
        simulated = rng.random((20, ids.shape[1])).round(3) ** 4
        journal[dim] = {
            "interpretation": "x" * 60, "shown": contexts[:20], "simulated": simulated.tolist(),
            "scored": contexts[20:24] + contexts[36:],
        }  # fmt: skip
    return journal


# 5,000 of them are in benchmarks/report.py.
def test_a_thousand_explained_features_stay_under_their_part_of_30_mb():
    rng = np.random.default_rng(0)
    samples = random_samples(1000, 64, 12_000, rng)
    # Tokens drawn evenly from a large vocabulary: text that hardly compresses.
    ids, texts = rng.integers(0, 30_000, (12_000, 64)), [f" t{id}" for id in range(30_000)]
    journal = explained_at_random(samples, ids, texts, rng)
    page = report.render([as_run(samples, ids, texts, journal)], 12, 6e6)
    assert len(page.encode()) < 6.1e6
    _, packed = data_of(page)
    assert (packed.role == report.SIMULATED).sum() == len(packed.simulated) > 1000 * 19


def test_fewer_contexts_are_shown_where_the_page_would_be_too_large():
    rng = np.random.default_rng(0)
    samples = random_samples(50, 64, 500, rng)
    ids, texts = rng.integers(0, 1000, (500, 64)), [f" t{id}" for id in range(1000)]
    pages = [report.render([as_run(samples, ids, texts, {})], 24, most) for most in (1e6, 1e5)]
    whole, small = (data_of(page)[1] for page in pages)
    assert np.diff(whole.start).tolist() == [52] * 50
    assert set(small.kind) == {0, 1, 2} and len(small.kind) < len(whole.kind)
