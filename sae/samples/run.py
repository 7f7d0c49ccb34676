"""A sampling run: what its flags need, refused early, and the looks it takes at contexts of the dataset."""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from sae import InputError, cli, models
from sae.activations import activation_width, activations_at, carried, find_hookpoint
from sae.artifacts import check_origin, check_writable
from sae.autoencoder import Checkpoint, load_checkpoint
from sae.samples.file import Samples, load_samples
from sae.samples.reading import encode_in_pieces
from sae.tokens import check_tokenizer, open_dataset, read_contexts

# The flags that decide which samples come out, beside the seed.
OWN_FLAGS = (
    "num_samples", "log_freq_lower", "log_freq_upper", "num_top", "num_spread", "num_random", "batch_size",
    "autoencoder_path",
)  # fmt: skip
HARD, PROMOTED = 12, 10  # hard rows, promoted and suppressed tokens of a feature


class Run(NamedTuple):
    """The inputs of a run; `config` is the checkpoint's."""

    dataset: object  # datasets.Dataset
    info: dict
    checkpoint: Checkpoint
    model: torch.nn.Module
    hookpoint: str  # a module of the model
    batch_size: int

    @property
    def context_tokens(self):
        """T: the tokens of a context, as the autoencoder was trained."""
        return self.checkpoint.config.get("num_tokens") or self.info["min_tokens"]

    def rows(self, num_samples, rng):
        """Dataset rows [N] drawn without replacement, ascending, and the document [N] of each."""
        rows_N = torch.randperm(len(self.dataset), generator=rng)[:num_samples].sort().values
        documents = self.dataset.with_format("numpy", columns=["document"])[rows_N.tolist()]["document"]
        return rows_N, torch.as_tensor(documents)

    def look(self, rows_N, contexts_N, what, here, stopping, note):
        """Stream the contexts `contexts_N` (places in `rows_N`) as pieces (numbers [b], features [b, T, F]).

        The processes take whole batches in turn, so that the batches do not depend on how many they are.
        `what`, `note()`: for the bar. Raises KeyboardInterrupt once one of them is `stopping()`.
        """
        autoencoder, skip = self.checkpoint.autoencoder, self.checkpoint.config.get("skip_positions", 0)
        module, batches = self.model.get_submodule(self.hookpoint), contexts_N.split(self.batch_size)
        mine = torch.cat([contexts_N[:0], *batches[here.rank :: here.count]])
        ids = read_contexts(self.dataset, rows_N[mine], self.batch_size, self.context_tokens)
        acts = (activations_at(self.model, module, ids_BT) for ids_BT in ids)
        if self.model.device != autoencoder.b_enc.device:
            acts = carried(acts, autoencoder.b_enc.device)
        # Into a log file a bar is written only where a run takes longer than ten seconds.
        delay = 0 if sys.stderr.isatty() else 10
        options = {"unit": "context", "delay": delay, "disable": here.rank > 0}
        with tqdm(total=len(contexts_N), desc=what, **options) as bar:
            for start in range(0, len(batches), here.count):
                turn = batches[start : start + here.count]
                if here.rank < len(turn):
                    yield from encode_in_pieces(autoencoder, turn[here.rank], next(acts)[:, skip:])
                if bar.update(sum(map(len, turn))):
                    bar.set_postfix_str(note(), refresh=False)
                if here.sum(stopping()):
                    raise KeyboardInterrupt(f"{bar.n} of {bar.total} contexts done ({what})")

    def samples(self, survey, choice, activations_FKT, peak_FM, rows_N, seed, **flags):
        """What the file holds. `config`: the checkpoint's, and this run's values beside it."""
        own = {name: flags[name] for name in OWN_FLAGS}
        dtype = str(self.model.dtype).removeprefix("torch.")
        config = self.checkpoint.config | own | {"samples_seed": seed, "samples_dtype_llm": dtype}
        hard_FH = survey.hard(choice, peak_FM, HARD)
        rows_FK, hard_FH = (rows_N[part].where(part >= 0, -1) for part in (choice.contexts_FK, hard_FH))
        return Samples(
            config, self.info["fingerprint"], self.checkpoint.fingerprint, survey.tokens,
            survey.log10_frequency(), choice.features_F, choice.max_F, rows_FK, activations_FKT,
            choice.kind_FK, hard_FH, **self._promoted(choice.features_F),
        )  # fmt: skip

    def _promoted(self, features_F):
        """Samples' fields on promoted and suppressed tokens; none, said once, where the way is not known."""
        logits = models.way_to_logits(self.model, self.hookpoint)
        if logits is None:
            print(f"no promoted tokens: the way from {self.hookpoint} to the logits is not known")
            return {}
        fields, rows_FD = {}, self.checkpoint.autoencoder.W_dec.to(self.model.device)[features_F]
        for rows_fD in rows_FD.split(256):
            # A model may have more embeddings than there are tokens.
            logits_fV = logits(rows_fD)[:, : self.info["vocab_size"]]
            for name, largest in (("promoted", True), ("suppressed", False)):
                values, tokens = logits_fV.topk(PROMOTED, largest=largest)
                fields.setdefault(name, []).append(tokens.cpu())
                fields.setdefault(f"{name}_logits", []).append(values.cpu())
        return {name: torch.cat(parts) for name, parts in fields.items()}


