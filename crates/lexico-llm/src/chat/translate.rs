//! A template as Jinja2 reads it, written down for minijinja: the grammar is that of Jinja2's parser, rule by rule.
//!
//! minijinja runs the result. What it does otherwise than Jinja2, and offers no hook for, is written as a filter of
//! [`super::operators`]: `a % b` as `a|__mod(b)`. White space, newlines and escapes are dealt with before, by
//! [`super::lexer`].

use std::fmt::Write;

use super::lexer::{Token, Word, shortened, words};
use super::methods::is_method_name;

/// Longest source of a template: a hundred times that of a long one.
const LONGEST: usize = 1 << 20;
/// Levels of brackets and tags within each other.
const DEEPEST: usize = 60;
/// Links of a chain: operators, filters, branches of an `if`.
const LONGEST_CHAIN: usize = 200;

/// Words that stand between expressions, and name nothing.
const KEYWORDS: [&str; 7] = ["and", "else", "if", "in", "is", "not", "or"];

/// How tightly an expression holds together: one of less must stand in brackets where more is wanted.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
enum Hold {
    Choice,
    Or,
    And,
    Not,
    Sum,
    Product,
    Power,
    Filter,
    Primary,
}

/// An expression for minijinja.
struct Expression {
    text: String,
    hold: Hold,
    /// Whether it is the call of something.
    call: bool,
}

impl Expression {
    fn new(text: String, hold: Hold) -> Self {
        let call = false;
        Self { text, hold, call }
    }

    /// Its text, in brackets where it would come apart.
    fn within(self, hold: Hold) -> String {
        if self.hold < hold {
            return format!("({})", self.text);
        }
        self.text
    }

    /// The expression through a filter.
    fn through(self, filter: &str) -> Self {
        let text = format!("{}|{filter}", self.within(Hold::Filter));
        Self::new(text, Hold::Filter)
    }
}

type Parsed<T> = Result<T, String>;

/// Writes a template down for minijinja; the error says what is wrong, and where.
pub(super) fn translate(source: &str) -> Parsed<String> {
    if source.len() > LONGEST {
        return Err(format!("it is longer than {LONGEST} bytes"));
    }
    let mut parser = Parser {
        words: words(source)?,
        at: 0,
        out: String::new(),
        line: 1,
        depth: 0,
        in_loop: false,
        leaves: false,
        in_macro: false,
    };
    parser.body(&[])?;
    Ok(parser.out)
}

struct Parser {
    words: Vec<Word>,
    at: usize,
    out: String,
    /// The line that `out` ends on.
    line: usize,
    depth: usize,
    in_loop: bool,
    /// Whether the loop has a `break` or `continue`.
    leaves: bool,
    in_macro: bool,
}

impl Parser {
    fn now(&self) -> Option<&Token> {
        self.words.get(self.at).map(|(token, _)| token)
    }

    fn after(&self) -> Option<&Token> {
        self.words.get(self.at + 1).map(|(token, _)| token)
    }

    fn fail<T>(&self, what: &str) -> Parsed<T> {
        let at = self.at.min(self.words.len().saturating_sub(1));
        let line = self.words.get(at).map_or(1, |(_, line)| *line);
        Err(format!("{what} (line {line})"))
    }

    fn is(&self, operator: &str) -> bool {
        matches!(self.now(), Some(Token::Operator(o)) if *o == operator)
    }

    fn is_name(&self, name: &str) -> bool {
        matches!(self.now(), Some(Token::Name(n)) if n == name)
    }

    fn skip(&mut self, operator: &str) -> bool {
        let is = self.is(operator);
        self.at += usize::from(is);
        is
    }

    fn skip_name(&mut self, name: &str) -> bool {
        let is = self.is_name(name);
        self.at += usize::from(is);
        is
    }

    fn expect(&mut self, operator: &str) -> Parsed<()> {
        if self.skip(operator) {
            return Ok(());
        }
        self.fail(&format!("{operator:?} is missing"))
    }

