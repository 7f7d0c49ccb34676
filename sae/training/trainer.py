"""One training step of the autoencoder, and the loop around it.

Dims: N rows of a batch, D act_vec_size, F dict_vec_size.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from sae import InputError
from sae.autoencoder import FEATURES, Autoencoder
from sae.processes import ALONE
from sae.training import resampling, steps
from sae.training.update import adam_step

LOG_INTERVAL = 50  # batches between two readings of the losses: between them the device is never waited for
DEAD_WINDOW = 1000  # batches without firing after which the bar and the log call a feature dead
FREQUENCY_TOKENS = 2**20  # about the latest so many tokens a checkpoint's frequencies are over
FREQUENCY_BLOCKS = 8  # they are counted in blocks of batches, the oldest of which is dropped for a new one
FIRST_ROWS = 8192  # of the first buffer that decide how a run starts
AUX_WINDOW = 100  # batches without firing after which AuxK takes care of a feature


class Schedule(NamedTuple):
    """Shares of the learning rate and of the penalty over a run; named after the flags, 0: off."""

    num_batches: float
    lr_warmup_batches: int = 0
    lr_decay_batches: int = 0
    l1_warmup_batches: int = 0

    def learning_rate(self, batch):
        """Up from 0 in a line, down to 0 in a line at the end. batch: steps done before this one."""
        left = (self.num_batches - batch) / max(1, self.lr_decay_batches)
        return min(1, (batch + 1) / max(1, self.lr_warmup_batches)) * min(1, left)

    def penalty(self, batch):
        return min(1, (batch + 1) / max(1, self.l1_warmup_batches))


CONSTANT = Schedule(math.inf)


def geometric_median(x_ND, steps=100, tolerance=1e-6):
    """Weiszfeld's algorithm: [D]. A mean is a poor start where a few rows are hundreds of times longer."""
    median_D = x_ND.mean(0)
    for _ in range(steps):
        weight_N = 1 / torch.linalg.vector_norm(x_ND - median_D, dim=1).clamp_min(1e-8)
        before_D, median_D = median_D, weight_N @ x_ND / weight_N.sum()
        if torch.linalg.vector_norm(median_D - before_D) <= tolerance * torch.linalg.vector_norm(median_D):
            break
    return median_D


