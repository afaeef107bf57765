//! The words of a template, as Jinja2 cuts it: its white space, its newlines, its texts' escapes.

use lexico::shown::shown;

use super::python::is_space;

/// One word of a template.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Token {
    /// Text that is written out as it stands.
    Data(String),
    /// `{{`
    PrintStart,
    /// `}}`
    PrintEnd,
    /// `{%`
    TagStart,
    /// `%}`
    TagEnd,
    Name(String),
    /// A whole number, in digits.
    Integer(String),
    /// Another number, in digits.
    Float(String),
    Text(String),
    Operator(&'static str),
}

/// A word, and the line that it stands on.
pub(super) type Word = (Token, usize);

/// Longest first.
const OPERATORS: [&str; 26] = [
    "**", "//", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}",
    ">", "<", "=", ".", ":", "|", ",", ";",
];

/// Cuts a template into its words; the error says what is wrong, and where.
pub(super) fn words(source: &str) -> Result<Vec<Word>, String> {
    let source = one_kind_of_newline(source);
    // As Jinja2 does unless told not to.
    let source = source.strip_suffix('\n').unwrap_or(&source);
    let mut lexer = Lexer {
        rest: source,
        line: 1,
        line_starts: true,
        words: Vec::new(),
    };
    lexer.run()?;
    Ok(lexer.words)
}

/// Jinja2 makes one newline of each kind that there is.
pub(super) fn one_kind_of_newline(text: &str) -> String {
    text.replace("\r\n", "\n").replace('\r', "\n")
}

struct Lexer<'s> {
    rest: &'s str,
    line: usize,
    /// Whether what was cut off last ended a line.
    line_starts: bool,
    words: Vec<Word>,
}

impl<'s> Lexer<'s> {
    fn run(&mut self) -> Result<(), String> {
        while !self.rest.is_empty() {
            let Some(at) = opening(self.rest) else {
                self.data(self.rest);
                return Ok(());
            };
            let (text, tag) = self.rest.split_at(at);
            if let Some(end) = raw_start(tag) {
                self.data_before(text, &tag[2..], true);
                self.cut(at + end);
                self.raw()?;
                continue;
            }
            let kind = &tag[..2];
            self.data_before(text, &tag[2..], kind != "{{");
            let signed = tag[2..].starts_with(['-', '+']);
            self.cut(at + 2 + usize::from(signed));
            match kind {
                "{#" => self.comment()?,
                "{{" => self.tag(Token::PrintStart, Token::PrintEnd)?,
                _ => self.tag(Token::TagStart, Token::TagEnd)?,
            }
        }
        Ok(())
    }

    fn fail<T>(&self, what: &str) -> Result<T, String> {
        Err(format!("{what} (line {})", self.line))
    }

