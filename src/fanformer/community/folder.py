"""The names of what lies in the folder of a run in rounds, on the host's machine.

community.json  the plan of the rounds and the run's identifier
public-key.pem  of the key that signs accepted rounds
checkpoint-N/   accepted round N, a `transformers` folder, signed (`release.py`), with the host's state in it
metrics.jsonl   a line for every accepted round, whose number is its `step`
status.json     what people are told of the run (`status.py`)
rounds.jsonl, open.json, reports/   of the rounds themselves (`rounds.py`)
keys/           private: the signing key, the certificate and its key
flower/         Flower's own
All else is as of any training (`training/folder.py`); the model of the newest round lies in the folder itself too.
"""

from fanformer.community.identity import PUBLIC_KEY
from fanformer.training.folder import LOCK_FILE, METRICS_FILE, ROUNDS_FILE, RUN_FILE
from fanformer.training.publishing import CURVE_FILE

STATUS_FILE, RECORDS_FILE, OPEN_FILE = "status.json", "rounds.jsonl", "open.json"
KEYS_FOLDER, REPORTS_FOLDER, FLOWER_FOLDER = "keys", "reports", "flower"
HOST_LOCK_FILE = ".host.lock"
BESIDE_THE_MODEL = frozenset(
    (
        ROUNDS_FILE, STATUS_FILE, RECORDS_FILE, OPEN_FILE, HOST_LOCK_FILE, PUBLIC_KEY, LOCK_FILE, METRICS_FILE,
        RUN_FILE, CURVE_FILE,
    )
)  # fmt: skip
"""Files of the folder that no round has signed: they change with every round, and no model is loaded from them."""
