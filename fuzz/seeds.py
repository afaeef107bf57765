#!/usr/bin/env python3
# Writes the first inputs of every fuzz target to fuzz/corpus/TARGET, from the fixtures of the tests.
import json
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LLM = ROOT / "crates/lexico-llm/tests"
OLD = ROOT / "crates/lexico/tests/fixtures/version-0.1"


def write(target, name, data):
    folder = ROOT / "fuzz/corpus" / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


for file in (LLM / "hostile").glob("*.gguf"):
    write("gguf", file.name, file.read_bytes())
for file in [*(LLM / "hostile").glob("*.safetensors"), OLD / "dictionary.safetensors"]:
    write("dictionary", file.name, file.read_bytes())
for file in OLD.glob("*.codes.safetensors"):
    write("codes", file.name, file.read_bytes())

# The first byte draws the formats: see fuzz_targets/stored.rs.
for name, coefficients, variable in [("i8", 0, 0), ("f8", 1, 0), ("f32", 2, 0), ("i8-variable", 0, 1), ("packed", 3, 0)]:
    sparsity = 2 if name == "packed" else 3
    first = coefficients << 1 | variable << 3 | sparsity - 1 << 5
    write("stored", name, bytes([first]) + (OLD / f"{name}.block").read_bytes())

# The first byte says what the rest is of which saved cache, the second which block: see fuzz_targets/saved.rs.
for which, name in enumerate(["packed", "i8"]):
    saved = (LLM / f"fixtures/saved/{name}.cache").read_bytes()
    write("saved", name, bytes([which << 4, 0]) + saved)
    start = saved.index(b"\n") + 1
    length = int.from_bytes(saved[start : start + 4], "little")
    header = saved[start + 4 : start + 4 + length]
    write("saved", f"{name}-header", bytes([which << 4 | 1, 0]) + header)
    at = start + 4 + length + 4
    for number, block in enumerate(json.loads(header)["blocks"]):
        own = saved[at : at + block["bytes"]]
        at += block["bytes"]
        if number < 8:
            write("saved", f"{name}-{number}", bytes([which << 4 | 2, number]) + own)

for file in (LLM / "fixtures").glob("*.pt"):
    write("pickle", file.name, b"\1" + file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        pickle = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        write("pickle", f"{file.name}-pickle", b"\0" + archive.read(pickle))

text = (ROOT / "README.md").read_bytes()
write("corpus", "text", b"\0" + text)
rows = [{"text": line} for line in text.decode().splitlines()[:40]]
write("corpus", "json", b"\1" + json.dumps(rows).encode())
write("corpus", "jsonl", b"\2" + "\n".join(map(json.dumps, rows)).encode())
for file in (LLM / "fixtures/parquet").glob("*.parquet"):
    write("corpus", file.name, b"\3" + file.read_bytes())
