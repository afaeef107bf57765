#!/usr/bin/env bash
# The tables of docs/results/real-models.md: dictionaries for both real models, learned anew for each seed, and every
# evaluation with them. What was done before is not done again; an interrupted step goes on where it was.
#
#   cargo build --release
#   crates/lexico-cli/tests/fetch_models.sh MODELS
#   crates/lexico-cli/benches/real_models.sh MODELS DATA OUT [STEP…]
#
# DATA holds WikiText-2's wikitext2_valid.txt and wikitext2_test.txt, and GSM8K's gsm8k_train.jsonl and gsm8k_test.jsonl. Steps, all by default:
# learn, divergence, perplexity, long, writing, ruler, needles, problems, code, overview. Environment: SEEDS ("0 1 2"), EFFORT (quick), NAMES ("smollm2 qwen").
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n '2,11s/^# \{0,1\}//p' "$0"
    exit 2
fi
models=$1 data=$2 out=$3
shift 3
[ $# -gt 0 ] || set -- learn divergence perplexity long writing ruler needles problems code overview
lexico=$(dirname "${BASH_SOURCE[0]}")/../../../target/release/lexico
seeds=${SEEDS:-0 1 2} effort=${EFFORT:-quick} names=${NAMES:-smollm2 qwen}
mkdir -p "$out"

model() {
    case $1 in
    smollm2) echo "$models/smollm2-135m-instruct-q4_1.gguf" ;;
    qwen) echo "$models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf" ;;
    *) echo "no model is called $1: smollm2 or qwen" >&2 && exit 2 ;;
    esac
}

# evaluate REPORT MODEL SEED ARGUMENTS…: runs an evaluation, or goes on with it, unless it is done.
evaluate() {
    local report=$out/$1 name=$2 seed=$3
    shift 3
    if [ ! -f "$report/results.json" ]; then
        "$lexico" eval "$@" -m "$(model "$name")" -d "$out/$name-$effort-$seed.safetensors" --report "$report" --resume
    fi
}

# The window and the first positions of all methods are the same. Sizes of 8, 12, 16 and 22 % of FP16 at 1,024 positions.
window=window=32,batch=8
lexico_caches=()
for sparsity in 3 8 13 21; do lexico_caches+=(--cache "lexico:sparsity=$sparsity,$window"); done
rivals=(
    --cache kivi:bits=2,group=32,residual=32,sinks=4
    --cache per-token:bits=2,group=32,window=32,sinks=4
    --cache turboquant:norm=eden,bits=1,window=32,sinks=4
    --cache turboquant:norm=eden,bits=2,window=32,sinks=4
    --cache turboquant:norm=eden,bits=3,window=32,sinks=4
    --cache vllm-turboquant:preset=3bit_nc,dense-layers=0,window=32,sinks=4
    --cache kvarn:window=32,sinks=4
    --cache oscar:window=32,sinks=4
    --cache llama-cpp:k=q4_0,v=q4_0,window=32,sinks=4
    --cache streaming-llm:window=110
    --cache streaming-llm:window=220
    --cache random:capacity=110
    --cache random:capacity=220
)

# Where a pass of the model is dear.
few=(--cache "lexico:sparsity=8,$window" --cache "lexico:sparsity=13,$window" --cache kivi:bits=2,group=32,residual=32,sinks=4)

learn() {
    for name in $names; do
        for seed in $seeds; do
            local file=$out/$name-$effort-$seed.safetensors
            [ -f "$file" ] || "$lexico" train -m "$(model "$name")" --corpus "$data/wikitext2_valid.txt" --effort "$effort" \
                --seed "$seed" --out "$file" --resume
        done
    done
}

# 1,024 tokens, the second half predicted one by one.
divergence() {
    local text=(--corpus "$data/wikitext2_test.txt" --context 1024 --prompt 512 --items 4 --batch-size 4)
    for name in $names; do
        local others=("${rivals[@]}")
        for seed in $seeds; do
            evaluate "divergence-$name-$seed" "$name" "$seed" divergence "${text[@]}" "${lexico_caches[@]}" "${others[@]}"
            others=() # they need no dictionaries
        done
    done
}

# The second half of texts of 1,024, 4,096 and 8,192 tokens.
perplexity() {
    for name in $names; do
        for sizes in "1024 4" "4096 2" "8192 1"; do
            read -r context items <<<"$sizes"
            evaluate "perplexity-$name-$context" "$name" "${seeds%% *}" perplexity --corpus "$data/wikitext2_test.txt" --context "$context" \
                --prompt $((context / 2)) --step 8 --items "$items" --batch-size 1 "${few[@]}"
        done
    done
}

