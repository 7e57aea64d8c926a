"""The machine: devices, threads, compiled code, processes, and what versions a run ran on."""
