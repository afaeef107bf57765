//! How byte-level vocabularies split a text into words before its bytes are merged, by the names in
//! `tokenizer.ggml.pre`.
//!
//! The names and what each asks for are those of llama.cpp's `llama-vocab.cpp`. The steps are those of the
//! families' own `tokenizer.json`, which llama.cpp restates for its own regular expressions: the comparison is
//! in docs/results/tokenizers.md.

use lexico::shown::shown;
use serde_json::{Value, json};

/// A way of splitting.
pub(super) struct Split {
    names: &'static [&'static str],
    steps: &'static [Step],
    /// Composed characters before all else.
    pub(super) nfc: bool,
    /// Whole words of the vocabulary are tokens whatever the merges say.
    pub(super) ignore_merges: bool,
    /// True where texts begin with the beginning token though the file does not say.
    pub(super) begins: bool,
}

/// A step of splitting: each splits the words that the steps before it left.
enum Step {
    /// Every match is a word, and so is what lies between two.
    Regex(&'static str),
    /// Every digit is a word.
    Digit,
    /// Every run of digits is a word.
    Digits,
    /// Every punctuation mark is a word.
    Mark,
    /// Every run of punctuation is a word.
    Marks,
    /// GPT-2's own words; bytes become characters, which steps after it see.
    Gpt2,
}

/// Names that llama.cpp knows of vocabularies that are not byte-level: their pieces are text, with `▁` for
/// spaces, or whole words.
const OTHERS: [&str; 4] = [
    "gemma4",
    "granite-embed-multi-311m",
    "sarvam-moe",
    "whitespace",
];

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Without contractions: Turkish suffixes stay whole.
const UFAKZEKA: &str =
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const JAIS2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}";
const MINICPM5: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const SEED_CODER: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const BAILING: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const EXAONE_MOE: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const KIMI_K2: &str = r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const YOUTU_SCRIPTS: &str = r"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+";
const YOUTU: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const BLOOM: &str = r" ?[^(\s|[.,!?…。，、।۔،])]+";
/// As escapes: an editor that composes characters would change some.
const DEEPSEEK_LETTERS: &str = r"\s?[A-Za-z\u{b5}\u{c0}-\u{d6}\u{d8}-\u{f6}\u{f8}-\u{1ba}\u{1bc}-\u{1bf}\u{1c4}-\u{293}\u{295}-\u{2af}\u{370}-\u{373}\u{376}\u{377}\u{37b}-\u{37d}\u{37f}\u{386}\u{388}-\u{38a}\u{38c}\u{38e}-\u{3a1}\u{3a3}-\u{3f5}\u{3f7}-\u{481}\u{48a}-\u{52f}\u{531}-\u{556}\u{10a0}-\u{10c5}\u{13a0}-\u{13f5}\u{13f8}-\u{13fd}\u{1c90}-\u{1cba}\u{1cbd}-\u{1cbf}\u{1d00}-\u{1d2b}\u{1d6b}-\u{1d77}\u{1d79}-\u{1d9a}\u{1e00}-\u{1f15}\u{1f18}-\u{1f1d}\u{1f20}-\u{1f45}\u{1f48}-\u{1f4d}\u{1f50}-\u{1f57}\u{1f59}\u{1f5b}\u{1f5d}\u{1f5f}-\u{1f7d}\u{1f80}-\u{1fb4}\u{1fb6}-\u{1fbc}\u{1fbe}\u{1fc2}-\u{1fc4}\u{1fc6}-\u{1fcc}\u{1fd0}-\u{1fd3}\u{1fd6}-\u{1fdb}\u{1fe0}-\u{1fec}\u{1ff2}-\u{1ff4}\u{1ff6}-\u{1ffc}\u{2102}\u{2107}\u{210a}-\u{2113}\u{2115}\u{2119}-\u{211d}\u{2124}\u{2126}\u{2128}\u{212a}-\u{212d}\u{212f}-\u{2134}\u{2139}\u{213c}-\u{213f}\u{2145}-\u{2149}\u{214e}\u{2183}\u{2184}\u{2c00}-\u{2c7b}\u{2c7e}-\u{2ce4}\u{2ceb}-\u{2cee}\u{2cf2}\u{2cf3}\u{a640}-\u{a66d}\u{a680}-\u{a69b}\u{a722}-\u{a76f}\u{a771}-\u{a787}\u{a78b}-\u{a78e}\u{ab70}-\u{abbf}\u{fb00}-\u{fb06}\u{fb13}-\u{fb17}\u{ff21}-\u{ff3a}\u{ff41}-\u{ff5a}\u{10400}-\u{1044f}\u{104b0}-\u{104d3}\u{104d8}-\u{104fb}\u{10c80}-\u{10cb2}\u{10cc0}-\u{10cf2}\u{118a0}-\u{118df}\u{1e900}-\u{1e943}]+";
const DEEPSEEK_MARKS: &str = r"\s?[!-/:-~！-／：-～‘-‟　-。]+";
const DEEPSEEK_CJK: &str = r"[一-龥ࠀ-一가-퟿]+";
const DEEPSEEK3_CJK: &str = r"[一-龥぀-ゟ゠-ヿ]+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const SPARK: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"##;
/// Scripts that are written without spaces, and Korean.
const AFMOE_SCRIPTS: &str = r"[一-鿿㐀-䶿豈-﫿぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+";
// Groups of three digits from the right. The groups looked ahead for are bounded, lest a long run of digits
// take the square of its length: from 3,000 digits on, the first are not grouped.
const AFMOE_DIGITS: &str = r"\p{N}{1,3}(?=(?:\p{N}{3}){0,1000}(?!\p{N}))";
/// `\d{1,3}(?=(?:\d{3})*\b)`, with Oniguruma's word characters, which differ from Rust's.
const TINY_AYA_DIGITS: &str = r"\d{1,3}(?=(?:\d{3}){0,1000}(?![[\w&&[^\u{200c}\u{200d}]]²³¹¼½¾]))";
const SUPERBPE_DIGITS: &str = r"(?=(\d{3}){1,1000}(?!\d))";