# From 512 to 8,192 positions of the same text, eight tokens at a time: as many as leave the window together.
long() {
    local text=(--corpus "$data/wikitext2_test.txt" --context 8192 --prompt 512 --items 2 --batch-size 1 --step 8)
    for name in $names; do
        evaluate "long-$name" "$name" "${seeds%% *}" divergence "${text[@]}" "${few[@]}"
    done
}

# 1,024 tokens that the model itself writes with the full cache.
writing() {
    local text=(--corpus "$data/wikitext2_test.txt" --own-text --context 1536 --prompt 512 --items 4 --batch-size 4)
    for name in $names; do
        evaluate "writing-$name" "$name" "${seeds%% *}" divergence "${text[@]}" "${lexico_caches[@]}" \
            --cache kivi:bits=2,group=32,residual=32,sinks=4
    done
}

# SnapKV keeps as many positions of each prompt, whatever its length: 22 % of FP16 of those of 2,048 tokens.
ruler() {
    local caches=(--cache "lexico:sparsity=8,$window" --cache "lexico:sparsity=21,$window")
    caches+=(--cache kivi:bits=2,group=32,residual=32,sinks=4 --cache turboquant:norm=eden,bits=3,window=32,sinks=4)
    caches+=(--cache kvarn:k=2,v=2,group=32,window=32,sinks=4 --cache vllm-turboquant:preset=3bit_nc,dense-layers=0,window=32,sinks=4)
    caches+=(--cache snapkv:capacity=412,window=32)
    for name in $names; do
        evaluate "ruler-$name" "$name" "${seeds%% *}" ruler --length 1024,2048,4096 --repeats 3 --batch-size 2 --chat "${caches[@]}"
    done
}

# Two tasks that both models can do, 100 prompts of each, with settings of each method that take about 12 and 22 % of FP16, where it has
# such. SnapKV keeps what is written after the prompt beside its capacity.
needles() {
    local caches=(--cache "lexico:sparsity=7.5,$window" --cache "lexico:sparsity=21,$window")
    caches+=(--cache kivi:bits=2,group=32,residual=32,sinks=4 --cache kvarn:k=2,v=2,group=32,window=32,sinks=4)
    caches+=(--cache turboquant:norm=eden,bits=1,window=32,sinks=4 --cache turboquant:norm=eden,bits=3,window=32,sinks=4)
    caches+=(--cache vllm-turboquant:preset=3bit_nc,dense-layers=0,window=32,sinks=4 --cache per-token:bits=2,group=32,window=32,sinks=4)
    caches+=(--cache snapkv:capacity=100,window=32 --cache snapkv:capacity=185,window=32 --cache random:capacity=110 --cache random:capacity=205)
    for name in $names; do
        evaluate "needles-$name" "$name" "${seeds%% *}" ruler --task niah_single_2,niah_multikey_1 --length 1024 --repeats 100 --batch-size 4 --chat "${caches[@]}"
    done
}

# GSM8K with five worked examples, and without any behind the model's chat template: more than models of this size can do.
problems() {
    local text=(--data "$data/gsm8k_test.jsonl" --examples "$data/gsm8k_train.jsonl" --items 24 --batch-size 8)
    if [ ! -f "$data/gsm8k_test.jsonl" ] || [ ! -f "$data/gsm8k_train.jsonl" ]; then
        echo "problems: left out, since $data has no gsm8k_test.jsonl and gsm8k_train.jsonl" >&2
        return
    fi
    for name in $names; do
        evaluate "gsm8k-$name" "$name" "${seeds%% *}" gsm8k "${text[@]}" "${few[@]}"
        evaluate "gsm8k-chat-$name" "$name" "${seeds%% *}" gsm8k "${text[@]}" --shots 0 --chat --extraction flexible "${few[@]}"
    done
}

# Python files of the standard library, as a coder's model reads them on.
code() {
    local files
    files=$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
    cat "$files"/{argparse,ast,asyncio/base_events,calendar,csv,dataclasses,decimal,difflib,heapq,ipaddress}.py >"$out/python.txt" 2>/dev/null || true
    for name in $names; do
        evaluate "code-$name" "$name" "${seeds%% *}" divergence --corpus "$out/python.txt" --context 1024 --prompt 512 --items 4 --batch-size 4 \
            "${lexico_caches[@]}" --cache kivi:bits=2,group=32,residual=32,sinks=4
    done
}

overview() {
    local reports=()
    for report in "$out"/*/results.json; do reports+=("$(dirname "$report")"); done
    "$lexico" eval overview "${reports[@]}" --out "$out/overview.html" --plot "$out/overview.svg"
}

for step in "$@"; do
    case $step in
    learn | divergence | perplexity | long | writing | ruler | needles | problems | code | overview) "$step" ;;
    *) echo "no step is called $step" >&2 && exit 2 ;;
    esac
done
