"""Train HiBio: ``python train.py --config FILE [--set a.b=value ...] [--resume DIR]``.

The same as ``hibio train``: load the configuration, write the resolved one, build each job's parts,
fit, close. Several processes: ``torchrun --nproc_per_node N train.py ...``, or
``deepspeed train.py ...``; see ``configs/slurm/train.sbatch`` for several machines.
"""

import sys

from hibio.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