    fn expect_token(&mut self, token: &Token) -> Parsed<()> {
        if self.now() == Some(token) {
            self.at += 1;
            return Ok(());
        }
        let found = match self.now() {
            Some(Token::Name(name)) => shortened(name),
            Some(Token::Operator(operator)) => (*operator).to_owned(),
            _ => return self.fail("a tag does not end where it should"),
        };
        self.fail(&format!("unexpected {found:?}"))
    }

    fn name(&mut self) -> Parsed<String> {
        match self.now() {
            Some(Token::Name(name)) => {
                let name = name.clone();
                self.at += 1;
                Ok(name)
            }
            _ => self.fail("a name is missing"),
        }
    }

    /// Counts one level more while `work` is done.
    fn deeper<T>(&mut self, work: impl FnOnce(&mut Self) -> Parsed<T>) -> Parsed<T> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return self.fail(&format!(
                "more than {DEEPEST} brackets or tags within each other"
            ));
        }
        let done = work(self)?;
        self.depth -= 1;
        Ok(done)
    }

    /// Counts a link of a chain.
    fn link(&self, links: &mut usize) -> Parsed<()> {
        *links += 1;
        if *links > LONGEST_CHAIN {
            return self.fail(&format!(
                "more than {LONGEST_CHAIN} operators or branches in a row"
            ));
        }
        Ok(())
    }

    // Tags.

    /// Writes a tag, on the line that it has in the source.
    fn tag(&mut self, open: &str, inside: &str, close: &str) {
        let at = self.at.saturating_sub(1);
        let line = self.words.get(at).map_or(1, |(_, line)| *line);
        self.out.push_str(open);
        while self.line < line {
            self.out.push('\n');
            self.line += 1;
        }
        let _ = write!(self.out, " {inside} {close}");
    }

    fn statement(&mut self, inside: &str) {
        self.tag("{%", inside, "%}");
    }

    /// Text and tags up to a tag of one of these names, which is left to read.
    fn body(&mut self, ends: &[&str]) -> Parsed<()> {
        while let Some(token) = self.now() {
            match token {
                Token::Data(text) => {
                    let text = text.clone();
                    self.at += 1;
                    self.data(&text);
                }
                Token::PrintStart => {
                    self.at += 1;
                    let printed = self.tuple(true, &[])?;
                    self.expect_token(&Token::PrintEnd)?;
                    self.tag("{{", &printed.text, "}}");
                }
                Token::TagStart => {
                    self.at += 1;
                    if ends.iter().any(|end| self.is_name(end)) {
                        return Ok(());
                    }
                    self.deeper(Self::any_tag)?;
                }
                _ => return self.fail("a tag does not end where it should"),
            }
        }
        match ends.last() {
            Some(end) => self.fail(&format!("{{% {end} %}} is missing")),
            None => Ok(()),
        }
    }

    /// Writes text that stands between tags; minijinja must not see a tag in it.
    fn data(&mut self, text: &str) {
        if text.contains('{') {
            let text = quoted(text);
            return self.tag("{{", &text, "}}");
        }
        self.line += text.matches('\n').count();
        self.out.push_str(text);
    }

    /// Text and tags up to `{% end %}`, and that.
    fn body_to(&mut self, end: &str) -> Parsed<()> {
        self.body(&[end])?;
        self.at += 1;
        self.end_tag()
    }

    /// A body that keeps to itself what it sets.
    fn closed_body(&mut self, end: &str) -> Parsed<()> {
        let in_loop = std::mem::take(&mut self.in_loop);
        self.statement("with");
        self.body_to(end)?;
        self.statement("endwith");
        self.in_loop = in_loop;
        Ok(())
    }

    fn end_tag(&mut self) -> Parsed<()> {
        self.expect_token(&Token::TagEnd)
    }

    fn any_tag(&mut self) -> Parsed<()> {
        let name = self.name()?;
        match name.as_str() {
            "for" => self.for_tag(),
            "if" => self.if_tag(),
            "set" => self.set_tag(),
            "with" => self.with_tag(),
            "macro" => self.macro_tag(),
            "call" => self.call_tag(),
            "filter" => {
                let filters = self.filters()?;
                self.end_tag()?;
                self.statement(&format!("filter {filters}"));
                self.closed_body("endfilter")?;
                self.statement("endfilter");
                Ok(())
            }
            "generation" => {
                self.end_tag()?;
                self.closed_body("endgeneration")
            }
            "print" => {
                let printed = self.tuple(true, &[])?;
                self.end_tag()?;
                self.tag("{{", &printed.text, "}}");
                Ok(())
            }
            "break" | "continue" => {
                if !self.in_loop {
                    return self.fail(&format!(
                        "{{% {name} %}} outside of a loop, or in a block within it"
                    ));
                }
                self.end_tag()?;
                self.leaves = true;
                self.statement(&name);
                Ok(())
            }
            "include" | "import" | "from" | "extends" | "block" | "autoescape" => {
                self.at -= 1;
                self.fail(&format!(
                    "{{% {name} %}} is not taken: a chat template stands alone"
                ))
            }
            _ => {
                self.at -= 1;
                self.fail(&format!("there is no tag {:?} here", shortened(&name)))
            }
        }
    }

    fn for_tag(&mut self) -> Parsed<()> {
        let target = self.target(&["in"], false)?;
        if !self.skip_name("in") {
            return self.fail("\"in\" is missing");
        }
        let each = if target.contains(',') {
            "__each(true)"
        } else {
            "__each"
        };
        let iterated = self.tuple(false, &["recursive"])?.through(each);
        let mut inside = format!("for {target} in {}", iterated.text);
        if self.skip_name("if") {
            let condition = self.expression()?;
            let _ = write!(inside, " if {}", condition.within(Hold::Or));
        }
        if self.skip_name("recursive") {
            inside.push_str(" recursive");
        }
        self.end_tag()?;
        self.statement(&inside);
        let in_loop = std::mem::replace(&mut self.in_loop, true);
        let leaves = std::mem::take(&mut self.leaves);
        self.body(&["else", "endfor"])?;
        self.in_loop = in_loop;
        let leaves = std::mem::replace(&mut self.leaves, leaves);
        if leaves && self.is_name("else") {
            // Jinja2 goes on there where no item was gone through to its end.
            return self
                .fail("{% else %} of a loop with {% break %} or {% continue %} is not taken");
        }
        if self.skip_name("else") {
            self.end_tag()?;
            self.statement("else");
            self.body(&["endfor"])?;
        }
        self.at += 1;
        self.end_tag()?;
        self.statement("endfor");
        Ok(())
    }

    fn if_tag(&mut self) -> Parsed<()> {
        let mut branches = 0;
        let mut inside = "if";
        loop {
            self.link(&mut branches)?;
            let condition = self.tuple(false, &[])?;
            self.end_tag()?;
            self.statement(&format!("{inside} {}", condition.text));
            self.body(&["elif", "else", "endif"])?;
            if !self.skip_name("elif") {
                break;
            }
            inside = "elif";
        }
        if self.skip_name("else") {
            self.end_tag()?;
            self.statement("else");
            self.body(&["endif"])?;
        }
        self.at += 1;
        self.end_tag()?;
        self.statement("endif");
        Ok(())
    }

    fn set_tag(&mut self) -> Parsed<()> {
        let from = self.at;
        let target = self.target(&[], true)?;
        // minijinja gives a macro only the names that it reads.
        for (at, pair) in self.words[from..self.at].windows(2).enumerate() {
            if let (Token::Name(name), Token::Operator(".")) = (&pair[0].0, &pair[1].0) {
                let private = self.words.get(from + at + 2);
                if matches!(private, Some((Token::Name(name), _)) if name.starts_with('_')) {
                    return self.fail("an attribute of a namespace may not begin with \"_\"");
                }
                let _ = write!(self.out, "{{% if {name} is defined %}}{{% endif %}}");
            }
        }
        if self.skip("=") {
            let value = self.tuple(true, &[])?.through("__kept");
            self.end_tag()?;
            self.statement(&format!("set {target} = {}", value.text));
            return Ok(());
        }
        let filters = match self.skip("|") {
            true => format!(" | {}", self.filters()?),
            false => String::new(),
        };
        self.end_tag()?;
        self.statement(&format!("set {target}{filters}"));
        self.closed_body("endset")?;
        self.statement("endset");
        Ok(())
    }

    /// `{% with %}`: no value sees the names that stand beside it.
    fn with_tag(&mut self) -> Parsed<()> {
        let (mut values, mut names) = (Vec::new(), Vec::new());
        while self.now() != Some(&Token::TagEnd) {
            if !values.is_empty() {
                self.expect(",")?;
            }
            let target = match self.is("(") {
                true => format!("({})", self.target(&[], false)?),
                false => self.name()?,
            };
            self.expect("=")?;
            let value = self.expression()?.text;
            names.push(format!("{target} = __with{}", values.len()));
            values.push(format!("__with{} = {value}", values.len()));
        }
        self.end_tag()?;
        self.statement(&format!("with {}", values.join(", ")));
        self.statement(&format!("with {}", names.join(", ")));
        // minijinja cannot leave a loop out of it.
        let in_loop = std::mem::take(&mut self.in_loop);
        self.body_to("endwith")?;
        self.in_loop = in_loop;
        self.statement("endwith");
        self.statement("endwith");
        Ok(())
    }

    /// Names of a macro, and tags that set those that were not given.
    fn signature(&mut self) -> Parsed<(String, Vec<String>)> {
        let (mut names, mut defaults) = (Vec::new(), Vec::new());
        self.expect("(")?;
        while !self.is(")") {
            if !names.is_empty() {
                self.expect(",")?;
            }
            let name = self.name()?;
            if self.skip("=") {
                let value = self.expression()?.text;
                defaults.push(format!("if {name} is undefined"));
                defaults.push(format!("set {name} = {value}"));
                defaults.push("endif".to_owned());
            } else if !defaults.is_empty() {
                return self.fail("a name without a value follows one with a value");
            }
            names.push(name);
        }
        self.expect(")")?;
        Ok((names.join(", "), defaults))
    }

    fn macro_tag(&mut self) -> Parsed<()> {
        let name = self.name()?;
        let (names, defaults) = self.signature()?;
        self.end_tag()?;
        self.statement(&format!("macro {name}({names})"));
        self.macro_body(&defaults, "endmacro")
    }

    fn call_tag(&mut self) -> Parsed<()> {
        let (names, defaults) = match self.is("(") {
            true => self.signature()?,
            false => (String::new(), Vec::new()),
        };
        let called = self.expression()?;
        if !called.call {
            return self.fail("{% call %} is not of a call");
        }
        self.end_tag()?;
        self.statement(&format!("call({names}) {}", called.text));
        self.macro_body(&defaults, "endcall")
    }

    fn macro_body(&mut self, defaults: &[String], end: &str) -> Parsed<()> {
        let in_loop = std::mem::take(&mut self.in_loop);
        let in_macro = std::mem::replace(&mut self.in_macro, true);
        for tag in defaults {
            self.statement(tag);
        }
        self.body_to(end)?;
        self.statement(end);
        self.in_loop = in_loop;
        self.in_macro = in_macro;
        Ok(())
    }

    /// What is set: a name, names with commas, and attributes of a namespace.
    fn target(&mut self, ends: &[&str], attributes: bool) -> Parsed<String> {
        let mut targets = Vec::new();
        let mut many = false;
        loop {
            let ended = ends.iter().any(|end| self.is_name(end));
            if ended || self.is("=") || self.is(")") {
                break;
            }
            targets.push(if self.skip("(") {
                let inner = self.deeper(|parser| parser.target(&[], attributes))?;
                self.expect(")")?;
                format!("({inner})")
            } else {
                let mut name = self.name()?;
                if attributes && self.skip(".") {
                    name = format!("{name}.{}", self.name()?);
                }
                name
            });
            if !self.skip(",") {
                break;
            }
            many = true;
        }
        match (targets.len(), many) {
            (0, _) => self.fail("a name is missing"),
            (1, true) => Ok(format!("{},", targets[0])),
            _ => Ok(targets.join(", ")),
        }
    }

    // Expressions.

    /// An expression, or several with commas between them.
    fn tuple(&mut self, choice: bool, ends: &[&str]) -> Parsed<Expression> {
        let mut items = Vec::new();
        let mut many = false;
        loop {
            let ended = matches!(self.now(), Some(Token::PrintEnd | Token::TagEnd) | None);
            if ended || self.is(")") || ends.iter().any(|end| self.is_name(end)) {
                break;
            }
            items.push(match choice {
                true => self.expression()?,
                false => self.deeper(Self::or)?,
            });
            if !self.skip(",") {
                break;
            }
            many = true;
        }
        match (items.pop(), many) {
            (None, _) => self.fail("an expression is missing"),
            (Some(one), false) => Ok(one),
            (Some(last), true) => {
                items.push(last);
                Ok(tuple_of(items))
            }
        }
    }

    fn expression(&mut self) -> Parsed<Expression> {
        self.deeper(Self::choice)
    }

    fn choice(&mut self) -> Parsed<Expression> {
        let mut links = 0;
        let mut left = self.or()?;
        while self.skip_name("if") {
            self.link(&mut links)?;
            let condition = self.or()?.within(Hold::Or);
            let mut text = format!("{} if {condition}", left.within(Hold::Or));
            if self.skip_name("else") {
                let other = self.expression()?;
                let _ = write!(text, " else {}", other.text);
            }
            left = Expression::new(text, Hold::Choice);
        }
        Ok(left)
    }

    fn or(&mut self) -> Parsed<Expression> {
        let mut links = 0;
        let mut left = self.and()?;
        while self.skip_name("or") {
            self.link(&mut links)?;
            let right = self.and()?.within(Hold::And);
            left = Expression::new(format!("{} or {right}", left.within(Hold::Or)), Hold::Or);
        }
        Ok(left)
    }

    fn and(&mut self) -> Parsed<Expression> {
        let mut links = 0;
        let mut left = self.not()?;
        while self.skip_name("and") {
            self.link(&mut links)?;
            let right = self.not()?.within(Hold::Not);
            left = Expression::new(format!("{} and {right}", left.within(Hold::And)), Hold::And);
        }
        Ok(left)
    }

    fn not(&mut self) -> Parsed<Expression> {
        if !self.skip_name("not") {
            return self.comparison();
        }
        let negated = self.deeper(Self::not)?;
        Ok(Expression::new(
            format!("not {}", negated.within(Hold::Not)),
            Hold::Not,
        ))
    }

    fn comparison(&mut self) -> Parsed<Expression> {
        let left = self.sum()?;
        let mut links = 0;
        let mut compared = Vec::new();
        loop {
            let operator = match self.now() {
                Some(Token::Operator(o @ ("==" | "!=" | "<" | "<=" | ">" | ">="))) => *o,
                Some(Token::Name(name)) if name == "in" => "in",
                Some(Token::Name(name)) if name == "not" && self.after_is_in() => {
                    self.at += 1;
                    "not in"
                }
                _ => break,
            };
            self.at += 1;
            self.link(&mut links)?;
            compared.push(format!("'{operator}', {}", self.sum()?.text));
        }
        if compared.is_empty() {
            return Ok(left);
        }
        Ok(left.through(&format!("__compare({})", compared.join(", "))))
    }

    fn after_is_in(&self) -> bool {
        matches!(self.after(), Some(Token::Name(name)) if name == "in")
    }

    fn sum(&mut self) -> Parsed<Expression> {
        let mut links = 0;
        let mut left = self.joined()?;
        loop {
            if self.skip("+") {
                let right = self.joined()?;
                left = left.through(&format!("__add({})", right.text));
            } else if self.skip("-") {
                let right = self.joined()?.within(Hold::Product);
                left = Expression::new(format!("{} - {right}", left.within(Hold::Sum)), Hold::Sum);
            } else {
                return Ok(left);
            }
            self.link(&mut links)?;
        }
    }

    /// `a ~ b`
    fn joined(&mut self) -> Parsed<Expression> {
        let first = self.product()?;
        let mut links = 0;
        let mut others = Vec::new();
        while self.skip("~") {
            self.link(&mut links)?;
            others.push(self.product()?.text);
        }
        if others.is_empty() {
            return Ok(first);
        }
        Ok(first.through(&format!("__concat({})", others.join(", "))))
    }

    fn product(&mut self) -> Parsed<Expression> {
        let mut links = 0;
        let mut left = self.power()?;
        loop {
            let Some(Token::Operator(operator @ ("*" | "/" | "//" | "%"))) = self.now().cloned()
            else {
                return Ok(left);
            };
            self.at += 1;
            self.link(&mut links)?;
            let right = self.power()?;
            left = match operator {
                "%" => left.through(&format!("__mod({})", right.text)),
                "*" => left.through(&format!("__times({})", right.text)),
                _ => {
                    let right = right.within(Hold::Power);
                    let text = format!("{} {operator} {right}", left.within(Hold::Product));
                    Expression::new(text, Hold::Product)
                }
            };
        }
    }

    fn power(&mut self) -> Parsed<Expression> {
        let mut links = 0;
        let mut left = self.unary(true)?;
        while self.skip("**") {
            self.link(&mut links)?;
            let right = self.unary(true)?.within(Hold::Filter);
            left = Expression::new(
                format!("{} ** {right}", left.within(Hold::Power)),
                Hold::Power,
            );
        }
        Ok(left)
    }

    fn unary(&mut self, filters: bool) -> Parsed<Expression> {
        let mut value = if self.skip("-") {
            self.deeper(|parser| parser.unary(false))?.through("__neg")
        } else if self.skip("+") {
            self.deeper(|parser| parser.unary(false))?.through("__pos")
        } else {
            self.primary()?
        };
        value = self.postfix(value)?;
        match filters {
            true => self.filtered(value),
            false => Ok(value),
        }
    }

    fn primary(&mut self) -> Parsed<Expression> {
        let Some(token) = self.now().cloned() else {
            return self.fail("an expression is missing");
        };
        self.at += 1;
        let text = match token {
            Token::Name(name) => {
                let of_macro = self.in_macro && ["varargs", "kwargs"].contains(&name.as_str());
                if of_macro || name == "self" || KEYWORDS.contains(&name.as_str()) {
                    self.at -= 1;
                    return self.fail(&format!("{name:?} is not taken"));
                }
                name
            }
            Token::Text(mut text) => {
                while let Some(Token::Text(more)) = self.now() {
                    text.push_str(more);
                    self.at += 1;
                }
                quoted(&text)
            }
            Token::Integer(digits) | Token::Float(digits) => digits,
            Token::Operator("(") => {
                let inner = match self.is(")") {
                    true => Expression::new("()".to_owned(), Hold::Primary),
                    false => self.tuple(true, &[])?,
                };
                self.expect(")")?;
                return Ok(Expression::new(inner.within(Hold::Primary), Hold::Primary));
            }
            Token::Operator("[") => {
                let items = self.items("]", |parser| Ok(parser.expression()?.text))?;
                format!("[{items}]")
            }
            Token::Operator("{") => {
                let items = self.items("}", |parser| {
                    let key = parser.expression()?.text;
                    parser.expect(":")?;
                    Ok(format!("{key}: {}", parser.expression()?.text))
                })?;
                format!("{{{items}}}")
            }
            _ => {
                self.at -= 1;
                return self.fail("an expression is missing");
            }
        };
        Ok(Expression::new(text, Hold::Primary))
    }

    /// Items with commas between them, up to a closing bracket.
    fn items(&mut self, close: &str, item: impl Fn(&mut Self) -> Parsed<String>) -> Parsed<String> {
        let mut items = Vec::new();
        while !self.is(close) {
            if !items.is_empty() {
                self.expect(",")?;
            }
            if self.is(close) {
                break;
            }
            items.push(item(self)?);
        }
        self.expect(close)?;
        Ok(items.join(", "))
    }

    /// Attributes, items and calls that follow an expression.
    fn postfix(&mut self, mut value: Expression) -> Parsed<Expression> {
        let mut links = 0;
        loop {
            if self.skip(".") {
                value = self.attribute(value)?;
            } else if self.skip("[") {
                value = self.deeper(|parser| parser.subscript(value))?;
            } else if self.is("(") {
                value = self.call(value)?;
            } else {
                return Ok(value);
            }
            self.link(&mut links)?;
        }
    }

    fn attribute(&mut self, value: Expression) -> Parsed<Expression> {
        if let Some(Token::Integer(digits)) = self.now().cloned() {
            self.at += 1;
            return Ok(value.through(&format!("__item({digits})")));
        }
        let name = self.name()?;
        let called = self.is("(");
        if called && name == "cycle" && self.after() == Some(&Token::Operator(")")) {
            return self.fail("cycle() has nothing to cycle through");
        }
        if !called && (is_method_name(&name) || name.starts_with("__")) {
            return Ok(value.through(&format!("__method('{name}')")));
        }
        let text = format!("{}.{name}", value.within(Hold::Primary));
        Ok(Expression::new(text, Hold::Primary))
    }

    fn subscript(&mut self, value: Expression) -> Parsed<Expression> {
        let mut items = Vec::new();
        let mut slice = None;
        while !self.is("]") {
            if !items.is_empty() || slice.is_some() {
                self.expect(",")?;
            }
            let start = match self.is(":") {
                true => None,
                false => Some(self.expression()?),
            };
            if !self.skip(":") {
                items.extend(start);
                continue;
            }
            let mut bounds = vec![start];
            for _ in 0..2 {
                let given = !(self.is(":") || self.is("]") || self.is(","));
                bounds.push(given.then(|| self.expression()).transpose()?);
                if bounds.len() == 2 && !self.skip(":") {
                    bounds.push(None);
                    break;
                }
            }
            let bounds = bounds
                .into_iter()
                .map(|bound| bound.map_or("none".into(), |b| b.text));
            slice = Some(bounds.collect::<Vec<_>>().join(", "));
        }
        self.expect("]")?;
        match (slice, items.len()) {
            (Some(bounds), 0) => Ok(value.through(&format!("__slice({bounds})"))),
            (Some(_), _) => self.fail("a slice beside other items"),
            (None, 0) => self.fail("an item is missing"),
            (None, count) => {
                let item = match items.pop() {
                    Some(item) if count == 1 => item,
                    last => tuple_of(items.into_iter().chain(last).collect()),
                };
                Ok(value.through(&format!("__item({})", item.text)))
            }
        }
    }

    fn call(&mut self, value: Expression) -> Parsed<Expression> {
        let arguments = self.deeper(Self::arguments)?;
        let text = format!("{}({arguments})", value.within(Hold::Primary));
        let (hold, call) = (Hold::Primary, true);
        Ok(Expression { text, hold, call })
    }

    fn arguments(&mut self) -> Parsed<String> {
        let (mut plain, mut named) = (Vec::new(), Vec::new());
        let (mut star, mut stars) = (None, None);
        self.expect("(")?;
        let mut first = true;
        while !self.is(")") {
            if !first {
                self.expect(",")?;
                if self.is(")") {
                    break;
                }
            }
            first = false;
            let is_named = matches!(self.now(), Some(Token::Name(_)))
                && self.after() == Some(&Token::Operator("="));
            if self.skip("*") && star.is_none() && stars.is_none() {
                star = Some(format!("*{}", self.expression()?.within(Hold::Primary)));
            } else if self.skip("**") && stars.is_none() {
                stars = Some(format!("**{}", self.expression()?.within(Hold::Primary)));
            } else if is_named && stars.is_none() {
                let name = self.name()?;
                self.expect("=")?;
                named.push(format!("{name}={}", self.expression()?.text));
            } else if star.is_none() && stars.is_none() && named.is_empty() {
                plain.push(self.expression()?.text);
            } else {
                return self.fail("the arguments of a call are in disorder");
            }
        }
        self.expect(")")?;
        plain.extend(star);
        plain.append(&mut named);
        plain.extend(stars);
        Ok(plain.join(", "))
    }

    /// A chain of filters that begins here, without a value.
    fn filters(&mut self) -> Parsed<String> {
        let mut links = 0;
        let mut filters = vec![self.filter()?];
        while self.skip("|") {
            self.link(&mut links)?;
            filters.push(self.filter()?);
        }
        Ok(filters.join("|"))
    }

    fn filter(&mut self) -> Parsed<String> {
        let mut name = self.name()?;
        while self.skip(".") {
            name = format!("{name}.{}", self.name()?);
        }
        if !self.is("(") {
            return Ok(name);
        }
        Ok(format!("{name}({})", self.deeper(Self::arguments)?))
    }

    /// Filters, tests and calls that follow an expression.
    fn filtered(&mut self, mut value: Expression) -> Parsed<Expression> {
        let mut links = 0;
        loop {
            if self.skip("|") {
                let filter = self.filter()?;
                value = value.through(&filter);
            } else if self.skip_name("is") {
                value = self.test(value)?;
            } else if self.is("(") {
                value = self.call(value)?;
            } else {
                return Ok(value);
            }
            self.link(&mut links)?;
        }
    }

    fn test(&mut self, value: Expression) -> Parsed<Expression> {
        let negation = if self.skip_name("not") { "not " } else { "" };
        let mut name = self.name()?;
        while self.skip(".") {
            name = format!("{name}.{}", self.name()?);
        }
        let argument = match self.now() {
            Some(Token::Name(name)) if name == "is" => {
                return self.fail("two tests in a row; \"and\" joins them");
            }
            Some(Token::Name(name)) => !["else", "or", "and"].contains(&name.as_str()),
            Some(Token::Text(_) | Token::Integer(_) | Token::Float(_)) => true,
            Some(Token::Operator(operator)) => ["[", "{"].contains(operator),
            _ => false,
        };
        let arguments = if self.is("(") {
            self.deeper(Self::arguments)?
        } else if argument {
            let argument = self.primary()?;
            self.deeper(|parser| parser.postfix(argument))?.text
        } else {
            String::new()
        };
        let value = value.within(Hold::Filter);
        let text = format!("{value} is {negation}{name}({arguments})");
        Ok(Expression::new(text, Hold::Filter))
    }
}

fn tuple_of(items: Vec<Expression>) -> Expression {
    let comma = if items.len() == 1 { "," } else { "" };
    let items: Vec<String> = items.into_iter().map(|item| item.text).collect();
    Expression::new(format!("({}{comma})", items.join(", ")), Hold::Primary)
}

/// A text in minijinja's notation, on one line.
fn quoted(text: &str) -> String {
    let text = text
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n");
    format!("\"{text}\"")
}
