//! What a layer's cache says it weighs is what the allocator gave it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{drawn_vectors, random_dictionary};
use lexico::dictionary::{CodebookSizes, Codebooks, HeadMaps, LayerDictionaries, LayerSparsities};
use lexico::threads::Alone;
use lexico::{KeyValue, LayerCache, LayerSettings};

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
    let (heads, m) = (2, 32);
    let sizes = CodebookSizes { first: 20 };
    let codebooks = Codebooks::new(drawn_vectors(1, sizes.atoms(3), m), m, sizes).unwrap();
    let twice = |i: usize| {
        if (i % (m * m)).is_multiple_of(m + 1) {
            2.0
        } else {
            0.0
        }
    };
    let matrices: Vec<f32> = (0..heads * m * m).map(twice).collect();
    let maps = HeadMaps::new(&drawn_vectors(2, heads, m), &matrices, m).unwrap();
    let dictionary = random_dictionary(3, 40, m);
    let dictionaries = LayerDictionaries {
        sparse: Some(KeyValue::new(dictionary.clone().into(), dictionary.into())),
        codebooks: Some(KeyValue::new(codebooks.clone().into(), codebooks.into())),
        maps: Some(KeyValue::new(maps.clone().into(), maps.into())),
    };
    for (sinks, window, prompt, steps) in [
        (0, 16, 200, 20),
        (4, 16, 200, 20),
        (40, 16, 300, 0),
        (40, 16, 300, 50),
        (64, 16, 50, 0),
        (64, 16, 0, 60),
        (7, 0, 500, 9),
    ] {
        let settings = LayerSettings {
            sinks,
            recent_window: window,
            ..LayerSettings::new(LayerSparsities::same(heads, 3, 2))
        };
        let expected = settings.expected_bytes(m, prompt + steps);
        let mut cache = LayerCache::new(&dictionaries, settings).unwrap();
        for t in [prompt].into_iter().chain(std::iter::repeat_n(1, steps)) {
            let rows = [1, 2].map(|seed| drawn_vectors(seed, heads * t, m));
            cache
                .append(KeyValue::new(&rows[0], &rows[1]), &Alone)
                .unwrap();
        }
        let footprint = cache.footprint();
        let held = cache.sinks();
        assert_eq!(held, sinks.min(prompt + steps));
        // Room for four positions, or a sixteenth more.
        let least = 2 * heads * held * m * 2;
        let room = 2 * heads * (4 + held / 16) * m * 2;
        assert!(footprint.sinks >= least && footprint.sinks <= least + room);
        let (reported, before) = (footprint.total(), HELD.load(Ordering::SeqCst));
        drop(cache);
        let allocated = before - HELD.load(Ordering::SeqCst);
        let ratio = reported as f64 / allocated as f64;
        println!(
            "{sinks} sinks, {prompt} + {steps}: {reported} of {allocated}, expected {expected}"
        );
        assert!(
            (0.97..1.03).contains(&ratio),
            "{sinks} sinks: {reported} for {allocated}"
        );
        // Decode has had the window grow by the batch that is on its way.
        assert!(
            steps < 20 || (0.9..1.1).contains(&(expected / reported as f64)),
            "{expected} for {reported}"
        );
    }
}
