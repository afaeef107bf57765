"""Pursuit and decode attention on one NVIDIA GPU: ours beside PyTorch's, in one run.

    pip install torch
    python crates/lexico/benches/gpu/compare.py

Pursuit is compared with the reference algorithm: batched orthogonal matching pursuit by an inverse Cholesky factor over the Gram
matrix (Lubonja, Kallel, Zhang 2022, "v0"), in batches of whatever size is fastest, its products with TF32 where that is faster. Attention is compared with the fastest of
PyTorch's kernels in bfloat16, for queries grouped by KV head and not, and with flash-decoding where flash-attn is installed.
Figures are medians; ratios are of the same run. PyTorch's attention is timed as a graph on the GPU alone; ours from the processor, with all that it
takes to start: at short contexts the comparison is hard on ours. What fits the GPU's second cache (50 MB on an H200: a batch of 1 up to
about 8,192 positions) stays there for both. Needs PyTorch 2.5 or newer. `--cpu` checks the reference algorithm against numpy's least squares and ends.
"""

import argparse
import json
import statistics
import subprocess
import sys

import torch


def pursuit(dictionary, gram, vectors, sparsity):
    """Supports and coefficients [n, s] of vectors [n, m] over unit atoms [N, m]."""
    count, device = vectors.shape[0], vectors.device
    projections = vectors @ dictionary.T
    basis = torch.empty(count, sparsity, dictionary.shape[0], device=device)
    factor = torch.zeros(count, sparsity, sparsity, device=device)
    along = torch.zeros(count, sparsity, device=device)
    support = torch.zeros(count, sparsity, dtype=torch.int64, device=device)
    rows = torch.arange(count, device=device)
    for k in range(sparsity):
        chosen = projections.abs().argmax(1)
        support[:, k] = chosen
        if k == 0:
            scale = torch.ones(count, 1, device=device)
            basis[:, 0] = gram[chosen]
        else:
            overlap = basis[rows, :k, chosen]
            # What is left of an atom that lies among those before it is rounding.
            scale = (1 - overlap.square().sum(1, keepdim=True)).clamp_min(1e-7).rsqrt()
            overlap = overlap * -scale
            basis[:, k] = torch.bmm(overlap[:, None], basis[:, :k])[:, 0] + scale * gram[chosen]
            factor[:, k, :k] = torch.bmm(overlap[:, None], factor[:, :k, :k])[:, 0]
        factor[:, k, k] = scale[:, 0]
        along[:, k] = scale[:, 0] * projections[rows, chosen]
        projections -= along[:, k, None] * basis[:, k]
    return support, torch.bmm(along[:, None], factor)[:, 0]


def relative_error(dictionary, vectors, support, coefficients):
    found = torch.bmm(coefficients[:, None], dictionary[support])[:, 0]
    return ((vectors - found).norm(dim=1) / vectors.norm(dim=1)).mean().item()


def check_on_cpu():
    import numpy

    torch.manual_seed(0)
    dictionary = torch.nn.functional.normalize(torch.randn(96, 24), dim=1)
    vectors = torch.randn(50, 24)
    support, coefficients = pursuit(dictionary, dictionary @ dictionary.T, vectors, 6)
    for v in range(50):
        atoms = dictionary[support[v]].T.numpy()
        wanted = numpy.linalg.lstsq(atoms, vectors[v].numpy(), rcond=None)[0]
        assert numpy.allclose(wanted, coefficients[v].numpy(), atol=1e-3), (v, wanted, coefficients[v])
        rest = vectors[v] - dictionary[support[v][:5]].T @ torch.linalg.lstsq(
            dictionary[support[v][:5]].T, vectors[v]
        ).solution
        assert (dictionary @ rest).abs().argmax() == support[v][5]
    print("the reference algorithm agrees with least squares")


