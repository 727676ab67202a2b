"""What all command lines share: options, output, signals, memory, several processes.

Every command line imports this package before torch, so that the following happens first."""
import os
import signal
import sys
import time

if os.name == "nt":
    sys.exit("Windows is not supported, because its files and signals differ; use its Subsystem for Linux")
START = time.time()  # printed times include the imports, as a user's wait does

# By default, OpenMP threads that wait for each other spin, and starve a thread whose core another program is
# using: on two cores, one of them busy, forty steps took minutes. Sleeping after a short spin costs a few per
# cent on a free machine. OpenMP reads this when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# During the imports, Ctrl-C ends a program without a traceback; console.run changes that.
if sys.argv[0].endswith(("personalize.py", "train.py", "__main__.py", "bench.py", "pretrain.py")):
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # not if nohup ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
