"""Training: `fit`, a few steps in memory, and Trainer, the long loop with its schedule, moving average, log
and a checkpoint to resume from."""
import json
import math
import time
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.optim.adamw import adamw
from tqdm import tqdm

import world
from files.checkpoints import finite, read_tensors, write
from files.console import Stopped, UserError, deferred_stop
from files.parts import differences

SCALE = 2 ** 10
RISEN = 1.5  # a loss that is so many times what it was at the start


def backward(loss, parameters):
    """The gradients of `loss` in `parameters`, as loss.backward() makes them in float32. In between they are
    SCALE times as large, since float16, which ends at 6e-8, would round most of a picture's mean error away;
    the scale is a power of two, so nothing else changes."""
    (loss * SCALE).backward()
    torch._foreach_div_([p.grad for p in parameters if p.grad is not None], SCALE)


def fit(loss, parameters, steps, lr, around=nullcontext, callback=None, generator=None, states=8,
        draw=None):
    """Change `parameters`, a list of tensors that require gradients, or of groups of them, {"params":
    [tensors], "lr": a rate of their own}, by `steps` of Adam down the scalar loss().

    around() is a context for each loss and its backward: lambda: model.edited(edits made of the parameters).
    callback(step, loss) after every step. generator: what the losses' noise comes from. Given, the first
    noise is tried again at the end, with a warning where its loss is well above what it was; then the last of
    so many `states` in between of which that is not so is put back. draw() -> all tensors that change from
    step to step, in shapes that don't, for loss(*draw()): with it a GPU is given each step in one piece,
    `recorded`.
    """
    groups = parameters if isinstance(parameters[0], dict) else [{"params": parameters}]
    trained = [p for group in groups for p in group["params"]]
    # both moments and how many steps were made
    like = torch.zeros_like
    memory = {p: (like(p), like(p), torch.zeros((), device=p.device)) for p in trained}

    def step(*tensors):
        with torch.enable_grad(), around():
            value = loss(*tensors)
            backward(value, trained)
        with torch.no_grad():
            for group in groups:
                adam(group["params"], memory, group.get("lr", lr))
        return value.detach()
    if draw and trained[0].is_cuda:
        step = recorded(step)

    draw = draw or tuple
    kept, beginning = [], generator and generator.get_state()
    for i in range(steps):
        if generator and states and i % (steps // states + 1) == 0:
            kept.append([p.detach().clone() for p in trained])
        value = step(*draw())
        if i == 0:
            first = value.clone()  # a recorded step writes to the same place
        if callback:
            callback(i, value.item())  # on a GPU, to read it is to wait for it
    if not (generator and steps):
        return

    def risen():
        """What the first step's noise gives now, if that is well above what it gave then or no number."""
        now = generator.get_state()
        generator.set_state(beginning)
        with torch.no_grad(), around():
            value = loss(*draw())
        generator.set_state(now)
        return None if value <= RISEN * first else value
    if (last := risen()) is not None:
        so = ", so the last steps are not kept" if kept else ""
        warnings.warn(f"the loss rose from {first:.3g} to {last:.3g}{so}: a rate of {lr:g} is too high; a "
                      "tenth of it, or fewer steps, may do", stacklevel=3)
        for state in reversed(kept):
            torch._foreach_copy_([p.detach() for p in trained], state)
            if risen() is None:
                break


def adam(parameters, memory, lr):
    """A step of Adam down the parameters' gradients, which are gone afterwards. torch.optim's class would do
    the same, but imports a compiler first, a quarter of the time that a person on nano takes."""
    moved = [p for p in parameters if p.grad is not None]
    first, second, steps = map(list, zip(*(memory[p] for p in moved)))
    adamw(moved, [p.grad for p in moved], first, second, [], steps, fused=True, amsgrad=False, beta1=.9,
          beta2=.99, lr=lr, weight_decay=0., eps=1e-8, maximize=False)
    for p in moved:
        p.grad = None


def recorded(step, eager=3):
    """step(*tensors) -> tensor, on a GPU, as a CUDA graph: run as it is a few times, then recorded, and from
    then on replayed, which spares Python and thousands of launches, the most of a step's time. Whatever
    else the step reads and writes stays where it is in memory."""
    graph, aside, calls, given, result = torch.cuda.CUDAGraph(), torch.cuda.Stream(), 0, [], None

    def run(*tensors):
        nonlocal calls, given, result
        calls += 1
        if calls <= eager:  # on a stream of its own, as when it is recorded
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                result = step(*tensors)
            torch.cuda.current_stream().wait_stream(aside)
            return result
        if calls == eager + 1:
            given = [t.clone() for t in tensors]
            with torch.cuda.graph(graph):
                result = step(*given)
        torch._foreach_copy_(given, list(tensors))
        graph.replay()
        return result
    return run


@contextmanager
def seeded(seed):
    """Modules built inside start from this seed. Their initialisers draw from the global CPU generator, which
    is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class Trainer:
    """AdamW with warm-up and cosine decay, an exponential moving average, a log and a checkpoint that any
    later call resumes from.

    modules: dict of name -> nn.Module; parameters that require no gradient are left out. out: folder of
    log.jsonl and state.safetensors. deadline: when to stop, by time.time(), to be resumed. muon: matrices and
    convolutions' kernels, as matrices of a row per output, by Muon (Jordan et al.,
    kellerjordan.github.io/posts/muon). of: name -> what the run depends on beside its modules' shapes, such
    as the checksum of a frozen model. Iterate over it for the step numbers that remain; call `update(loss)`
    once in each; of several processes (world.py) each has its own loss, and their mean counts. UserError if
    the state is damaged or another run's, and then which of the above differs, or the loss is no number any
    more; Stopped, all saved, where a signal ended it.
    """

    def __init__(self, modules, out, steps, lr, warmup=100, ema=.999, betas=(.9, .99), weight_decay=.01,
                 deadline=math.inf, muon=False, of=None):
        self.out, self.steps, self.lr, self.warmup, self.decay = Path(out), steps, lr, warmup, ema
        self.deadline, self.of = deadline, {name: str(value) for name, value in (of or {}).items()}
        self.parameters = {f"{name}.{key}": p for name, module in modules.items()
                           for key, p in module.named_parameters() if p.requires_grad}
        self.ema = {key: p.detach().clone() for key, p in self.parameters.items()}
        self.step, self.mean, self.signal = 0, {}, 0
        self.device = next(iter(self.parameters.values())).device

        # kernels as matrices in the same memory, so that a step of Muon moves the parameters
        self.matrices = {key: p.detach().view(len(p), -1) for key, p in self.parameters.items()
                         if muon and p.dim() in (2, 4)}
        others = {key: p for key, p in self.parameters.items() if key not in self.matrices}
        adam = torch.optim.AdamW(others.values(), lr, betas, weight_decay=weight_decay, fused=True)
        self.optimizers = {adam: others}
        if self.matrices:
            of_matrices = torch.optim.Muon(self.matrices.values(), lr, weight_decay,
                                           adjust_lr_fn="match_rms_adamw")
            self.optimizers[of_matrices] = self.matrices

        # the optimisers' memory is made now, so that a state is read into what is there
        self.moments = {}
        for optimizer, trained in self.optimizers.items():
            names = ["momentum_buffer"] if trained is self.matrices else ["exp_avg", "exp_avg_sq"]
            for key, p in trained.items():
                optimizer.state[p] = {name: torch.zeros_like(p) for name in names}
                self.moments |= {f"{name}.{key}": t for name, t in optimizer.state[p].items()}
                optimizer.state[p]["step"] = torch.zeros((), device=p.device)
        self.out.mkdir(parents=True, exist_ok=True)
        if (self.out / "state.safetensors").exists():
            self._resume(self.out / "state.safetensors")

    def __iter__(self):
        saved = time.time()
        bar = tqdm(total=self.steps, initial=self.step, desc=self.out.name, mininterval=5,
                   disable=not world.first())
        with bar, deferred_stop() as stop:
            while not self.done and not self.ended(stop):
                yield self.step
                bar.update()
                bar.set_postfix({k: f"{v:.4f}" for k, v in self.mean.items()}, refresh=False)
                if time.time() - saved > 120:
                    self.save()
                    saved = time.time()
            self.save()
        if self.signal:
            where = f"stopped at step {self.step} of {self.steps}"
            raise Stopped(self.signal, f"{where}; the same command goes on")

    def ended(self, stop):
        """Whether the deadline or a signal has ended the training for one, and so for all processes."""
        self.signal = int(world.greatest(stop[0] if stop else 0, self.device))
        return self.signal or world.greatest(time.time() >= self.deadline, self.device)

    @property
    def done(self):
        return self.step >= self.steps

    def update(self, loss, **numbers):
        """One step down the gradient of `loss`; `numbers` are shown and logged with it, as running means."""
        backward(loss, self.parameters.values())
        loss = loss.detach().clone()
        world.average([loss, *(p.grad for p in self.parameters.values() if p.grad is not None)])
        if not loss.isfinite():
            raise UserError(f"the loss is {loss.item()} at step {self.step}: the learning rate {self.lr:g} "
                            "is too high, or the data or the start hold such numbers")
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for key, matrix in self.matrices.items():
            matrix.grad = self.parameters[key].grad.flatten(1)

        # warm-up, then a cosine down to nothing
        cosine = .5 + .5 * math.cos(math.pi * self.step / self.steps)
        lr = self.lr * min(1, (self.step + 1) / self.warmup) * cosine
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        for p in self.parameters.values():
            p.grad = None

        # the average is of few steps at first, as the start is nothing worth keeping
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_([*self.ema.values()], [p.detach() for p in self.parameters.values()], 1 - decay)

        self.step += 1
        for key, value in {"loss": loss, **numbers}.items():
            value = float(value.detach() if torch.is_tensor(value) else value)
            self.mean[key] = self.mean.get(key, value) + .02 * (value - self.mean.get(key, value))
        if self.step % 50 == 0:
            self.log(lr=lr, **self.mean)

    def log(self, **numbers):
        """Add a line with these numbers to log.jsonl."""
        if not world.first():
            return
        line = {"step": self.step, "time": round(time.time()), **{k: round(v, 6) for k, v in numbers.items()}}
        with open(self.out / "log.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")

    def tensors(self):
        """All that changes from step to step, under its names in state.safetensors."""
        now = {f"now.{key}": p.detach() for key, p in self.parameters.items()}
        return now | {f"ema.{key}": t for key, t in self.ema.items()} | self.moments

    def save(self):
        """Write state.safetensors."""
        if not world.first():
            return
        note = {"step": str(self.step), "of": json.dumps(self.of)}
        write(self.tensors(), self.out / "state.safetensors", note)

    def _resume(self, file):
        try:
            found, note = read_tensors(file)
            self.step, of = int(note["step"]), note.get("of", "")
            of = dict(json.loads(of)) if of.startswith("{") else {"run": of}
            if not 0 <= self.step <= self.steps:
                raise ValueError(f"at step {note['step'][:20]} of {self.steps}")
            if bad := [key for key, t in found.items() if not finite(t)]:
                raise ValueError(f"{bad[0]} holds NaN or infinite numbers")
        except (UserError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{file}: damaged ({error}); remove it to begin again") from None
        ours = self.tensors()
        differ = differences(of, self.of)
        kinds, expected = ({k: (t.shape, t.dtype) for k, t in some.items()} for some in (found, ours))
        if kinds != expected:
            differ.append("with other modules")
        if differ:
            raise UserError(f"{file}: of another run ({'; '.join(differ)}); remove it, or train in another "
                            "folder")
        for key, t in ours.items():
            t.copy_(found[key])
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                state["step"].fill_(self.step)

    def average(self):
        """Put the moving average into the modules in place of the current weights."""
        with torch.no_grad():
            for key, p in self.parameters.items():
                p.copy_(self.ema[key])


class Pool:
    """Rows of several tensors to draw training samples from. Each follows from its number alone, so a
    training that goes on draws what it would have drawn anyway: make(n) -> the tensors of row n, called when
    it is first drawn. There are `first` rows, `fresh` more at every step; the last `size` are drawn from."""

    def __init__(self, make, first, fresh, size):
        self.make, self.first, self.fresh, self.size, self.rows = make, first, fresh, size, {}

    def draw(self, step, count, generator):
        """The numbers (count,) of some of the rows that there are at this step."""
        end = self.first + step * self.fresh
        return torch.randint(max(0, end - self.size), end, (count,), generator=generator)

    def __getitem__(self, numbers):
        """The rows with these numbers, a batch of each tensor."""
        numbers = numbers.tolist()
        for n in numbers:
            if n not in self.rows:
                self.rows[n] = self.make(n)
        found = [self.rows[n] for n in numbers]
        while len(self.rows) > self.size:  # those that were made first
            del self.rows[next(iter(self.rows))]
        return [torch.stack(column) for column in zip(*found)]
