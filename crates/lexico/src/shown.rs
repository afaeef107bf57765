//! Text from outside as messages show it: bounded, and with nothing in it that steers a terminal.
//!
//! File names, keys, values, the errors of parsers that quote them: all of it goes through here before a person
//! sees it.

use std::fmt::{Display, Write};
use std::path::Path;

/// Characters of a piece of outside text that are shown at most.
const PIECE: usize = 240;
/// Characters of a whole message, or of a path, that are shown at most.
const MESSAGE: usize = 1200;

/// A name, a value, or another parser's error, which may quote them: its beginning and its end where it is long.
pub fn shown(text: impl Display) -> String {
    bounded(&text.to_string(), PIECE)
}

/// A whole message, in which outside text may stand.
pub fn shown_message(text: impl Display) -> String {
    bounded(&text.to_string(), MESSAGE)
}

/// A path.
pub fn shown_path(path: &Path) -> String {
    bounded(&path.to_string_lossy(), MESSAGE)
}

/// Escapes what steers a terminal or hides text, and leaves all else as it is, however long. Line ends stay.
pub fn escaped_lines(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    text.chars().for_each(|c| push(&mut out, c, c == '\n'));
    out
}

fn bounded(text: &str, max: usize) -> String {
    let mut out = String::new();
    let count = text.chars().take(max + 1).count();
    if count <= max {
        text.chars().for_each(|c| push(&mut out, c, false));
        return out;
    }
    // What was expected, and where, stands at the end of most messages.
    let (first, last) = (max * 2 / 3, max / 3);
    text.chars()
        .take(first)
        .for_each(|c| push(&mut out, c, false));
    out.push_str(" … ");
    let end = text.char_indices().rev().nth(last - 1);
    let end = &text[end.map_or(0, |(at, _)| at)..];
    end.chars().for_each(|c| push(&mut out, c, false));
    out
}

fn push(out: &mut String, c: char, whole: bool) {
    match c {
        _ if whole || !steers(c) => out.push(c),
        '\n' => out.push_str("\\n"),
        '\r' => out.push_str("\\r"),
        '\t' => out.push_str("\\t"),
        // Nothing fails that writes to a string.
        _ => drop(write!(out, "\\u{{{:x}}}", u32::from(c))),
    }
}

/// Returns true of control characters, and of those that are not seen or turn the direction of what is.
fn steers(c: char) -> bool {
    let unseen = matches!(c,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}');
    c.is_control() || unseen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_steers_a_terminal_is_escaped() {
        let text = "\u{1b}[31mred\u{9b}1m\r\n\u{202e}evil\u{2066}\u{7f}";
        let safe = r"\u{1b}[31mred\u{9b}1m\r\n\u{202e}evil\u{2066}\u{7f}";
        assert_eq!(shown(text), safe);
        assert_eq!(escaped_lines("a\n\u{1b}b"), "a\n\\u{1b}b");
        // Letters of any script, marks on them, quotes and backslashes are text.
        let plain = r#"e\u{301} "é" d'œuvre 漢字 שלום C:\dir 🙂"#.replace(r"\u{301}", "\u{301}");
        assert_eq!(shown(&plain), plain);
    }

    #[test]
    fn long_text_keeps_its_beginning_and_its_end() {
        let text = format!(
            "invalid type: string \"{}\", expected a map",
            "é".repeat(1 << 20)
        );
        let short = shown(text);
        assert!(short.starts_with("invalid type: string \"é"), "{short}");
        assert!(short.ends_with("é\", expected a map"), "{short}");
        assert!(short.chars().count() < PIECE + 10);
        // Escapes make it longer, by no more than ten times.
        assert!(shown("\u{e0001}".repeat(1000)).len() < 10 * (PIECE + 10));
        let most = "x".repeat(PIECE);
        assert_eq!(shown(&most), most);
    }
}
