"""LMCache's server on a folder, without a GPU: chunks go in, the server is killed, another gives them back."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
from conftest import drawn, identity

import lexico

torch = pytest.importorskip("torch", reason="torch is not installed")
try:
    import lmcache.cli.main  # noqa: F401 what the server needs
    from lmcache.sdk.context import LMCacheSDKContext
    from lmcache.sdk.wrapper import ContiguousTransferWrapper
    from lmcache.v1.gpu_connector.utils import LayoutHints
    from lmcache.v1.multiprocess.transfer_context.worker_transfer import create_transfer_context

    import lexico.lmcache
except ImportError as error:
    pytest.skip(f"LMCache is not installed, or lacks something: {error}", allow_module_level=True)

LAYERS, HEADS, M, CHUNK, BLOCK = 3, 2, 16, 256, 16
MODEL = identity(layers=LAYERS, kv_heads=HEADS, head_dim=M)


class Client(LMCacheSDKContext):
    """The client of LMCache's own SDK, which would ask an engine at the server for the shape of the model's cache."""

    def register_caches(self):
        self._world_size = self._num_kv_readers = 1
        shape = (1, 2, HEADS, BLOCK, M)
        caches = {f"layer.{layer}": torch.zeros(shape, dtype=torch.bfloat16) for layer in range(LAYERS)}
        context = create_transfer_context(
            caches, instance_id=self.instance_id, req_client=self._req_client, mode="engine_driven"
        )
        hints = LayoutHints(kv_layout="HND", num_kv_heads=HEADS, tokens_per_block=BLOCK, head_dim=M)
        context.register(caches, self._model_name, 1, CHUNK // BLOCK, self._mq_timeout, layout_hints=hints)
        self._kv_caches = caches
        self._transfer_ctx = ContiguousTransferWrapper(context.engine_driven_context, CHUNK)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def served(folder, dictionary, log):
    port, http = free_port(), free_port()
    adapter = f'{{"type": "fs", "base_path": "{folder}", "serde": {{"type": "lexico", "dictionary": "{dictionary}", "sparsity": 6}}}}'
    command = [sys.executable, "-m", "lexico.lmcache", "server", "--port", str(port), "--http-port", str(http)]
    settings = ["--chunk-size", str(CHUNK), "--l1-size-gb", "0.25", "--eviction-policy", "LRU", "--l2-adapter", adapter]
    environment = os.environ | {"DO_NOT_TRACK": "1", "LMCACHE_TRACK_USAGE": "false"}
    with open(log, "ab") as out:
        mode = ["--supported-transfer-mode", "engine_driven"]
        server = subprocess.Popen(
            command + settings + mode, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    try:
        for _ in range(1200):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{http}/config", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)
        else:
            pytest.fail(f"the server does not answer: {log.read_text()[-3000:]}")
        client = Client(f"tcp://127.0.0.1:{port}", f"http://127.0.0.1:{http}", "model")
        client.register_caches()
        yield client
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_chunks_outlive_a_server_that_is_killed(tmp_path):
    dictionary, folder, log = tmp_path / "dictionary.safetensors", tmp_path / "chunks", tmp_path / "log"
    folder.mkdir()
    drawn(np.random.default_rng(0), MODEL).save(dictionary)
    drawn_chunks = torch.randn((2, LAYERS, 2 * CHUNK, HEADS * M), generator=torch.Generator().manual_seed(0))
    chunks, tokens = drawn_chunks.to(torch.bfloat16), list(range(2 * CHUNK))
    with served(folder, dictionary, log) as client:
        assert client.store(chunks, tokens)
        for _ in range(600):
            # Files have other names until they are whole.
            files = list(folder.rglob("*.data"))
            if len(files) >= 2:
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"no chunks were stored: {log.read_text()[-3000:]}")
    stored = sum(path.stat().st_size for path in files)
    assert stored < 0.4 * 2 * chunks.numel(), [path.name for path in files]

    own = lexico.lmcache._Chunks(str(dictionary), 6)
    expected = []
    for number in range(2):
        chunk = chunks[:, :, number * CHUNK : (number + 1) * CHUNK].float().numpy()
        vectors = chunk.reshape(2, LAYERS, CHUNK, HEADS, M).swapaxes(2, 3)
        first = own.first_position(vectors[0])
        layers = lexico.LayerCache.for_layers(own.dictionaries, own.options, first_position=first)
        out = np.empty_like(vectors)
        for layer, cache in enumerate(layers):
            cache.append(vectors[0, layer], vectors[1, layer])
            out[0, layer], out[1, layer] = cache.decode()
        expected.append(out.swapaxes(2, 3).reshape(chunk.shape))
    expected = torch.from_numpy(np.concatenate(expected, 2)).to(torch.bfloat16)
    with served(folder, dictionary, log) as client:
        assert (client.retrieve(tokens) == expected).all()
        assert client.retrieve([token + 1 for token in tokens]) is None

    # Where one chunk is damaged all that were asked for with it are a miss, and so are chunks over other dictionaries.
    damaged = bytearray(files[0].read_bytes())
    damaged[len(damaged) // 3] ^= 1
    whole = files[0].read_bytes()
    files[0].write_bytes(damaged)
    with served(folder, dictionary, log) as client:
        assert client.retrieve(tokens) is None
    files[0].write_bytes(whole)
    drawn(np.random.default_rng(1), MODEL).save(dictionary)
    with served(folder, dictionary, log) as client:
        assert client.retrieve(tokens) is None