def milliseconds(work, repetitions=15):
    work()
    torch.cuda.synchronize()
    times = []
    for _ in range(repetitions):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def graph(work):
    """The same work as one graph: nothing of it is launching."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        work()
    return captured.replay


def reference_pursuit(m, atoms, sparsity, count):
    torch.manual_seed(1)
    dictionary = torch.nn.functional.normalize(torch.rand(atoms, m, device="cuda") * 2 - 1, dim=1)
    torch.backends.cuda.matmul.allow_tf32 = False
    gram = dictionary @ dictionary.T
    vectors = torch.rand(count, m, device="cuda") * 2 - 1
    runs = []
    for tf32 in [False, True]:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        for batch in [1024, 2048, 4096, 8192, 16384, 32768]:
            parts = vectors.split(batch)
            try:
                time = milliseconds(lambda: [pursuit(dictionary, gram, part, sparsity) for part in parts], 3)
            except torch.cuda.OutOfMemoryError:
                break
            runs.append({"vectors_per_second": count / time * 1e3, "batch": batch, "tf32": tf32})
    best = max(runs, key=lambda run: run["vectors_per_second"])
    part = vectors[:4096]
    torch.backends.cuda.matmul.allow_tf32 = best["tf32"]
    found = pursuit(dictionary, gram, part, sparsity)
    torch.backends.cuda.matmul.allow_tf32 = False
    return {**best, "relative_error": relative_error(dictionary, part, *found)}


def dense_attention(batch, heads, kv_heads, m, context):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as attend

    group = heads // kv_heads
    q = torch.randn(batch, heads, 1, m, device="cuda", dtype=torch.bfloat16)
    grouped = q.view(batch, kv_heads, group, m)
    k, v = (torch.randn(batch, kv_heads, context, m, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ways = {}
    for backend in [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]:
        def by_group(backend=backend):
            with sdpa_kernel(backend):
                return attend(grouped, k, v)

        def by_head(backend=backend):
            with sdpa_kernel(backend):
                return attend(q, k, v, enable_gqa=True)

        ways[f"{backend.name}, by group"] = by_group
        ways[f"{backend.name}, by head"] = by_head
    ways["products"] = lambda: torch.softmax(grouped @ k.mT / m**0.5, -1) @ v
    try:
        from flash_attn import flash_attn_with_kvcache

        flash = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        ways["flash-attn"] = lambda: flash_attn_with_kvcache(*flash)
    except ImportError:
        pass
    times = {}
    for name, way in ways.items():
        try:
            times[name] = milliseconds(graph(way))
        except RuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
    return times


def ours(bench, *arguments):
    command = ["cargo", "bench", "-q", "-p", "lexico", "--features", "cuda", "--bench", bench, "--"]
    run = subprocess.run([*command, *arguments, "--device", "cuda", "--json"], stdout=subprocess.PIPE, check=True)
    return json.loads(run.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1 << 17)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 8192, 32768, 131072])
    parser.add_argument("--format", default="additive:16,f8:16,i8:16")
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    if arguments.cpu:
        return check_on_cpu()
    print(torch.cuda.get_device_name(), "PyTorch", torch.__version__, "CUDA", torch.version.cuda)
    m, atoms, sparsity = 128, 4096, 16
    shape = ["--head-dim", str(m), "--sparsity", str(sparsity)]
    reference = reference_pursuit(m, atoms, sparsity, arguments.vectors)
    torch.cuda.empty_cache()
    own = ours("pursuit", *shape, "--atoms", str(atoms), "--vectors", str(arguments.vectors))
    rate = 1e6 / own["microseconds_per_vector"]
    print(json.dumps({"pursuit": own, "reference": reference, "ratio": rate / reference["vectors_per_second"]}))
    print(f"pursuit: {rate / 1e6:.2f} M vectors/s, {rate / reference['vectors_per_second']:.1f} times the reference's")
    additive = ours("pursuit", "--additive", *shape, "--vectors", str(arguments.vectors))
    print(json.dumps({"additive": additive}))
    for batch in arguments.batch:
        for context in arguments.context:
            if batch * context > 8 * 131072:
                continue
            dense = dense_attention(batch, 32, 8, m, context)
            torch.cuda.empty_cache()
            best = min(dense, key=dense.get)
            run = ours(
                "attention", "--head-dim", str(m), "--atoms", str(atoms), "--group", "4", "--kv-heads", "8",
                "--batch", str(batch), "--context", str(context), "--format", arguments.format,
            )
            print(json.dumps({"batch": batch, "context": context, "dense_milliseconds": dense, "ours": run}))
            for row in run["rows"][0]["formats"]:
                time = row["microseconds"] / 1e3
                name = f"{row['format']}:{row['sparsity']}"
                print(f"batch {batch}, {context}: {name} {time:.3f} ms, {time / dense[best]:.2f} of {best} ({dense[best]:.3f} ms)")


if __name__ == "__main__":
    main()
