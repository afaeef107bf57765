#!/usr/bin/env bash
# lm_eval[api]==0.4.13 transformers==5.24.0
# lm-eval's local-completions: texts to be written, and the likelihood of texts, as gsm8k and wikitext ask for them. Its own
# tasks need the hub; these two ask the same of problems and of prose that are here.
set -euo pipefail
tasks=$(mktemp -d)
trap 'rm -rf "$tasks"' EXIT
python3 - "$tasks" <<'PYTHON'
import json, os, sys
folder, root = sys.argv[1], os.environ["ROOT"]
lines = open(root + "/models/tiny/problems_test.jsonl").read().splitlines()[:8]
problems = [json.loads(line) for line in lines]
with open(folder + "/problems.jsonl", "w") as out:
    for problem in problems:
        out.write(json.dumps({"question": problem["question"], "answer": str(problem["answer"]).split("####")[-1].strip()}) + "\n")
with open(folder + "/prose.jsonl", "w") as out:
    for part in open(root + "/README.md").read().split("\n\n")[:6]:
        out.write(json.dumps({"text": part}) + "\n")
PYTHON
cat >"$tasks/problems.yaml" <<YAML
task: lexico_problems
dataset_path: json
dataset_kwargs: {data_files: {test: $tasks/problems.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\n\n", "Question:"], max_gen_toks: 40, temperature: 0.0, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
YAML
cat >"$tasks/prose.yaml" <<YAML
task: lexico_prose
dataset_path: json
dataset_kwargs: {data_files: {test: $tasks/prose.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
YAML
export OPENAI_API_KEY=$KEY HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
lm_eval run --model local-completions --tasks lexico_problems,lexico_prose --include_path "$tasks" --output_path "$tasks/out" \
    --model_args "model=tiny,base_url=$BASE/v1/completions,tokenizer_backend=huggingface,tokenizer=$ROOT/models/tiny,num_concurrent=4,max_retries=1,max_length=2048"
python3 - "$tasks/out" <<'PYTHON'
import json, math, pathlib, sys
[file] = pathlib.Path(sys.argv[1]).rglob("results*.json")
results = json.loads(file.read_text())["results"]
bits = results["lexico_prose"]["bits_per_byte,none"]
assert 0.5 < bits < 8 and math.isfinite(bits), bits
assert "exact_match,none" in results["lexico_problems"], results
PYTHON
