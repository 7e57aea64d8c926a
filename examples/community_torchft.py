"""Two clusters that trust each other train one model with torchft's DiLoCo; a group that dies comes back.

    torchft_lighthouse --min_replicas 1 --join_timeout_ms 2000 --bind '[::]:29510' &
    export TORCHFT_LIGHTHOUSE=http://localhost:29510
    python examples/community_torchft.py --group 0 --output-dir runs/group-0 &
    python examples/community_torchft.py --group 1 --output-dir runs/group-1

Each group is a process here; groups of several are torchft's own documentation's. Every `--sync-steps` steps the groups
join what they learnt. torchft calls its DiLoCo experimental, and its traffic is open: no TLS, no keys, and a checkpoint
from a peer is unpickled. For machines that trust each other, inside a private network only. Extra `torchft`.
"""

import argparse
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from fanformer.community.updates import weights_checksum
from fanformer.data.packing import rows_of_run
from fanformer.training.configuration import parse_setting, resolve
from fanformer.training.run import opened
from fanformer.training.state import model_tensors


def manager_of(group: int, store: Any, state: dict[str, Any]) -> Any:
    """Return torchft's manager of a replica group of one process, whose store lives as long as the caller keeps it."""
    from torchft import Manager, ProcessGroupGloo

    def load(saved: dict[str, Any]) -> None:
        for name, part in state.items():
            part.load_state_dict(saved[name])

    return Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=20)),
        load_state_dict=load,
        state_dict=lambda: {name: part.state_dict() for name, part in state.items()},
        min_replica_size=1,
        use_async_quorum=False,  # which DiLoCo needs
        replica_id=f"group_{group}",
        rank=0,
        world_size=1,
        store_addr="localhost",
        store_port=store.port,
        timeout=timedelta(seconds=20),
        quorum_timeout=timedelta(seconds=60),
    )


def train(asked: argparse.Namespace) -> None:
    """Train this group's share, in step with the others every so many steps."""
    from torch.distributed import TCPStore
    from torchft.local_sgd import DiLoCo

    overrides = {"data": asked.data, "output_dir": str(asked.output_dir), "overwrite": True, "compile": "off"}
    config = resolve("nano", overrides=overrides | dict(map(parse_setting, asked.set)))
    with opened(config) as run:
        model = run.model.to(run.environment.device)
        run.corpus.loss.install(model, None)
        inner = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=config.optimizer.weight_decay)
        outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        manager = manager_of(asked.group, store, {"model": model, "inner": inner})
        rows, size = run.corpus.rows, config.batch.batch_size
        with DiLoCo(manager, [model], inner, outer, sync_every=asked.sync_steps):
            while manager.current_step() < asked.syncs:
                began = time.monotonic()
                for step in range(asked.sync_steps):
                    place = ((manager.current_step() * asked.sync_steps + step) * asked.groups + asked.group) * size
                    numbers = rows_of_run(config.seed, torch.arange(place, place + size).numpy(), len(rows))
                    batch = rows.batch(numbers.tolist())
                    given = {"shift_labels": batch["labels"], "num_items_in_batch": run.corpus.loss.count(batch)}
                    loss = model(**batch, **given, use_cache=False).loss
                    loss.backward()
                    inner.step()
                    inner.zero_grad()
                seconds = time.monotonic() - began
                told = f"sync {manager.current_step()} groups {manager.num_participants()} loss {loss.item():.4f}"
                print(f"{told} in {seconds:.1f} s, weights {weights_checksum(model_tensors(model))[:16]}", flush=True)
        model.save_pretrained(asked.output_dir / "model")
        run.corpus.tokenizer.save_pretrained(asked.output_dir / "model")
        manager.shutdown()


def main() -> int:
    """Train as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", type=int, required=True, help="number of this replica group, from 0")
    parser.add_argument("--groups", type=int, default=2, help="replica groups in all; rows are shared out among them")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--sync-steps", type=int, default=20, help="steps between two syncs")
    parser.add_argument("--syncs", type=int, default=20, help="in all")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="fields of the run")
    train(parser.parse_args())
    return 0


if __name__ == "__main__":
    sys.exit(main())
