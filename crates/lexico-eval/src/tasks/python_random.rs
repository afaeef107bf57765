//! Python's `random.Random` and numpy's `RandomState`, as far as published prompts are drawn with them, by the Mersenne
//! Twister MT19937 (Matsumoto and Nishimura, 1998).

/// Words of the state.
const WORDS: usize = 624;
/// Distance from a word to the one that it is mixed with.
const AHEAD: usize = 397;

pub(super) struct PythonRandom {
    state: [u32; WORDS],
    next: usize,
}

/// numpy's `RandomState`
pub(super) struct NumpyRandom(PythonRandom);

impl NumpyRandom {
    /// `np.random.seed(seed)`
    pub(super) fn new(seed: u32) -> Self {
        Self(PythonRandom {
            state: spread(seed),
            next: WORDS,
        })
    }

    /// `randint(least, end)`; `end` is above `least`.
    pub(super) fn integer(&mut self, least: u32, end: u32) -> u32 {
        let range = end - least - 1;
        let mask = range.checked_next_power_of_two().map_or(u32::MAX, |power| {
            if power == range {
                2 * power - 1
            } else {
                power - 1
            }
        });
        loop {
            let number = self.0.word() & mask;
            if number <= range {
                return least + number;
            }
        }
    }
}

/// A state that is spread from one word.
fn spread(seed: u32) -> [u32; WORDS] {
    let mut state = [seed; WORDS];
    for i in 1..WORDS {
        let before = state[i - 1] ^ (state[i - 1] >> 30);
        state[i] = before.wrapping_mul(1_812_433_253).wrapping_add(i as u32);
    }
    state
}

impl PythonRandom {
    /// `random.Random(seed)`
    pub(super) fn new(seed: u64) -> Self {
        let mut state = spread(19_650_218);
        let key = [seed as u32, (seed >> 32) as u32];
        let key = if key[1] == 0 { &key[..1] } else { &key[..] };
        // Places run in a circle that leaves out 0.
        let advance = |state: &mut [u32; WORDS], i: &mut usize| {
            *i += 1;
            if *i == WORDS {
                state[0] = state[WORDS - 1];
                *i = 1;
            }
        };
        let mut i = 1;
        for round in 0..WORDS {
            let place = round % key.len();
            let before = state[i - 1] ^ (state[i - 1] >> 30);
            state[i] = (state[i] ^ before.wrapping_mul(1_664_525))
                .wrapping_add(key[place])
                .wrapping_add(place as u32);
            advance(&mut state, &mut i);
        }
        for _ in 1..WORDS {
            let before = state[i - 1] ^ (state[i - 1] >> 30);
            state[i] = (state[i] ^ before.wrapping_mul(1_566_083_941)).wrapping_sub(i as u32);
            advance(&mut state, &mut i);
        }
        state[0] = 1 << 31;
        Self { state, next: WORDS }
    }

    /// `sample(range(count), wanted)`; at most `count` are given.
    pub(super) fn sample(&mut self, count: usize, wanted: usize) -> Vec<usize> {
        let wanted = wanted.min(count);
        let mut sample = Vec::with_capacity(wanted);
        // Up to this size Python holds all that may be drawn in a list.
        let mut most = 21;
        if wanted > 5 {
            let mut power = 1;
            while power < wanted * 3 {
                power *= 4;
            }
            most += power;
        }
        if count <= most {
            let mut pool: Vec<usize> = (0..count).collect();
            for drawn in 0..wanted {
                let last = count - drawn - 1;
                let place = self.below(last + 1);
                sample.push(pool[place]);
                pool[place] = pool[last];
            }
        } else {
            while sample.len() < wanted {
                let number = self.below(count);
                if !sample.contains(&number) {
                    sample.push(number);
                }
            }
        }
        sample
    }

    /// `shuffle`
    pub(super) fn shuffle<T>(&mut self, list: &mut [T]) {
        for last in (1..list.len()).rev() {
            list.swap(last, self.below(last + 1));
        }
    }

    /// `''.join(choices(letters, k=length))` of ASCII letters.
    pub(super) fn letters(&mut self, letters: &[u8], length: usize) -> String {
        let count = letters.len() as f64;
        let drawn = (0..length).map(|_| letters[(self.float() * count) as usize]);
        drawn.map(char::from).collect()
    }

    /// `uuid.UUID(int=getrandbits(128), version=4)`
    pub(super) fn uuid(&mut self) -> String {
        let words: [u32; 4] = std::array::from_fn(|_| self.word());
        let number = words
            .iter()
            .rev()
            .fold(0_u128, |sum, &word| (sum << 32) | u128::from(word));
        let number = (number & !((0xf000 << 64) | (0xc000 << 48))) | (4 << 76) | (0x8000 << 48);
        let digits = format!("{number:032x}");
        let parts = [0..8, 8..12, 12..16, 16..20, 20..32].map(|part| &digits[part]);
        parts.join("-")
    }

    /// `random()`
    fn float(&mut self) -> f64 {
        let (high, low) = (f64::from(self.word() >> 5), f64::from(self.word() >> 6));
        (high * 67_108_864.0 + low) / 9_007_199_254_740_992.0
    }

    /// A number below `count`, which is at least 1 and below 2³².
    pub(super) fn below(&mut self, count: usize) -> usize {
        let bits = usize::BITS - count.leading_zeros();
        loop {
            let number = (self.word() >> (32 - bits)) as usize;
            if number < count {
                return number;
            }
        }
    }

    fn word(&mut self) -> u32 {
        if self.next == WORDS {
            for i in 0..WORDS {
                let y = (self.state[i] & (1 << 31)) | (self.state[(i + 1) % WORDS] & !(1 << 31));
                let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + AHEAD) % WORDS] ^ (y >> 1) ^ odd;
            }
            self.next = 0;
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seed; then population, number drawn, what was drawn, one after the other.
    type Draws = Vec<(u64, Vec<(usize, usize, Vec<usize>)>)>;

    #[test]
    fn samples_are_pythons() {
        let golden = include_str!("../../tests/fixtures/gsm8k.json");
        let golden: serde_json::Value = serde_json::from_str(golden).unwrap();
        let draws: Draws = serde_json::from_value(golden["draws"].clone()).unwrap();
        assert_eq!(draws.len(), 3);
        for (seed, draws) in draws {
            let mut random = PythonRandom::new(seed);
            for (count, wanted, expected) in draws {
                assert_eq!(
                    random.sample(count, wanted),
                    expected,
                    "{seed} {count} {wanted}"
                );
            }
        }
    }
}