    /// Goes on behind the next `bytes`.
    fn cut(&mut self, bytes: usize) -> &'s str {
        let (cut, rest) = self.rest.split_at(bytes);
        self.line += cut.matches('\n').count();
        if let Some(last) = cut.chars().next_back() {
            self.line_starts = last == '\n';
        }
        self.rest = rest;
        cut
    }

    fn push(&mut self, token: Token) {
        self.words.push((token, self.line));
    }

    fn data(&mut self, text: &str) {
        if !text.is_empty() {
            self.push(Token::Data(text.to_owned()));
        }
    }

    /// Text before a tag, without the white space that the tag takes away.
    fn data_before(&mut self, text: &str, tag: &str, block: bool) {
        if tag.starts_with('-') {
            return self.data(text.trim_end_matches(is_space));
        }
        if block && !tag.starts_with('+') {
            let line = text.rfind('\n').map_or(0, |at| at + 1);
            if (line > 0 || self.line_starts) && text[line..].chars().all(is_space) {
                return self.data(&text[..line]);
            }
        }
        self.data(text);
    }

    /// Goes on behind white space, and so far behind the end of a tag that took it away.
    fn skip_space(&mut self) {
        let rest = self.rest.trim_start_matches(is_space);
        self.cut(self.rest.len() - rest.len());
    }

    /// The end of a tag where there is one: `%}` with or without a sign.
    fn end(&mut self, close: &str, block: bool) -> bool {
        let signed = |sign| {
            self.rest
                .strip_prefix(sign)
                .is_some_and(|r| r.starts_with(close))
        };
        if signed('-') {
            self.cut(1 + close.len());
            self.skip_space();
            return true;
        }
        if block && signed('+') {
            self.cut(1 + close.len());
            return true;
        }
        if self.rest.starts_with(close) {
            let newline = block && self.rest[close.len()..].starts_with('\n');
            self.cut(close.len() + usize::from(newline));
            return true;
        }
        false
    }

    fn comment(&mut self) -> Result<(), String> {
        let Some(at) = self.rest.find("#}") else {
            return self.fail("a comment has no end");
        };
        // A sign may stand before the end.
        let sign = self.rest[..at].ends_with(['-', '+']);
        self.cut(at - usize::from(sign));
        self.end("#}", true);
        Ok(())
    }

    /// Text up to `{% endraw %}`.
    fn raw(&mut self) -> Result<(), String> {
        let mut from = 0;
        while let Some(at) = self.rest[from..].find("{%") {
            let at = from + at;
            let tag = &self.rest[at + 2..];
            let inside = tag.strip_prefix(['-', '+']).unwrap_or(tag);
            let name = inside.trim_start_matches(is_space).strip_prefix("endraw");
            let close = name.map(|rest| rest.trim_start_matches(is_space));
            let ends = |rest: &str| ["%}", "-%}", "+%}"].iter().any(|end| rest.starts_with(end));
            if let Some(close) = close.filter(|rest| ends(rest)) {
                let text = &self.rest[..at];
                self.data_before(text, tag, true);
                self.cut(self.rest.len() - close.len());
                self.end("%}", true);
                return Ok(());
            }
            from = at + 2;
        }
        self.fail("{% raw %} has no {% endraw %}")
    }

    /// Words up to the end of a tag.
    fn tag(&mut self, start: Token, end: Token) -> Result<(), String> {
        let close = if end == Token::PrintEnd { "}}" } else { "%}" };
        let block = end == Token::TagEnd;
        self.push(start);
        let mut open: Vec<&str> = Vec::new();
        loop {
            self.skip_space();
            if open.is_empty() && self.end(close, block) {
                self.push(end);
                return Ok(());
            }
            let Some(first) = self.rest.chars().next() else {
                return self.fail("a tag has no end");
            };
            if let Some((float, length)) = number(self.rest) {
                let digits = self.cut(length).replace('_', "");
                self.push(if float {
                    Token::Float(digits)
                } else {
                    Token::Integer(
                        decimal(&digits).map_or_else(|| self.fail("a number is too large"), Ok)?,
                    )
                });
            } else if first == '_' || first.is_alphabetic() {
                let word = |c: char| c == '_' || c.is_alphanumeric();
                let length = self.rest.find(|c| !word(c)).unwrap_or(self.rest.len());
                let name = self.cut(length).to_owned();
                self.push(Token::Name(name));
            } else if first == '\'' || first == '"' {
                self.text(first)?;
            } else if let Some(operator) = OPERATORS.iter().find(|o| self.rest.starts_with(**o)) {
                match *operator {
                    "(" => open.push(")"),
                    "[" => open.push("]"),
                    "{" => open.push("}"),
                    ")" | "]" | "}" if open.pop() != Some(operator) => {
                        return self.fail(&format!("there is a {operator:?} too many"));
                    }
                    _ => {}
                }
                self.cut(operator.len());
                self.push(Token::Operator(operator));
            } else {
                return self.fail(&format!("unexpected {first:?}"));
            }
        }
    }

    fn text(&mut self, quote: char) -> Result<(), String> {
        let mut escaped = false;
        let end = self.rest.char_indices().skip(1).find(|(_, c)| {
            let ends = *c == quote && !escaped;
            escaped = *c == '\\' && !escaped;
            ends
        });
        let Some((end, _)) = end else {
            return self.fail("a text has no end");
        };
        let inside = unescape(&self.rest[1..end]);
        let inside = inside.or_else(|why| self.fail(&why))?;
        self.push(Token::Text(inside));
        self.cut(end + 1);
        Ok(())
    }
}

/// Where the first `{{`, `{%` or `{#` is.
fn opening(text: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    let pair = |pair: &[u8]| pair[0] == b'{' && matches!(pair[1], b'{' | b'%' | b'#');
    bytes.windows(2).position(pair)
}

/// Length of `{% raw %}` where the tag is one, with the white space that its end takes away.
fn raw_start(tag: &str) -> Option<usize> {
    let inside = tag.strip_prefix("{%")?;
    let inside = inside.strip_prefix(['-', '+']).unwrap_or(inside);
    let rest = inside.trim_start_matches(is_space).strip_prefix("raw")?;
    let rest = rest.trim_start_matches(is_space);
    let rest = match rest.strip_prefix("-%}") {
        Some(rest) => rest.trim_start_matches(is_space),
        None => rest.strip_prefix("%}")?,
    };
    Some(tag.len() - rest.len())
}

