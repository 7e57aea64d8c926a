"""Train several runs one after the other in processes that a launcher started: python -m tests.training.several_runs.

The argument is a JSON file with a list of run configurations; each run's folder says how it is spread.
"""

import json
import sys
from pathlib import Path

from fanformer.training.fields import RunConfig
from fanformer.training.run import train
from tests.training.conftest import Notebook

if __name__ == "__main__":
    for fields in json.loads(Path(sys.argv[1]).read_text()):
        train(RunConfig.from_fields(fields), Notebook())
