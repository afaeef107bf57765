"""A prefix store in S3 (moto's server): a second server goes on from what the first has read, and so does one that was killed; other settings never mix."""
# moto[server]==5.2.5 boto3==1.44.8
import json
import os
import pathlib
import subprocess
import sys
import time
import urllib.request

import boto3
from moto.server import ThreadedMotoServer

sys.path.insert(0, os.environ["ROOT"] + "/crates/lexico-serve/tests/soak")
from server import Server  # noqa: E402

moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
moto.start()
host, port = moto.get_host_and_port()
os.environ |= {
    "AWS_ENDPOINT": f"http://{host}:{port}",
    "AWS_ALLOW_HTTP": "true",
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "us-east-1",
}
bucket = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT"])
bucket.create_bucket(Bucket="prefixes")


def objects():
    return bucket.list_objects_v2(Bucket="prefixes").get("Contents", [])


program = os.environ["ROOT"] + "/target/release/lexico"
prompt = "Ana has nine coins and gives two of them to Ben. " * 60
arguments = ["--ubatch-size", "64", "--prefix-store", "s3://prefixes/of/tests"]

first = Server(program, *arguments)
text, cached, _ = first.ask(prompt, 16)
assert cached == 0, cached
for _ in range(100):
    if objects():
        break
    time.sleep(0.1)
first.kill()
[stored] = objects()
assert stored["Key"].startswith("of/tests/") and stored["Key"].endswith(".prefix"), stored

second = Server(program, *arguments)
again, cached, length = second.ask(prompt, 16)
assert again == text and cached > 0.9 * length, (cached, length)
assert second.figure("lexico_prefix_store_up") == 1
second.stop()

others = Server(program, *arguments, "--cache", "lexico:sparsity=6")
_, cached, _ = others.ask(prompt, 16)
assert cached == 0, "codes of other settings"
others.stop()

# What is damaged counts as not there.
bucket.put_object(Bucket="prefixes", Key=stored["Key"], Body=b"lexico-prefix/1\n" + bytes(1000))
third = Server(program, *arguments)
again, cached, _ = third.ask(prompt, 16)
assert again == text and cached == 0, cached
third.stop()

# A bucket that is not there, and a server of objects that does not answer: prompts are read anew.
for place in ["s3://nothing/here", "s3://prefixes/of/tests"]:
    if place.startswith("s3://prefixes"):
        moto.stop()
    lonely = Server(program, "--ubatch-size", "64", "--prefix-store", place)
    again, cached, _ = lonely.ask(prompt, 16)
    assert again == text and cached == 0, cached
    assert lonely.figure("lexico_prefix_store_up") == 0 and lonely.figure("lexico_prefix_store_errors_total") > 0
    lonely.stop()