class Trainer:
    """The autoencoder, Adam, and the counters: all that changes from step to step.

    l1_coefficient weighs the penalty (see steps); target_l0 is what jumprelu aims at. matmul_dtype is what
    dense products run in; weights, moments, losses and the sums over rows are float32. scale_dataset: one
    factor for all rows brings their mean norm to sqrt(D). auxk: features silent for AUX_WINDOW batches are
    trained on what the others leave. frequency_block: batches counted together.

    Where features are shared out over processes (`autoencoder.here`), so are their moments and counters. All
    make the same calls on the same rows; b_dec, its moments and Adam's steps come out the same everywhere.
    """

    def __init__(
        self, autoencoder, learning_rate, l1_coefficient, matmul_dtype=torch.float32, *,
        schedule=CONSTANT, target_l0=None, scale_dataset=False, auxk=False, frequency_block=512,
    ):  # fmt: skip
        self.autoencoder, self.l1_coefficient, self.dtype = autoencoder, l1_coefficient, matmul_dtype
        self.here = autoencoder.here
        self.learning_rate, self.schedule, self.target_l0 = learning_rate, schedule, target_l0
        self.scale_dataset, self.auxk = scale_dataset, auxk
        self.trained = [parameter for parameter in autoencoder.parameters() if parameter.requires_grad]
        groups = [{"params": [one], "share": 1.0} for one in self.trained]  # share: of the learning rate
        self.optimizer = torch.optim.Adam(groups, lr=learning_rate, fused=True)  # keeps the moments
        for one in self.trained:
            # On CUDA the gradients of matrices stay as the products make them: half of the memory.
            one.grad_dtype = matmul_dtype if one.is_cuda and one.dim() == 2 else one.dtype
            one.grad = torch.zeros_like(one, dtype=one.grad_dtype)
        device, features = autoencoder.b_enc.device, len(autoencoder.b_enc)
        self.batch, self.frequency_block = 0, frequency_block
        # On how many rows each feature fired, a line for each of the latest R blocks of batches.
        self.fired_RF = torch.zeros(FREQUENCY_BLOCKS + 1, features, dtype=torch.int32, device=device)
        self.silent_F = torch.zeros(features, dtype=torch.int64, device=device)  # batches since firing
        # Of each batch since the last log line: [squared error, penalty, L0] per row, this process's part.
        self.losses = []
        self._watched = None
        self._refresh()

    def _refresh(self):
        self._copies = steps.copies(self.autoencoder, self.dtype)

    @torch.no_grad()
    def step(self, x_ND):
        """Train on one batch of LLM activations (any float dtype)."""
        ae, x_ND = self.autoencoder, self._inputs(x_ND)
        weight = self.l1_coefficient * self.schedule.penalty(self.batch)
        watched = self._watch() if self.auxk else None
        found = steps.gradients(ae, self._copies, x_ND, weight, self.target_l0, watched)
        if ae.architecture == "batchtopk":
            # A running mean of the smallest value kept, at first over all batches.
            share = max(steps.THRESHOLD_SHARE, 1 / (self.batch + 1))
            ae.threshold.lerp_(found.cut.float().expand_as(ae.threshold), share)
        self.update()
        block, within = divmod(self.batch, self.frequency_block)
        line_F = self.fired_RF[block % len(self.fired_RF)]
        line_F.mul_(within > 0).add_(found.fired_F)
        self.silent_F = torch.where(found.fired_F > 0, 0, self.silent_F + 1)
        squared_error = (self.here.rank == 0) * found.error_ND.square().sum() / len(x_ND)
        self.losses.append(torch.stack([squared_error, found.penalty, found.fired_F.sum() / len(x_ND)]))
        self.batch += 1

    def _watch(self):
        """For AuxK. A GPU is asked every LOG_INTERVAL batches, for what may be dead before the next time."""
        interval = 1 if self.silent_F.device.type in steps.READ_AT_ONCE else LOG_INTERVAL
        if self._watched is None or self.batch % interval == 0:
            numbers_K = (self.silent_F > AUX_WINDOW - interval).nonzero()[:, 0]
            self._watched = steps.Watched(numbers_K, None, self.here.sum(len(numbers_K)))
        return self._watched._replace(dead_K=self.silent_F[self._watched.numbers_K] >= AUX_WINDOW)

    @torch.no_grad()
    def update(self):
        """Adam, on gradients that leave the rows of W_dec at unit norm; then make the norm exact."""
        ae = self.autoencoder
        if ae.architecture in ("topk", "batchtopk"):
            self._clip()
        copies = {ae.W_enc: self._copies.W_enc_FD, ae.W_dec: self._copies.W_dec_FD}
        for group in self.optimizer.param_groups:
            (one,), state = group["params"], self.optimizer.state[group["params"][0]]
            group["lr"] = self.learning_rate * group["share"] * self.schedule.learning_rate(self.batch)
            adam_step(one, state, group["lr"], self.batch, copies.get(one), unit=one is ae.W_dec)
        if ae.architecture == "jumprelu":
            ae.threshold.clamp_(min=0)

    def _clip(self):
        """Gradients whose norm over all processes' features is 1 at most."""
        ae, here = self.autoencoder, self.here
        grads = [one.grad for one in self.trained if here.rank == 0 or one is not ae.b_dec]
        # In float32 also where products are bfloat16: each of the norms would be rounded to 3 digits.
        norm = torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]).norm()
        if here.count > 1:
            norm = here.total(norm.square()).sqrt()
        torch.nn.utils.clip_grads_with_norm_(self.trained, 1.0, norm)

    def _inputs(self, rows_ND):
        """Activations as the encoder sees them: float32, scaled."""
        x_ND, ae = rows_ND.to(self.autoencoder.b_dec), self.autoencoder
        return x_ND * ae.scale(x_ND) if ae.normalize or ae.factor != 1 else x_ND

    def _row_losses(self, rows_ND):
        """||x - x'||^2 of each row, and for relu l1 sum f: [N]."""
        x_ND = self._inputs(rows_ND)
        f_NF = steps.encode(self.autoencoder, self._copies, x_ND).features()
        loss_N = steps.reconstruct(self.autoencoder, self._copies, x_ND, f_NF).square().sum(1)
        if self.autoencoder.architecture == "relu":
            loss_N += self.l1_coefficient * self.here.total(f_NF.sum(1, dtype=torch.float32))
        return loss_N

    @torch.no_grad()
    def start(self, buffer, seed):
        """What up to FIRST_ROWS rows of the first buffer decide: factor, b_dec, thresholds of jumprelu.

        b_dec starts at the geometric median, thresholds where target_l0 features fire on a row.
        """
        ae, rng = self.autoencoder, np.random.default_rng([seed, 3])
        rows_ND = buffer.rows(buffer.sample(FIRST_ROWS, rng))
        if self.scale_dataset:
            norm = torch.linalg.vector_norm(rows_ND.to(ae.b_dec), dim=1).mean().item()
            ae.factor = rows_ND.shape[1] ** 0.5 / norm if norm else 1.0
        x_ND = self._inputs(rows_ND)
        ae.b_dec.copy_(geometric_median(x_ND))
        if ae.architecture == "jumprelu":
            # Entries of the encoder that move by the learning rate move pre-activations by about this.
            # Thresholds that moved by the rate alone came late: L0 was 17 for 32 after 300 batches.
            length = torch.linalg.vector_norm(x_ND - ae.b_dec, dim=1).mean().item()
            self.optimizer.param_groups[-1]["share"] = length
            x_ND = x_ND[: buffer.batch_size]
            ae.threshold.fill_(steps.first_threshold(ae, self._copies, x_ND, self.target_l0))

    @torch.no_grad()
    def resample(self, plan, seed, buffer):
        """Revive the features silent for `plan.window` batches; returns the event for the log."""
        self.finite_losses()  # else inputs would be drawn by weights that are no numbers
        dead_K = (self.silent_F >= plan.window).nonzero()[:, 0]
        deaths, rng = self.here.everyone(len(dead_K)), np.random.default_rng([seed, 2, self.batch])
        if plan.method == "replacement":
            resampling.revive_at_random(self.autoencoder, self.optimizer, dead_K, rng)
        elif sum(deaths):
            slots = buffer.sample(resampling.NUM_INPUTS, rng)
            losses = [self._row_losses(buffer.rows(part)).cpu() for part in slots.split(buffer.batch_size)]
            picked = resampling.pick_inputs(torch.cat(losses), sum(deaths), rng).to(slots.device)
            for rank, part in enumerate(picked.split(deaths)):
                rows_KD = buffer.rows(slots[part])
                if rank == self.here.rank:
                    inputs_KD = self._inputs(rows_KD)
            resampling.revive_from_inputs(self.autoencoder, self.optimizer, dead_K, inputs_KD)
        self._refresh()
        self.silent_F[dead_K] = 0
        return {"event": "resample", "method": plan.method, "revived": sum(deaths)}

    def _losses(self):
        return self.here.total(torch.stack(self.losses)) if self.losses else torch.zeros(0, 3)

    def finite_losses(self):
        """Losses since the last log line [batches, 3]; InputError names the first that is not finite."""
        losses_L3 = self._losses().double().cpu()
        bad = (~torch.isfinite(losses_L3).all(1)).nonzero()[:, 0].tolist()
        if bad:
            batch = self.batch - len(self.losses) + bad[0] + 1
            raise InputError(f"a finite loss needed, batch {batch} gave {losses_L3[bad[0], :2].sum():g}")
        return losses_L3

    def log_line(self):
        """Mean losses since the last log line."""
        losses_L3 = self.finite_losses()
        mse, l1, l0 = losses_L3.mean(0).tolist()
        self.losses = []
        dead = self.here.sum(int((self.silent_F >= min(DEAD_WINDOW, self.batch)).sum()))
        return {"loss": mse + l1, "mse": mse, "l1": l1, "l0": l0, "dead": dead}

    def log10_frequency(self, batch_size):
        """log10 of the share of the last N rows each feature fired on: [F], -inf where on none; and N.

        Of all features, at the first process; None elsewhere.
        """
        latest = FREQUENCY_BLOCKS * self.frequency_block + (self.batch - 1) % self.frequency_block + 1
        rows = min(self.batch, latest) * batch_size
        frequency_F = self.here.whole(self.fired_RF.sum(0), 0)
        return None if frequency_F is None else torch.log10(frequency_F.double() / rows).float().cpu(), rows

    def state(self):
        """All of it as plain values and tensors; `restore` is its mirror.

        Of several processes the first gets that of all, tensor by tensor: the same as of one. Any number of
        them may go on from it.
        """
        return self._parts(self.here.whole, {
            "batch": self.batch,
            "fired_RF": self.fired_RF,
            "silent_F": self.silent_F,
            "losses": self._losses(),
            "weights": self.autoencoder.state_dict(),
            "adam": self.optimizer.state_dict(),
            "factor": self.autoencoder.factor,
        })  # fmt: skip

    def restore(self, state):
        state = self._parts(self.here.own, state)
        self.autoencoder.factor = state["factor"]
        self.autoencoder.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["adam"])
        self.fired_RF.copy_(state["fired_RF"])
        self.silent_F.copy_(state["silent_F"])
        self.losses = list(state["losses"].to(self.silent_F.device) * (self.here.rank == 0))
        self.batch, self._watched = state["batch"], None
        self._refresh()

    def _parts(self, part, state):
        """The state with `part(tensor, dim)` in place of whatever has features along one of its dims."""
        names = [name for name, one in self.autoencoder.named_parameters() if one.requires_grad]
        moments = {number: dict(of_one) for number, of_one in state["adam"]["state"].items()}
        for number, of_one in moments.items():
            for key in ("exp_avg", "exp_avg_sq"):
                of_one[key] = part(of_one[key], FEATURES[names[number]])
        return state | {
            "fired_RF": part(state["fired_RF"], 1),
            "silent_F": part(state["silent_F"], 0),
            "weights": {name: part(value, FEATURES[name]) for name, value in state["weights"].items()},
            "adam": state["adam"] | {"state": moments},
        }


