"""Which features of an autoencoder fire on a text, and what they were explained as.

python -m sae.look 50000.pt --text "import os" --explanations samples.explanations.jsonl
"""

import os
import sys

from sae import InputError, cli

SHADES = (230, 222, 214, 208, 202)  # of a terminal's 256 colours, darker where a feature fires more


def parse_args():
    parser = cli.Parser(__doc__)
    parser.prog = "python -m sae.look"
    add = parser.add_argument
    add("checkpoint", type=cli.path, help="autoencoder (.pt)")
    add("--text", required=True, help="what the LLM reads")
    add("--top", type=cli.whole_number(1), default=3, help="features shown for each token")
    add("--explanations", type=cli.path, help="journal of interpret_autoencoder_deepspeed.py")
    add("--server", help="ElasticSearch to ask for explanations instead: [http(s)://]host[:port]")
    add("--index", help="index to ask; default: named after the autoencoder")
    add("--api_key", default="none", help="key of the server, or @FILE with the key")
    add("--ssl_cert", type=cli.path, help="file with the server's certificate authority")
    add("--insecure", action="store_true", help="do not verify the server's certificate")
    add("--model_name", type=cli.path, help="LLM: hub name, folder or .gguf; default: the checkpoint's")
    add("--device", default="cpu", help="where the LLM runs")
    return parser, parser.parse_args()


def firing(checkpoint, text, model_name=None, device="cpu", top=3):
    """For each token of `text`: (its text, [(feature, activation)] of up to `top`, the strongest first).

    checkpoint: as load_autoencoder gives it. At positions that training left out nothing fires.
    """
    import torch

    from sae.activations import activations_at, find_hookpoint
    from sae.explanations import token_texts
    from sae.models import load_model, load_tokenizer

    config, name = checkpoint.config, model_name or checkpoint.config["model_name"]
    tokenizer = load_tokenizer(name)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError("a text needed, none came")
    model = load_model(name, device)
    module, hookpoint = find_hookpoint(model, config["hookpoint"], config["layer_id"])
    acts_ND = activations_at(model, module, torch.tensor([ids]))[0].cpu()
    if acts_ND.shape[1] != config["act_vec_size"]:
        needed = f"{config['act_vec_size']} wide at {hookpoint}"
        raise InputError(f"a model {needed} needed by the autoencoder, {name} is {acts_ND.shape[1]} wide")
    f_NF = checkpoint.autoencoder.features(acts_ND)
    f_NF[: config.get("skip_positions", 0)] = 0
    strongest = zip(*(part.tolist() for part in f_NF.topk(min(top, f_NF.shape[1]))), strict=True)
    found = [[(dim, value) for value, dim in zip(*row, strict=True) if value > 0] for row in strongest]
    return list(zip(token_texts(tokenizer, ids), found, strict=True))


def explained(dims, checkpoint, args):
    """{feature: its document}, from the index or the journal that the flags name."""
    from sae import artifacts, explanations

    where, documents = args.explanations, []
    if args.server and dims:
        where, tls = args.index or explanations.index_name(checkpoint.config), (args.ssl_cert, args.insecure)
        query = {"terms": {"dim": sorted(dims)}}
        documents = explanations.search(args.server, where, query, len(dims), args.api_key, *tls)
    elif where and not os.path.isfile(where):
        raise InputError(f"explanations needed at {where}, no such file")
    elif where:
        documents = explanations.read_journal(where)[0].values()
    for made_from in {document["autoencoder_fingerprint"] for document in documents}:
        artifacts.check_origin(f"what {where} holds", made_from, checkpoint.fingerprint, args.checkpoint)
    return {document["dim"]: document for document in documents}


def printable(text):
    """Text as a terminal may have it: on one line, and no control characters."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def main(args):
    from sae import load_autoencoder

    checkpoint = load_autoencoder(args.checkpoint)
    device = cli.check_device("--device", args.device)
    tokens = firing(checkpoint, args.text, args.model_name, device, args.top)
    documents = explained({dim for _, found in tokens for dim, _ in found}, checkpoint, args)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    most = max((value for _, found in tokens for _, value in found), default=0)

    def shaded(text, value):
        shade = SHADES[min(int(len(SHADES) * value / most), len(SHADES) - 1)] if value else 0
        return f"\x1b[30;48;5;{shade}m{text}\x1b[0m" if colour and value else text

    print("".join(shaded(printable(text), found[0][1] if found else 0) for text, found in tokens))
    print(f"\n{'token':16} {'feature':>7} {'fires':>8} {'score':>6}  explanation")
    for text, found in tokens:
        for place, (dim, value) in enumerate(found or [("-", 0)]):
            one, name = documents.get(dim, {}), printable(text)[:16] if place == 0 else ""
            score = "" if one.get("score") is None else f"{one['score']:.2f}"
            numbers = f"{dim:>7} {shaded(f'{value:8.2f}', value)} {score:>6}"
            print(f"{name:16} {numbers}  {printable(one.get('interpretation', ''))}".rstrip())


if __name__ == "__main__":
    PARSER, ARGS = parse_args()
    with PARSER.friendly_errors():
        main(ARGS)