const PLAIN: Split = Split {
    names: &[],
    steps: &[],
    nfc: false,
    ignore_merges: false,
    begins: false,
};

const SPLITS: [Split; 34] = [
    Split {
        names: &[
            "llama3",
            "llama-v3",
            "llama-bpe",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
            "jina-v5-nano",
        ],
        steps: &[Step::Regex(LLAMA3)],
        ignore_merges: true,
        begins: true,
        ..PLAIN
    },
    Split {
        names: &["glm4", "glm5"],
        steps: &[Step::Regex(LLAMA3)],
        ignore_merges: true,
        ..PLAIN
    },
    Split {
        names: &["dbrx", "smaug-bpe", "chatglm-bpe"],
        steps: &[Step::Regex(LLAMA3)],
        ..PLAIN
    },
    Split {
        names: &["minicpm5"],
        steps: &[Step::Regex(r"\p{N}{1,3}"), Step::Regex(MINICPM5)],
        ignore_merges: true,
        ..PLAIN
    },
    Split {
        names: &["jais-2"],
        steps: &[Step::Regex(JAIS2)],
        ..PLAIN
    },
    Split {
        names: &["qwen2", "deepseek-r1-qwen", "f2llmv2"],
        steps: &[Step::Regex(QWEN2)],
        nfc: true,
        ..PLAIN
    },
    Split {
        names: &[
            "kormo",
            "megrez",
            "stablelm2",
            "hunyuan",
            "solar-open",
            "grok-2",
        ],
        steps: &[Step::Regex(QWEN2)],
        ..PLAIN
    },
    Split {
        names: &["qwen35"],
        steps: &[Step::Regex(QWEN35)],
        nfc: true,
        ..PLAIN
    },
    Split {
        names: &["ufakzeka"],
        steps: &[Step::Regex(UFAKZEKA)],
        ..PLAIN
    },
    Split {
        names: &["laguna"],
        steps: &[Step::Regex(r"[^\n]+|[\n]+"), Step::Regex(QWEN2)],
        ..PLAIN
    },
    Split {
        names: &["seed-coder"],
        steps: &[Step::Regex(SEED_CODER)],
        ..PLAIN
    },
    Split {
        names: &["bailingmoe", "bailingmoe2", "llada-moe"],
        steps: &[Step::Regex(BAILING)],
        ..PLAIN
    },
    Split {
        names: &["tekken"],
        steps: &[Step::Regex(TEKKEN)],
        ignore_merges: true,
        begins: true,
        ..PLAIN
    },
    Split {
        names: &["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"],
        steps: &[Step::Regex(GPT4O)],
        ..PLAIN
    },
    Split {
        names: &["granite-embed-multi-97m"],
        steps: &[Step::Regex(GPT4O)],
        ignore_merges: true,
        ..PLAIN
    },
    Split {
        names: &["tiny_aya", "cohere2moe"],
        steps: &[Step::Regex(TINY_AYA_DIGITS), Step::Regex(GPT4O)],
        ..PLAIN
    },
    Split {
        names: &["kimi-k2"],
        steps: &[Step::Regex(KIMI_K2)],
        ..PLAIN
    },
    Split {
        names: &["youtu"],
        steps: &[Step::Regex(YOUTU_SCRIPTS), Step::Regex(YOUTU)],
        ignore_merges: true,
        ..PLAIN
    },
    Split {
        names: &["exaone-moe"],
        steps: &[Step::Regex(EXAONE_MOE)],
        ..PLAIN
    },
    Split {
        names: &[
            "gpt-2",
            "gpt2",
            "phi-2",
            "jina-es",
            "jina-de",
            "jina-v1-en",
            "jina-v2-es",
            "jina-v2-de",
            "jina-v2-code",
            "roberta-bpe",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "jais",
            "exaone4",
            "trillion",
            "granite-docling",
        ],
        steps: &[Step::Gpt2],
        ..PLAIN
    },
    Split {
        names: &["mpt", "olmo", "modern-bert"],
        steps: &[Step::Gpt2],
        nfc: true,
        ..PLAIN
    },
    Split {
        names: &[
            "starcoder",
            "refact",
            "smollm",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ],
        steps: &[Step::Digit, Step::Gpt2],
        ..PLAIN
    },
    Split {
        names: &["command-r"],
        steps: &[Step::Digit, Step::Gpt2],
        nfc: true,
        ..PLAIN
    },
    Split {
        names: &["falcon"],
        steps: &[
            Step::Marks,
            Step::Gpt2,
            Step::Digits,
            Step::Regex("[0-9][0-9][0-9]"),
        ],
        ..PLAIN
    },
    // llama.cpp's alone, for files that name none.
    Split {
        names: &["default"],
        steps: &[
            Step::Regex(r"[\p{P}\$\+<=>\^~\|]+"),
            Step::Regex(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
            Step::Regex(r"\p{N}+"),
            Step::Regex("[0-9][0-9][0-9]"),
        ],
        ..PLAIN
    },
    Split {
        names: &["chameleon"],
        steps: &[
            Step::Regex("<sentinel:[0-9]+>"),
            Step::Regex("(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z"),
            Step::Regex(r"([\t\n]|    |  )"),
            Step::Digit,
            Step::Mark,
            Step::Gpt2,
        ],
        begins: true,
        ..PLAIN
    },
    Split {
        names: &["deepseek-llm"],
        steps: &[
            Step::Regex(r"[\r\n]"),
            Step::Regex(DEEPSEEK_LETTERS),
            Step::Regex(DEEPSEEK_MARKS),
            Step::Regex(r"\s+$"),
            Step::Regex(DEEPSEEK_CJK),
            Step::Digit,
        ],
        ..PLAIN
    },
    Split {
        names: &["deepseek-coder"],
        steps: &[
            Step::Regex(r"[\r\n]"),
            Step::Regex(r"\s?\p{L}+"),
            Step::Regex(r"\s?\p{P}+"),
            Step::Regex(DEEPSEEK_CJK),
            Step::Digit,
        ],
        ..PLAIN
    },
    Split {
        names: &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
        steps: &[
            Step::Regex(r"\p{N}{1,3}"),
            Step::Regex(DEEPSEEK3_CJK),
            Step::Regex(DEEPSEEK3),
        ],
        ..PLAIN
    },
    Split {
        names: &["spark2_5"],
        steps: &[
            Step::Regex(r"\p{N}{1,3}"),
            Step::Regex(DEEPSEEK3_CJK),
            Step::Regex(SPARK),
            Step::Regex(r"\p{N}"),
        ],
        ..PLAIN
    },
    Split {
        names: &["afmoe"],
        steps: &[
            Step::Regex(AFMOE_DIGITS),
            Step::Regex(AFMOE_SCRIPTS),
            Step::Regex(DEEPSEEK3),
        ],
        ..PLAIN
    },
    Split {
        names: &["bloom", "poro-chat", "gpt3-finnish"],
        steps: &[Step::Regex(BLOOM)],
        ..PLAIN
    },
    Split {
        names: &["viking"],
        steps: &[Step::Regex(BLOOM), Step::Digit],
        ..PLAIN
    },
    Split {
        names: &["superbpe"],
        steps: &[Step::Regex(r"\p{N}+"), Step::Regex(SUPERBPE_DIGITS)],
        ..PLAIN
    },
];

/// The way of that name; otherwise why there is none.
pub(super) fn by_name(name: &str) -> Result<&'static Split, String> {
    let found = SPLITS.iter().find(|split| split.names.contains(&name));
    found.ok_or_else(|| {
        let is_other = OTHERS.contains(&name);
        let name = shown(name);
        if is_other {
            return format!(
                "its text is split as \"{name}\", for a vocabulary that is not byte-level: that is not supported"
            );
        }
        let known: Vec<&str> = names().collect();
        let known = known.join(", ");
        format!("splitting text as \"{name}\" is not supported; these are: {known}")
    })
}

/// All names.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    SPLITS.iter().flat_map(|split| split.names).copied()
}

impl Split {
    /// The pre-tokenizer that `tokenizer.json` has for it.
    pub(super) fn pre_tokenizer(&self) -> Value {
        let mut steps: Vec<Value> = self.steps.iter().map(Step::json).collect();
        if !self.steps.iter().any(|step| matches!(step, Step::Gpt2)) {
            steps.push(byte_level(false));
        }
        json!({"type": "Sequence", "pretokenizers": steps})
    }
}

impl Step {
    fn json(&self) -> Value {
        match self {
            Step::Regex(pattern) => json!({
                "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false,
            }),
            Step::Digit => json!({"type": "Digits", "individual_digits": true}),
            Step::Digits => json!({"type": "Digits", "individual_digits": false}),
            Step::Mark => json!({"type": "Punctuation", "behavior": "Isolated"}),
            Step::Marks => json!({"type": "Punctuation", "behavior": "Contiguous"}),
            Step::Gpt2 => byte_level(true),
        }
    }
}

/// Bytes as characters, after GPT-2's own splitting where `words` says so.
pub(super) fn byte_level(words: bool) -> Value {
    json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": words,
    })
}