def prepare(
    here, num_samples, dataset_path, autoencoder_path, save_path, target_model_name, target_model_device,
    autoencoder_device, log_freq_upper, log_freq_lower, batch_size, dtype_llm,
    allow_other_tokenizer=False, trust_remote_code=False, **_others,
):  # fmt: skip
    """The inputs that the flags name; all that can be is refused before the weights of the LLM are read."""
    if log_freq_upper <= log_freq_lower:
        came = f"{log_freq_upper:g} and {log_freq_lower:g}"
        raise InputError(f"--log_freq_upper above --log_freq_lower needed, got {came}")
    check_writable("--save_path", save_path, "an interpretation samples file", load_samples)
    if Path(save_path).suffix == ".png":
        raise InputError(f"--save_path needs the name of a file (.pt), got {save_path}")
    if here.count > 1 and (target_model_device or autoencoder_device):
        raise InputError(f"one process needed to choose devices, got {here.count}: each has its own")
    own, flags = here.device if here.count > 1 else None, ("--target_model_device", "--autoencoder_device")
    llm_device, device = cli.device_pair(target_model_device or own, autoencoder_device or own, flags)
    dataset, info = open_dataset(dataset_path)
    if num_samples > len(dataset):
        most = f"{len(dataset)} (the contexts of {dataset_path})"
        raise InputError(f"num_samples of at most {most} needed, got {num_samples}")
    checkpoint = load_checkpoint(autoencoder_path, device)
    config, made_from = checkpoint.config, checkpoint.config.get("dataset_fingerprint")
    trained = f"the autoencoder {autoencoder_path} (dataset with tokens of {config.get('tokenizer_name')})"
    given = f"--dataset_path {dataset_path} (tokens of {info['tokenizer_name']})"
    check_origin(trained, made_from, info["fingerprint"], given)
    name = target_model_name or config["model_name"]
    hookpoint = check_target(config, name, info, trust_remote_code)
    check_tokenizer(info, name, allow_other_tokenizer)
    model = models.load_model(name, llm_device, dtype_llm, trust_remote_code)
    if model.dtype != torch.float32:  # encoded as in training: what that changes is in docs/samples.md
        checkpoint.autoencoder.W_enc.data = checkpoint.autoencoder.W_enc.to(models.fast_dtype(device))
    return Run(dataset, info, checkpoint, model, hookpoint, batch_size)


def check_target(config, name, info, trust_remote_code=False):
    """The hookpoint in the LLM `name`; InputError where it is another than the checkpoint's or the dataset's.

    The same model may lie elsewhere. Checkpoints of version 0.1 do not know its fingerprint: there it counts
    as another one when the last part of its name differs, or its width at the hookpoint.
    """
    made_from, known = config["model_name"], config.get("model_fingerprint")
    if known:
        same = models.model_fingerprint(name) == known
    else:
        same = Path(name).name == Path(made_from).name or Path(name).resolve() == Path(made_from).resolve()
    if not same:
        raise InputError(f"the model of the autoencoder ({made_from}) needed, got {name}")
    model = models.skeleton(name, trust_remote_code=trust_remote_code)
    models.check_vocabulary(model.config, info)
    models.check_positions(model, config.get("num_tokens") or info["min_tokens"])
    module, hookpoint = find_hookpoint(model, config["hookpoint"], config["layer_id"])
    width = activation_width(model, module)
    if width != config["act_vec_size"]:
        needed = f"the model of the autoencoder ({made_from}, act_vec_size {config['act_vec_size']}) needed"
        raise InputError(f"{needed}, {name} is {width} wide at {hookpoint}")
    return hookpoint