def new_trainer(config, device, matmul_dtype, here=ALONE):
    """A Trainer with first weights drawn from the seed; config: what `run_config` gave.

    Of several processes (`here`) each gets its share of the features.
    """
    rng = torch.Generator().manual_seed(config["seed"])
    sizes, normalize = (config["act_vec_size"], config["dict_vec_size"]), config["normalize_dataset"]
    autoencoder = Autoencoder(*sizes, normalize, rng, device, config["architecture"], config["k"], here)
    # In a short run at most the second half of it: at the beginning features fire otherwise than later.
    window = min(FREQUENCY_TOKENS // config["batch_size_autoencoder"], config["num_batches"] // 2)
    return Trainer(
        autoencoder, config["learning_rate"], config["l1_coefficient"], matmul_dtype,
        schedule=Schedule(*(config[name] for name in Schedule._fields)),
        frequency_block=max(1, window // FREQUENCY_BLOCKS),
        **{name: config[name] for name in ("target_l0", "scale_dataset", "auxk")},
    )  # fmt: skip


class Resampling(NamedTuple):
    method: str  # replacement | anthropic
    interval: int  # batches

    @property
    def window(self):
        """Batches without firing that make a feature dead."""
        return self.interval if self.method == "replacement" else max(1, self.interval // 2)


def train(trainers, buffer, num_batches, plan, seed):
    """Train up to batch `num_batches`, all on the same batches; those that are ahead wait for the others.

    Yields after every batch {place in `trainers`: events} of those that took it. Events (mostly none) are
    dicts with `event` (log, resample), `batch` and `tokens`. plan: a Resampling or None.
    """
    first = min(trainer.batch for trainer in trainers)
    for number, x_ND in enumerate(buffer.batches(first), first):
        places = [place for place, trainer in enumerate(trainers) if trainer.batch == number]
        yield {place: _train_step(trainers[place], x_ND, buffer, num_batches, plan, seed) for place in places}


def _train_step(trainer, x_ND, buffer, num_batches, plan, seed):
    """A step and its events.

    Features are revived at the beginning of a step, so whatever is saved after a step was trained; and not
    where less than an interval is left for them to recover.
    """
    events, batch = [], trainer.batch
    if batch == 0:
        trainer.start(buffer, seed)
    elif plan and batch % plan.interval == 0 and batch + plan.interval <= num_batches:
        events.append({"batch": batch} | trainer.resample(plan, seed, buffer))
    trainer.step(x_ND)
    if trainer.batch == num_batches or trainer.batch % LOG_INTERVAL == 0:
        events.append({"batch": trainer.batch, "event": "log"} | trainer.log_line())
    return [{"tokens": event["batch"] * len(x_ND)} | event for event in events]
