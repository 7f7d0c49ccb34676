"""Looking at a text: a planted autoencoder on the real SmolLM2, explanations of a journal and of an index."""

import json
import os
import pty
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, assert_refused, run_module
from servers import api_key

import sae.look
from sae import InputError
from sae.activations import activations_at, find_hookpoint
from sae.autoencoder import Autoencoder, save_checkpoint
from sae.explanations import Writer, connect, ensure_index
from sae.look import firing
from sae.models import load_model, load_tokenizer

TEXT = "import os\n\ndef path():\n    return os.sep"
ORIGIN = dict.fromkeys(("samples_fingerprint", "interpretation_model", "simulation", "settings"), "x")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, smollm2):
    """Path of an autoencoder whose feature 5 fires on `os` in TEXT alone, 7 on everything, weakly."""
    tokenizer, model = load_tokenizer(smollm2), load_model(smollm2, dtype="float32")
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    module, name = find_hookpoint(model, "model.layers.3.mlp", 3)
    acts_TD = activations_at(model, module, torch.tensor([ids]))[0]
    is_os = torch.tensor([tokenizer.decode([id]).strip() == "os" for id in ids])
    assert is_os.sum() == 2
    autoencoder = Autoencoder(acts_TD.shape[1], 9)
    with torch.no_grad():
        autoencoder.W_enc.zero_()
        # Least squares: as many dimensions as are needed to give each token the activation it should have.
        autoencoder.W_enc[:, 5] = torch.linalg.lstsq(
            acts_TD.double(), is_os.double()[:, None] * 2 - 1
        ).solution[:, 0]
        autoencoder.b_enc[7] = 0.25
    config = {
        "act_vec_size": acts_TD.shape[1], "dict_vec_size": 9, "layer_id": 3, "layer_type": "mlp_sublayer",
        "hookpoint": name, "model_name": smollm2, "learning_rate": 1e-4, "l1_coefficient": 1.0,
    }  # fmt: skip
    path = tmp_path_factory.mktemp("look") / "ae.pt"
    save_checkpoint(path, config, autoencoder, torch.zeros(9))
    return path


@pytest.fixture(scope="module")
def documents(checkpoint):
    made_from = ORIGIN | {"autoencoder_fingerprint": sae.load_autoencoder(checkpoint).fingerprint}
    texts = {5: ("the module\x1b[31m os", 0.875), 7: ("everything", None), 8: ("nothing", 0.5)}
    return [
        {**made_from, "dim": dim, "interpretation": text, "score": score}
        for dim, (text, score) in texts.items()
    ]


@pytest.fixture(scope="module")
def journal(checkpoint, documents):
    path = checkpoint.with_suffix(".explanations.jsonl")
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def fields(line):
    return line.split(maxsplit=4)


def test_each_token_has_its_features_strongest_first(checkpoint):
    found = firing(sae.load_autoencoder(checkpoint), TEXT, top=20)  # more than there are
    assert "".join(text for text, _ in found) == TEXT
    for text, features in found:
        dims = [dim for dim, _ in features]
        assert dims == ([5, 7] if text.strip() == "os" else [7]), text
        assert features[-1][1] == pytest.approx(0.25)
        if text.strip() == "os":
            assert features[0][1] == pytest.approx(1, abs=0.1)  # the LLM runs in another dtype here
    assert [len(features) for _, features in firing(sae.load_autoencoder(checkpoint), TEXT, top=1)] == [
        1
    ] * len(found)


def test_positions_that_training_left_out_show_nothing(checkpoint):
    opened = sae.load_autoencoder(checkpoint)
    found = firing(opened._replace(config=opened.config | {"skip_positions": 2}), TEXT)
    assert [bool(features) for _, features in found][:4] == [False, False, True, True]


def look(monkeypatch, capsys, checkpoint, *flags):
    """What the command prints, run within the tests' process."""
    monkeypatch.setattr(sys, "argv", ["look", str(checkpoint), *map(str, flags)])
    sae.look.main(sae.look.parse_args()[1])
    return capsys.readouterr().out


