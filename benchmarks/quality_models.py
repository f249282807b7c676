"""train_pt.py for the rows of quality.py: the same script, with architectures that are on trial.

python3 benchmarks/quality_models.py --config CONFIG ...     # every flag of train_pt.py
"""

from harness import ROOT  # noqa: F401  (puts the repository on the path)

import train_pt
from algpt2.errors import run_script

if __name__ == "__main__":
    run_script(train_pt.main)
