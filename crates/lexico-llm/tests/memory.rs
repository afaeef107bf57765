//! What a cache says it weighs is what the allocator gave it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use lexico_llm::Model;
use lexico_llm::decoder::{Logits, Sequence};

struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system allocator unchanged; only a counter is kept beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD.fetch_add(layout.size(), Ordering::SeqCst);
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: the caller keeps `dealloc`'s contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

// One test in this file: another one's allocations would be counted too.
#[test]
fn footprints_equal_what_is_allocated() {
    let model = Model::tiny().unwrap();
    let text = "Question: Ana has 12 coins at home. Ben gives Ana 7 more. ".repeat(30);
    let tokens = model.tokenizer.encode_first(&text).unwrap();
    let run = |spec: &str, prompt: usize, steps: usize| {
        let mut cache = model.cache(&spec.parse().unwrap()).unwrap();
        for step in [&tokens[..prompt]]
            .into_iter()
            .chain(tokens[prompt..prompt + steps].chunks(1))
        {
            let mut sequences = [Sequence {
                tokens: step,
                cache: cache.as_mut(),
            }];
            model.decoder.forward(&mut sequences, Logits::Last).unwrap();
        }
        // What threads keep for themselves is no part of the cache: what dropping it gives back is.
        let (reported, before) = (cache.footprint().total(), HELD.load(Ordering::SeqCst));
        drop(cache);
        (reported, before - HELD.load(Ordering::SeqCst))
    };
    for spec in [
        "full",
        "full:dense=f32",
        "lexico:sparsity=8,window=16",
        "lexico:sparsity=12.5,window=16",
        "lexico:sparsity=8,window=16,format=i8",
        "lexico:sparsity=4,window=0,batch=1",
        "lexico:sparsity=16,window=64,format=f32,dense=f32",
        "lexico:sparsity=16,tolerance=0.3,window=16,format=i8",
        "lexico:sparsity=8,tolerance=0.05,window=16,format=i8",
        "lexico:key-sparsity=12,value-sparsity=4,window=32",
        "streaming-llm:window=60",
        "snapkv:capacity=80",
        "pyramidkv:capacity=80",
        "h2o:capacity=80",
        "per-token",
        "per-token:bits=3,group=24,window=0",
        "kivi",
        "kivi:bits=4,group=16,residual=32",
        "zipcache",
        "zipcache:salient=0.25,gap=25",
        "turboquant",
        "turboquant:bits=4,window=16,norm=corrected",
        "turboquant:bits=3,sinks=5,dense-layers=1",
        "per-token:bits=2,window=16,sinks=4",
        "kivi:bits=2,residual=32,sinks=4,dense-layers=1",
        "vllm-turboquant",
        "vllm-turboquant:preset=k8v4,dense-layers=0",
        "vllm-turboquant:preset=3bit_nc,dense-layers=1,window=16,sinks=4",
        "llama-cpp",
        "llama-cpp:k=q5_1,v=q4_0,rotation=off",
        "llama-cpp:k=q4_0,v=q4_0,window=16,sinks=4",
        "fp8",
        "fp8:scales=prompt,own=exact,dense-layers=1",
        "kvarn",
        "kvarn:k=2,v=2,group=32,sinks=4,window=16",
        "random:capacity=80",
        "oscar",
        "oscar:window=16,sinks=4",
        "oscar:window=0,sinks=0,group=32,rotation=hadamard",
    ] {
        for (prompt, steps) in [(20, 0), (120, 40), (220, 3)] {
            let (reported, allocated) = run(spec, prompt, steps);
            let ratio = reported as f64 / allocated as f64;
            println!("{spec}, {prompt} + {steps} tokens: {ratio:.4}");
            assert!(
                (0.95..1.05).contains(&ratio),
                "{spec}, {prompt} + {steps} tokens: {reported} bytes reported, {allocated} allocated"
            );
        }
    }

    // A limit of memory is one of what is allocated, however long the text.
    let position = model.decoder.config().fp16_cache_bytes(1);
    for share in [1.5, 1.0, 0.5] {
        let limit = (share * (400 * position) as f64) as usize;
        let spec = format!("lexico:sparsity=4,batch=1,sinks=0,memory={limit}B");
        for (prompt, steps) in [(20, 0), (120, 40), (360, 0), (300, 60), (30, 370)] {
            let (_, allocated) = run(&spec, prompt, steps);
            assert!(
                allocated <= limit,
                "{spec}, {prompt} + {steps} tokens: {allocated} bytes allocated"
            );
        }
    }
}