/// Length of the number at the beginning, and whether it is a fraction.
fn number(text: &str) -> Option<(bool, usize)> {
    let bytes = text.as_bytes();
    // Digits with single underscores between them.
    let digits = |from: usize, digit: fn(&u8) -> bool| {
        let mut at = from;
        while bytes.get(at).is_some_and(digit)
            || (at > from && bytes.get(at) == Some(&b'_') && bytes.get(at + 1).is_some_and(digit))
        {
            at += 1;
        }
        (at > from).then_some(at)
    };
    let first = digits(0, u8::is_ascii_digit)?;
    let fraction = match bytes.get(first) {
        Some(b'.') => digits(first + 1, u8::is_ascii_digit),
        _ => None,
    };
    let mantissa = fraction.unwrap_or(first);
    let exponent = match bytes.get(mantissa) {
        Some(b'e' | b'E') => {
            let sign = matches!(bytes.get(mantissa + 1), Some(b'+' | b'-'));
            digits(mantissa + 1 + usize::from(sign), u8::is_ascii_digit)
        }
        _ => None,
    };
    if let Some(end) = exponent.or(fraction) {
        return Some((true, end));
    }
    let other: Option<fn(&u8) -> bool> = match bytes.get(1).map(u8::to_ascii_lowercase) {
        Some(b'x') => Some(u8::is_ascii_hexdigit),
        Some(b'o') => Some(|b| (b'0'..=b'7').contains(b)),
        Some(b'b') => Some(|b| matches!(b, b'0' | b'1')),
        _ => None,
    };
    if bytes[0] == b'0' {
        let underscore = usize::from(bytes.get(2) == Some(&b'_'));
        if let Some(end) = other.and_then(|digit| digits(2 + underscore, digit)) {
            return Some((false, end));
        }
        // A number does not begin with 0.
        return Some((false, digits(0, |b| *b == b'0')?));
    }
    Some((false, first))
}

/// A whole number in Python's notation, in decimal digits.
fn decimal(digits: &str) -> Option<String> {
    let radix = match digits.get(..2).unwrap_or("").to_ascii_lowercase().as_str() {
        "0x" => 16,
        "0o" => 8,
        "0b" => 2,
        _ => 10,
    };
    let digits = if radix == 10 { digits } else { &digits[2..] };
    i128::from_str_radix(digits, radix)
        .ok()
        .map(|n| n.to_string())
}

/// The text that Python's escapes stand for.
fn unescape(text: &str) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let Some(kind) = rest.chars().next() else {
            return Err("a text ends within an escape".into());
        };
        rest = &rest[kind.len_utf8()..];
        let plain = match kind {
            '\n' => Some(""),
            '\\' => Some("\\"),
            '\'' => Some("'"),
            '"' => Some("\""),
            'a' => Some("\x07"),
            'b' => Some("\x08"),
            'f' => Some("\x0c"),
            'n' => Some("\n"),
            'r' => Some("\r"),
            't' => Some("\t"),
            'v' => Some("\x0b"),
            _ => None,
        };
        if let Some(plain) = plain {
            out.push_str(plain);
            continue;
        }
        let hexadecimal = match kind {
            'x' => 2,
            'u' => 4,
            'U' => 8,
            'N' => {
                let name = rest.strip_prefix('{').and_then(|rest| rest.split_once('}'));
                let Some((name, after)) = name else {
                    return Err("\\N without a name in braces".into());
                };
                let Some(c) = unicode_names2::character(name) else {
                    return Err(format!("no character is named \"{}\"", shown(name)));
                };
                out.push(c);
                rest = after;
                continue;
            }
            '0'..='7' => {
                let more = rest
                    .bytes()
                    .take(2)
                    .take_while(|b| (b'0'..=b'7').contains(b))
                    .count();
                let digits = format!("{kind}{}", &rest[..more]);
                let code = u32::from_str_radix(&digits, 8)
                    .ok()
                    .and_then(char::from_u32);
                out.extend(code);
                rest = &rest[more..];
                continue;
            }
            other => {
                out.push('\\');
                out.push(other);
                continue;
            }
        };
        let digits = rest.get(..hexadecimal);
        let digits = digits.filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()));
        let code = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
        let Some(code) = code else {
            return Err(format!("\\{kind} without its {hexadecimal} digits"));
        };
        let Some(c) = char::from_u32(code) else {
            return Err(format!("\\{kind} of {code:x}, which is no character"));
        };
        out.push(c);
        rest = &rest[hexadecimal..];
    }
    out.push_str(rest);
    Ok(out)
}
