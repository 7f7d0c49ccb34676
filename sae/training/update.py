"""The update of a matrix of weights: in one pass per row projection, Adam, renormalisation and the copy.

    g = g - (g . w) w          of unit rows: the part that would change their length
    w = w - rate * m / (sqrt(v) + EPS), m and v Adam's corrected moments of g; then w / ||w||

On CUDA this is compiled. Inductor makes one kernel of it (seen for rows of 11,008; no GPU has run it), which
moves some 32 bytes a weight where operations one after the other move 60. On the CPU they run on blocks that
stay in its cache, Adam as torch has it there: bit for bit what it was, in half of the time.
Dims: R rows of a block, D act_vec_size, F dict_vec_size.
"""

import functools

import torch

BETAS, EPS = (0.9, 0.999), 1e-8
# Numbers in a block; where nothing is compiled, operations make temporaries of that size.
BLOCK = {"cpu": 400_000, "cuda": 2**24}


def plain_adam(W_RD, grad_RD, mean_RD, square_RD, rate, root):
    """rate: the learning rate over the first moment's correction; root: of the second's. Tensors []."""
    mean_RD.lerp_(grad_RD, 1 - BETAS[0])
    square_RD.mul_(BETAS[1]).addcmul_(grad_RD, grad_RD, value=1 - BETAS[1])
    W_RD.sub_(rate * mean_RD / (square_RD.sqrt() / root + EPS))


def torchs_adam(W_RD, grad_RD, mean_RD, square_RD, rate, step):
    """The same by torch's own kernel. step: of this update, from 1; a tensor []."""
    torch._fused_adam_(
        [W_RD], [grad_RD], [mean_RD], [square_RD], [], [step], lr=rate, beta1=BETAS[0], beta2=BETAS[1],
        eps=EPS, weight_decay=0.0, amsgrad=False, maximize=False,
    )  # fmt: skip


def update_rows(adam, W_RD, grad_RD, mean_RD, square_RD, copy_RD, unit, *numbers):
    """In place, but for the gradient (any float dtype). copy_RD: the weights as products take them, or None.

    unit: rows are of unit norm and stay so. adam, numbers: one of the two above and its last arguments.
    """
    grad_RD = grad_RD.float()
    if unit:
        along_R1 = torch.linalg.vecdot(grad_RD, W_RD)[:, None]
        grad_RD = torch.addcmul(grad_RD, W_RD, along_R1, value=-1)
    adam(W_RD, grad_RD, mean_RD, square_RD, *numbers)
    if unit:
        W_RD.div_(torch.linalg.vector_norm(W_RD, dim=1, keepdim=True))
    if copy_RD is not None:
        copy_RD.copy_(W_RD)


@functools.cache
def compiled():
    """`update_rows` as one kernel; where torch cannot compile (no C compiler) it says so, and goes on."""
    torch._dynamo.config.suppress_errors = True
    return torch.compile(update_rows)


@torch.no_grad()
def adam_step(parameter, state, rate, batch, copy_FD=None, unit=False):
    """A step of Adam for a parameter with a gradient. state: torch.optim.Adam's of it; rate: learning rate.

    batch: steps done before. copy_FD: of a matrix, feature-major, to be written; None for a vector.
    """
    if not state:
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        state |= {"step": torch.zeros((), device=parameter.device), **moments}
    state["step"] += 1
    parts = parameter.detach(), parameter.grad, state["exp_avg"], state["exp_avg_sq"]
    if copy_FD is None:
        return torchs_adam(*parts, rate, state["step"])
    # Features are rows in memory, whatever the shape of a matrix says.
    turned = parameter.stride() != copy_FD.stride()
    parts = *(part.T if turned else part for part in parts), copy_FD
    rows_step, adam, numbers = update_rows, torchs_adam, (rate, state["step"])
    if parameter.is_cuda:
        rows_step, adam = compiled(), plain_adam
        numbers = rate / (1 - BETAS[0] ** (batch + 1)), (1 - BETAS[1] ** (batch + 1)) ** 0.5
        # Filled on the device: numbers of Python would be compiled in, and a copy would be waited for.
        numbers = [torch.full((), number, device=parameter.device) for number in numbers]
    # In float32 the copy is the weights themselves: two names of one memory are what the compiler refuses.
    same = copy_FD.data_ptr() == parameter.data_ptr()
    rows = max(1, BLOCK[parameter.device.type] // copy_FD.shape[1])
    for *block, copy_RD in zip(*(part.split(rows) for part in parts), strict=True):
        rows_step(adam, *block, None if same else copy_RD, unit, *numbers)
