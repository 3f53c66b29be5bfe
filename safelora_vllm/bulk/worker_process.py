"""A process that projects adapters: ``python -m safelora_vllm.bulk.worker_process FD``.

A socket brings the job and then adapters, one a line, and takes the answers. The process ends with it.
"""

from __future__ import annotations

import json
import logging
import signal
import socket
import sys

import torch

from safelora_vllm.bulk.job import Worker
from safelora_vllm.bulk.messages import READY, answer, ending, job_of, line
from safelora_vllm.errors import SafeLoRAError


def main(descriptor: int) -> None:
    """Answer until the other side closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this process ends it
    quiet()
    with socket.socket(fileno=descriptor) as channel, channel.makefile("rwb") as stream:
        try:
            worker = Worker(job_of(json.loads(stream.readline())))
        except SafeLoRAError as error:
            stream.write(line(ending(error)))
            return
        stream.write(line(READY))
        stream.flush()
        for text in stream:
            stream.write(line(answer(worker, json.loads(text))))
            stream.flush()


def quiet() -> None:
    """One thread, since there are other processes; and no log lines, since the catalogue has the answers."""
    torch.set_num_threads(1)
    logging.getLogger("vllm.safelora.gate").setLevel(logging.ERROR)


if __name__ == "__main__":
    main(int(sys.argv[1]))