def test_the_command_prints_what_fires_and_what_it_was_explained_as(checkpoint, journal):
    result = run_module("sae.look", checkpoint, "--text", TEXT, "--explanations", journal, fresh=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == TEXT.replace("\n", "\\n")  # no colour in a pipe, no control character
    assert lines[2].split() == ["token", "feature", "fires", "score", "explanation"]
    assert fields(lines[3]) == ["import", "7", "0.25", "everything"]
    token, dim, _fires, score, text = fields(lines[4])
    assert (token, dim, score, text) == ("os", "5", "0.88", "the module\\x1b[31m os")
    assert lines[5].split() == ["7", "0.25", "everything"]
    assert "nothing" not in result.stdout


def test_the_index_is_asked_for_what_fires(checkpoint, documents, elasticsearch_url, monkeypatch, capsys):
    client, index = connect(elasticsearch_url, api_key()), f"sae-look-{time.time_ns():x}"
    ensure_index(client, index, documents[0])
    with Writer(client, index, 5) as writer:
        writer.submit(documents + [documents[-1] | {"dim": dim} for dim in range(9, 20)])
    assert writer.sent == 14
    flags = ("--text", TEXT, "--server", elasticsearch_url, "--index", index, "--api_key", api_key())
    lines = look(monkeypatch, capsys, checkpoint, *flags).splitlines()
    args = sae.look.parse_args()[1]
    assert len(sae.look.explained(set(range(20)), sae.load_autoencoder(checkpoint), args)) == 14
    client.indices.delete(index=index)
    assert fields(lines[3]) == ["import", "7", "0.25", "everything"]
    assert fields(lines[4])[-2:] == ["0.88", "the module\\x1b[31m os"]


def on_a_terminal(command):
    """What a command writes to a terminal."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command, stdout=slave, stderr=slave, cwd=ROOT, env=os.environ | {"TERM": "xterm"}
    )
    os.close(slave)
    said = b""
    try:
        while part := os.read(master, 4096):
            said += part
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(master)
    assert process.wait() == 0, said
    return said.decode()


def test_a_terminal_gets_colour_unless_it_wants_none(checkpoint, monkeypatch, capsys):
    said = on_a_terminal([sys.executable, "-m", "sae.look", checkpoint, "--text", TEXT])
    assert "\x1b[30;48;5;202m os\x1b[0m" in said  # the strongest: the last shade
    assert "\x1b[30;48;5;222mimport\x1b[0m" in said
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\x1b" in look(monkeypatch, capsys, checkpoint, "--text", TEXT)
    monkeypatch.setenv("NO_COLOR", "1")
    plain = look(monkeypatch, capsys, checkpoint, "--text", TEXT, "--top", "1")
    assert "\x1b" not in plain and " 5 " in plain and sum(" 7 " in line for line in plain.splitlines()) == 10


def test_what_does_not_belong_together_is_refused(
    checkpoint, journal, tmp_path, tiny_llama, monkeypatch, capsys
):
    other = tmp_path / "other.jsonl"
    other.write_text(journal.read_text().replace(sae.load_autoencoder(checkpoint).fingerprint, "fedcba"))
    for words, *flags in (
        ("fedcba.*ae.pt", "--text", "os", "--explanations", other),
        ("no.jsonl, no such file", "--text", "os", "--explanations", tmp_path / "no.jsonl"),
        ("a text needed", "--text", ""),
        (
            r"576 wide at model.layers.3.mlp needed.*is 32 wide|layer_id",
            "--text",
            "x",
            "--model_name",
            tiny_llama,
        ),
    ):
        with pytest.raises(InputError, match=words):
            look(monkeypatch, capsys, checkpoint, *flags)
    assert_refused(run_module("sae.look", tmp_path / "none.pt", "--text", "x"), "none.pt, no such file")


def test_the_package_opens_its_rooms_only_when_they_are_used(checkpoint):
    program = "import sys, sae; assert 'torch' not in sys.modules; from sae import load_samples, search; {}"
    more = f"print(sae.load_autoencoder({str(checkpoint)!r}).config['layer_id'])"
    said = subprocess.run(
        [sys.executable, "-c", program.format(more)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert said.stdout == "3\n"
    with pytest.raises(AttributeError, match="no attribute 'load_everything'"):
        sae.load_everything  # noqa: B018
