"""What all command lines share: options, what they print, signals, several processes.

Every command line imports from here before it imports torch, so that this happens first:"""
import os
import signal
import sys
import time

if os.name == "nt":
    sys.exit("Windows is not supported, whose files and signals are others; use its Subsystem for Linux")
START = time.time()  # what is printed as time should be what a user waits

# Threads that wait for one another spin by default, which starves the one whose core another program is using
# (on two cores, one of them busy, forty steps took minutes). To sleep after a short spin costs a few per cent
# on a free machine. OpenMP reads this as torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# Ctrl-C ends a program that is still importing without a traceback; console.run takes it over.
if sys.argv[0].endswith(("personalize.py", "train.py", "__main__.py", "bench.py", "pretrain.py")):
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # not where nohup ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
