"""Take entries of the ledger over from a folder of older single files, in place of those of the same names.

    python benchmarks/import_results.py FOLDER [LEDGER]

FOLDER holds a .json file for each entry, in folders of any depth; LEDGER is benchmarks/results unless it is given. An
entry that differs in its command alone stays as it is in LEDGER: programs have moved since.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from fanformer.comparison.ledger import parse_entry, read_ledger, write_entry
from fanformer.errors import FANformerError


def main() -> int:
    """Read the files, check them all, and write what they hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("ledger", type=Path, metavar="LEDGER", nargs="?", default=Path(__file__).parent / "results")
    given = parser.parse_args()
    try:
        paths = sorted(given.folder.rglob("*.json"))
        entries = [parse_entry(json.loads(path.read_text(encoding="utf-8")), str(path)) for path in paths]
        apart = given.ledger.is_dir() and given.ledger.resolve() != given.folder.resolve()
        known = read_ledger(given.ledger) if apart else []
        old = {entry.name: replace(entry, command="") for entry in known}
        entries = [entry for entry in entries if old.get(entry.name) != replace(entry, command="")]
        for several in ([one for one in entries if (one.kind == "training") is kind] for kind in (True, False)):
            if several:
                print(f"{len(several)} entries taken over into {write_entry(given.ledger, *several)}")
    except (FANformerError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
