"""Kills a run at random moments, twenty times, and compares its losses with those of a run left alone.

    python tests/train/soak.py --kills 20

Kills come at any moment: while compiling, in a step, while a checkpoint is written. Half of them are SIGKILL, half SIGTERM.
Ends with status 1 when a single bit differs.
"""

import argparse
import pathlib
import random
import signal
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import processes

CONFIG = '''
import optax
from odjax.models import decoder
from odjax_train import Experiment, language_model
from odjax_train.data import Text

def experiment(steps: int = 200) -> Experiment:
    """A small model."""
    return Experiment(
        model=decoder("tiny", max_length=64), task=language_model(), data=Text(source="text:{text}", length=64),
        optimizer=optax.adam(1e-3), steps=steps, batch=16, ema=0.9, eval_every=25, eval_batches=1,
        checkpoint_every=5, log_every=1,
    )
'''


def main() -> int:
    """Runs the soak; 0 when all losses are the same bits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        text = root / "text.txt"
        text.write_text("".join(f"line {i}: {i * i % 97} {'ab' * (i % 7)}\n" for i in range(1500)))
        config = root / "soak.py"
        config.write_text(CONFIG.format(text=text))
        start = time.monotonic()
        status, output = processes.run("train", config, "--run", root / "whole", "--steps", options.steps)
        assert status == 0, output
        whole = time.monotonic() - start
        kills = {signal.SIGKILL: 0, signal.SIGTERM: 0}
        ends = 0
        while sum(kills.values()) < options.kills:
            process = processes.start("train", config, "--run", root / "killed", "--steps", options.steps)
            time.sleep(draw.uniform(0.1, 1.0) * min(whole, 12))
            if process.poll() is None:
                number = draw.choice(list(kills))
                kills[number] += 1
                process.send_signal(number)
            status, output = processes.finish(process)
            assert status in (0, processes.RESUMABLE, -signal.SIGKILL, -signal.SIGTERM), output
            if status == 0:
                # It was faster than we were: begin another one.
                ends += 1
                reference, found = processes.losses(root / "whole"), processes.losses(root / "killed")
                if reference != found:
                    break
                (root / "killed").rename(root / f"killed-{ends}")
        else:
            status, output = processes.run(
                "train", config, "--run", root / "killed", "--steps", options.steps
            )
            assert status == 0, output
        reference, found = processes.losses(root / "whole"), processes.losses(root / "killed")
        differing = [step for step in reference if found.get(step) != reference[step]]
        shown = ", ".join(f"{count} {number.name}" for number, count in kills.items())
        print(f"{shown}; {len(reference)} steps; losses that differ: {differing or 'none'}")
        return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
