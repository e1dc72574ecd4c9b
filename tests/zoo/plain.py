"""Transformers without lightsft: loads exported checkpoints and computes their logits, in processes of its own.

    with plain_transformers() as plain_logits:
        plain_logits(folder, "AutoModelForCausalLM", inputs)

The server is started once, makes lightsft unimportable, imports transformers, and forks a child for every request. A
request is one line of JSON on a socket; tensors travel in files beside the checkpoint. It ends with its parent.
"""

import contextlib
import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

SECONDS = 300  # of one request
ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def plain_transformers(model_classes=()):
    """A function (folder, auto class, inputs) -> logits; the modules of `model_classes` are imported once for all."""
    with tempfile.TemporaryDirectory() as folder:
        address = str(Path(folder) / "socket")
        command = [sys.executable, "-m", __name__, address, *sorted(set(model_classes))]
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            if not server.stdout.readline():
                raise RuntimeError("the process with plain transformers did not start")
            yield PlainLogits(address)
        finally:
            server.kill()
            server.wait()
            server.stdout.close()


class PlainLogits:
    """The client's side."""

    def __init__(self, address):
        self.address = address

    def __call__(self, folder, auto_class, inputs):
        import torch

        torch.save(inputs, folder / "zoo-inputs.pt")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self.address)
            connection.sendall(json.dumps([str(folder), auto_class]).encode() + b"\n")
            answer = connection.makefile().readline()
        if answer.strip() != "done":
            raise RuntimeError(f"plain transformers cannot use the checkpoint: {answer.strip() or 'its process died'}")
        return torch.load(folder / "zoo-logits.pt")


# ---- the server's side


class _Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    parent = os.getppid()

    def service_actions(self):
        super().service_actions()
        if os.getppid() != self.parent:
            sys.exit()


class _Handler(socketserver.StreamRequestHandler):
    def handle(self):
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            _compute(*json.loads(self.rfile.readline()))
            answer = "done"
        except Exception as error:
            answer = f"{type(error).__name__}: {error}".replace("\n", " ")[:800]
        self.wfile.write(answer.encode() + b"\n")


def _compute(folder, auto_class):
    import torch
    import transformers

    from tests.zoo.models_and_inputs import logits

    kind, config = getattr(transformers, auto_class), transformers.AutoConfig.from_pretrained(folder)
    if type(config) not in kind._model_mapping:  # saved with the configuration of its text part alone
        kind = getattr(transformers, config.architectures[0])
    model = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    for parameter in model.parameters():  # mapped from the file, some lie where torch's kernels round differently
        parameter.data = parameter.data.clone()
    torch.save(logits(model, torch.load(Path(folder) / "zoo-inputs.pt")), Path(folder) / "zoo-logits.pt")


def _serve(address, model_classes):
    sys.modules["lightsft"] = sys.modules["lightsft_adapters"] = None
    from tests.zoo.warm import import_models

    warnings.simplefilter("ignore")
    import_models(model_classes)
    with _Server(address, _Handler) as server:
        print("ready", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2:])
