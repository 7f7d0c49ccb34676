"""A Python that has imported what takes seconds, and runs each script asked for in a process forked off it.

Asked on standard input, a line of JSON each: the words after `python`, the working folder, the environment,
the files for standard output and error, and the seconds until SIGALRM. Answers with the exit status, as
subprocess has it.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys

HEAVY = (
    "datasets", "elasticsearch", "matplotlib.backends.backend_agg", "matplotlib.pyplot", "torch",
    "transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama",
)  # fmt: skip


def become(words, folder, env, out, err, seconds):
    """Of the forked process: what a fresh one would be given, then the script."""
    signal.alarm(seconds)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for number, name in enumerate((os.devnull, out, err)):
        handle = os.open(name, os.O_RDWR | os.O_CREAT)
        os.dup2(handle, number)
        os.close(handle)
    module = words[0] == "-m"
    sys.argv[:] = words[module:]
    sys.path[0] = folder if module else os.path.dirname(words[0])
    if module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


for name in HEAVY:
    importlib.import_module(name)
gc.freeze()
for line in sys.stdin:
    if not (child := os.fork()):
        become(*json.loads(line))
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
