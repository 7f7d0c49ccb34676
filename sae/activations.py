"""Hookpoints of an LLM: find one, run the model as far as it, stream what comes out, put something in.

Dims: B contexts, T tokens, N rows (tokens of many contexts), D the hookpoint's width.
"""

import difflib
import functools
import math
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from sae import InputError


class _Reached(Exception):
    """Raised by a hook to end the forward pass at the hookpoint: the layers behind it are never run."""


def find_hookpoint(model, template, layer):
    """The module at `template` ("model.layers.{}.mlp") of `layer`, with its full name.

    Raises InputError for a layer the model has not (naming the range) and for a name that matches no
    module (naming the closest).
    """
    count = model.config.get_text_config().num_hidden_layers
    if not 0 <= layer < count:
        raise InputError(f"layer_id needed: 0 to {count - 1} ({model.config.model_type}), got {layer}")
    try:
        name = template.format(layer)
    except (IndexError, KeyError, ValueError):
        raise InputError(f"hookpoint needed with one {{}} for the layer, got {template!r}") from None
    modules = dict(model.named_modules())
    if ".experts." in name:
        raise InputError(f"hookpoint needed that sees all tokens, {name!r} is inside experts")
    if name not in modules:
        close = difflib.get_close_matches(name, modules, n=3, cutoff=0.0)
        raise InputError(f"hookpoint needed: {name!r} is no module of the model; closest: {', '.join(close)}")
    return modules[name], name


@contextmanager
def on_output(module, shape, hook):
    """Within: `hook(output)` runs whenever `module` has; a value it returns takes the output's place.

    Only the first element is handed over, and replaced, where the module returns a tuple (attention does);
    always as [*shape, D], shape = (B, T): some models flatten contexts and tokens before (OPT does). Passes
    of other threads are left alone: one fills the buffer while a checkpoint is being judged.
    """
    thread = threading.get_ident()

    def forward_hook(_module, _inputs, output):
        if threading.get_ident() != thread:
            return None
        first, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        came = list(getattr(first, "shape", ())) or type(first).__name__
        if isinstance(came, str) or math.prod(came[:-1]) != math.prod(shape):
            raise InputError(f"hookpoint needed with a row for each of {list(shape)} tokens, this has {came}")
        new = hook(first.reshape(*shape, first.shape[-1]))
        if new is None:
            return None
        return new.view_as(first) if rest is None else (new.view_as(first), *rest)

    handle = module.register_forward_hook(forward_hook)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def activations_at(model, module, ids_BT, **inputs):
    """The module's output on a batch of token ids: [B, T, D]. The pass stops there."""
    seen = []

    def stop(output):
        seen.append(output)
        raise _Reached

    with on_output(module, ids_BT.shape, stop):
        try:
            model(input_ids=ids_BT.to(model.device, non_blocking=True), use_cache=False, **inputs)
        except _Reached:
            return seen[0]
    raise InputError("hookpoint needed: the model never runs this module")


def activation_width(model, module):
    """D, read off a pass over one token; the model may be a `models.skeleton` without weights."""
    with model.device:
        token, seen = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1)
        try:
            return activations_at(model, module, token, attention_mask=seen).shape[-1]
        except RuntimeError as err:  # code that looks at values, for instance
            raise InputError(f"a model that runs without weights needed, to know the width: {err}") from err


def activation_rows(model, module, batches, skip_positions=0):
    """Stream the activations of contexts: ids [B, T] in, rows [B * (T - skip_positions), D] out."""
    for ids_BT in batches:
        acts_BTD = activations_at(model, module, ids_BT)
        yield acts_BTD[:, skip_positions:].flatten(0, 1)


def prefetch(items, depth=2):
    """The same items in the same order, made up to `depth` ahead in a thread: two devices work at once."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, iterator, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, iterator, end))
            yield item


def carried(chunks, device):
    """The same chunks on another device, made and copied ahead, so that two devices work at once.

    To a GPU they are copied on streams of their own, from the CPU out of pinned memory: a copy waits for no
    other work of the two models, and they wait for no later copy.
    """
    side = functools.cache(lambda one: torch.cuda.Stream(one) if one.type == "cuda" else None)

    def copy(chunk):
        """The chunk there, and the event from which on it is; None: it is."""
        if device.type != "cuda":
            return chunk.to(device), None
        source, sink = side(chunk.device), side(device)
        if source is None:
            chunk = chunk.pin_memory()
        else:
            source.wait_stream(torch.cuda.current_stream(chunk.device))
            chunk.record_stream(source)  # its memory is in use until then
        with torch.cuda.stream(source), torch.cuda.stream(sink):
            return chunk.to(device, non_blocking=True), sink.record_event()

    used = deque()
    for chunk, there in prefetch(map(copy, chunks)):
        if there:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(there)
            chunk.record_stream(stream)
        yield chunk
        if there:
            used.append(stream.record_event())
            if len(used) > 2:  # else what a fast LLM makes would fill the memory of a slow reader
                used.popleft().synchronize()
