"""A command of ailurus-hf as several processes, as launchers start them, from one that has imported what they need.

`Ranks` starts this file as a program, which forks for each process: that takes a fraction of the time of an import.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Ended(NamedTuple):
    code: int
    out: str
    err: str


class Ranks:
    """Call it with a command's arguments.

    die: from a rank to the number of images after which it kills itself; the others wait for that with their first.
    environments: of each process; by default what torchrun sets. MADE_MACHINE: what it takes for its machine;
        MORE_ARGUMENTS: of this one alone.
    """

    def __enter__(self) -> "Ranks":
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def __call__(self, *argv: str, size: int = 2, die: dict | None = None, environments: list | None = None) -> list:
        environments = environments or [{"RANK": str(rank), "WORLD_SIZE": str(size)} for rank in range(size)]
        json.dump([argv, environments, {str(k): v for k, v in (die or {}).items()}, os.getcwd()], self.process.stdin)
        print(file=self.process.stdin, flush=True)
        return [Ended(*each) for each in json.loads(self.process.stdout.readline())]


def serve() -> None:
    # Imported once for all.
    import transformers  # noqa: F401

    import ailurus_hf.cli.comparing
    import ailurus_hf.evaluation.boxes
    import ailurus_hf.evaluation.comparison
    import ailurus_hf.evaluation.loading
    import ailurus_hf.segmenter  # noqa: F401

    for line in sys.stdin:
        argv, environments, die, folder = json.loads(line)
        os.chdir(folder)
        with tempfile.TemporaryDirectory() as logs:
            after = [die.get(str(rank), -1 if die else None) for rank in range(len(environments))]
            pids = [fork(argv, env, after[rank], f"{logs}/{rank}") for rank, env in enumerate(environments)]
            codes = {}
            while len(codes) < len(pids):  # each at once: a process that nobody waited for looks alive
                pid, status = os.wait()
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid] < 0:
                    Path(logs, "dead").touch()
            ended = [
                [codes[pid], Path(f"{logs}/{rank}.out").read_text(), Path(f"{logs}/{rank}.err").read_text()]
                for rank, pid in enumerate(pids)
            ]
        print(json.dumps(ended), flush=True)


def fork(argv: list[str], env: dict[str, str], die_after: int | None, log: str) -> int:
    if pid := os.fork():
        return pid
    for stream, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{kind}", os.O_WRONLY | os.O_CREAT), stream)
    os.environ.update(env)
    from ailurus_hf.cli import main, shared_work
    from ailurus_hf.evaluation import paired

    timed, calls = paired.timed, iter(range(10**6))

    def timed_until(*args: object) -> object:
        if next(calls) == die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        while die_after == -1 and not Path(log).with_name("dead").exists():
            time.sleep(0.01)
        return timed(*args)

    paired.timed = timed_until
    if machine := env.get("MADE_MACHINE"):
        shared_work._machine = lambda: machine
    try:
        code = main([*argv, *env.get("MORE_ARGUMENTS", "").split()])
    except SystemExit as exit:
        code = exit.code
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
