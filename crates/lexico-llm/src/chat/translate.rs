//! A template as Jinja2 reads it, written down for minijinja: the grammar is that of Jinja2's parser, rule by rule.
//!
//! minijinja runs the result. What it does otherwise than Jinja2, and offers no hook for, is written as a filter of
//! [`super::operators`]: `a % b` as `a|__mod(b)`. White space, newlines and escapes are dealt with before, by
//! [`super::lexer`].

use std::fmt::Write;

use lexico::shown::shown;
use minijinja::{Environment, Value};

use super::lexer::{Token, Word, words};
use super::methods::is_method_name;
use super::python::is_true;

/// Longest source of a template: a hundred times that of a long one.
const LONGEST: usize = 1 << 20;
/// Levels of brackets and tags within each other.
const DEEPEST: usize = 60;
/// Links of a chain: operators, filters, branches of an `if`.
const LONGEST_CHAIN: usize = 200;

/// Words that stand between expressions, and name nothing.
const KEYWORDS: [&str; 7] = ["and", "else", "if", "in", "is", "not", "or"];

/// Names of values.
const CONSTANTS: [&str; 6] = ["true", "True", "false", "False", "none", "None"];

/// Names that a macro's body may read without declaring them, in the order in which Jinja2 passes them.
const UNDECLARED: [&str; 3] = ["caller", "kwargs", "varargs"];

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

/// Whether Jinja2 works an expression out before it runs the template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Constant {
    No,
    /// It has a choice between what it works out and what it does not.
    Perhaps,
    Yes,
}

impl Constant {
    /// Of `and` and `or`, whose right side is not always looked at.
    fn or_other(self, other: Self) -> Self {
        match (self, other) {
            (Self::Yes, Self::Yes) => Self::Yes,
            (Self::No, _) => Self::No,
            _ => Self::Perhaps,
        }
    }

    /// Of a choice that this is the condition of.
    fn of_choice(self, left: Self, right: Self) -> Self {
        match self {
            Self::Yes if left == right => left,
            Self::No => Self::No,
            _ => Self::Perhaps,
        }
    }
}

/// What Jinja2's compiler knows of `{% autoescape %}` at a place. What is printed goes by that, and not by what is in force
/// when it is printed, which differs where a loop is left from within or a macro is called from elsewhere.
#[derive(Debug, Clone, Copy, Default)]
struct Escaping {
    on: bool,
    /// Within one by a value that is not known: what is no constant goes by what is in force.
    unknown: bool,
}

/// Filters that Jinja2 works out for constants by what its compiler knows of `{% autoescape %}`.
pub(super) const ESCAPING_FILTERS: [&str; 4] = ["join", "replace", "urlize", "xmlattr"];

/// Filters that Jinja2 never works out beforehand.
const FILTERS_OF_CONTEXT: [&str; 6] = [
    "map",
    "random",
    "reject",
    "rejectattr",
    "select",
    "selectattr",
];

/// An expression for minijinja.
struct Expression {
    text: String,
    hold: Hold,
    constant: Constant,
    /// What is called, and with what, where it is a call.
    call: Option<(String, Arguments)>,
}

/// The arguments of a call.
struct Arguments {
    /// Whether all of them are constants.
    constant: Constant,
    given: Vec<String>,
    /// `**named`, which stands last.
    stars: Option<String>,
}

impl Arguments {
    fn text(&self) -> String {
        let all: Vec<&str> = self
            .given
            .iter()
            .chain(&self.stars)
            .map(String::as_str)
            .collect();
        all.join(", ")
    }
}

/// A loop that tags stand in.
struct Loop {
    /// The hidden name of what says how it was left from a block within it.
    left: String,
    /// Blocks between the loop and here, out of which minijinja cannot jump.
    blocks: usize,
    /// Whether it has a `break` or `continue`.
    leaves: bool,
    /// Whether one of them is within a block.
    leaves_block: bool,
}

/// What a macro's body does with the names of [`UNDECLARED`].
#[derive(Default)]
struct MacroNames {
    read: [bool; UNDECLARED.len()],
    /// Those that it declares or sets before it reads them.
    own: [bool; UNDECLARED.len()],
}

impl MacroNames {
    fn reads(&mut self, name: &str) {
        if let Some(at) = UNDECLARED.iter().position(|known| *known == name) {
            self.read[at] |= !self.own[at];
        }
    }

    fn sets(&mut self, name: &str) {
        if let Some(at) = UNDECLARED.iter().position(|known| *known == name) {
            self.own[at] |= !self.read[at];
        }
    }

    /// Those that are read and not the body's own.
    fn undeclared(&self) -> Vec<&'static str> {
        let read = UNDECLARED.iter().zip(&self.read).filter(|(_, read)| **read);
        read.map(|(name, _)| *name).collect()
    }
}

/// The names that a macro declares.
struct Signature {
    names: Vec<String>,
    /// The values of the last names where they are not given.
    defaults: Vec<String>,
}

impl Expression {
    fn new(text: String, hold: Hold, constant: Constant) -> Self {
        let call = None;
        Self {
            text,
            hold,
            constant,
            call,
        }
    }

    /// Its text, in brackets where it would come apart.
    fn within(self, hold: Hold) -> String {
        if self.hold < hold {
            return format!("({})", self.text);
        }
        self.text
    }

    /// The expression through a filter whose arguments are constants.
    fn through(self, filter: &str) -> Self {
        self.through_with(filter, Constant::Yes)
    }

    /// The expression through a filter; `constant` says whether its arguments are constants.
    fn through_with(self, filter: &str, constant: Constant) -> Self {
        let constant = self.constant.min(constant);
        let text = format!("{}|{filter}", self.within(Hold::Filter));
        Self::new(text, Hold::Filter, constant)
    }
}

type Parsed<T> = Result<T, String>;

/// Writes a template down for minijinja; the error says what is wrong, and where. `environment` is the one that will run it:
/// it works out constants.
pub(super) fn translate(source: &str, environment: &Environment) -> Parsed<String> {
    if source.len() > LONGEST {
        return Err(format!("it is longer than {LONGEST} bytes"));
    }
    let words = words(source)?;
    let has = |name: &str| {
        words
            .iter()
            .any(|(word, _)| matches!(word, Token::Name(word) if word == name))
    };
    let (escapes, reads_self, asks_identity) = (has("autoescape"), has("self"), has("sameas"));
    let mut parser = Parser {
        words,
        at: 0,
        out: String::new(),
        line: 1,
        depth: 0,
        hidden: 0,
        inside: None,
        skips: false,
        scopes: 0,
        loops: Vec::new(),
        macro_names: None,
        blocks: Vec::new(),
        block_macros: String::new(),
        reads_self,
        asks_identity,
        scoped_block: None,
        environment,
        attributes: String::new(),
        escaping: Escaping::default(),
        escapes,
    };
    parser.body(&[])?;
    parser.finish()
}

struct Parser<'e> {
    words: Vec<Word>,
    at: usize,
    out: String,
    /// The line that `out` ends on.
    line: usize,
    depth: usize,
    /// Hidden names that were made.
    hidden: usize,
    /// The loop that a `break` would leave.
    inside: Option<Loop>,
    /// Whether what follows in a body is to be passed over where the loop has been left.
    skips: bool,
    /// Scopes around the tag.
    scopes: usize,
    /// What `loop` is called of the loops around the tag, also of those that no `break` leaves from here.
    loops: Vec<String>,
    macro_names: Option<MacroNames>,
    blocks: Vec<String>,
    /// The blocks as macros, which stand before all else: they see no more than what the template itself sets.
    block_macros: String,
    /// Whether the template has the name `self` at all.
    reads_self: bool,
    /// Whether the template has the test `sameas` at all.
    asks_identity: bool,
    /// The scoped block around the tag.
    scoped_block: Option<ScopedBlock>,
    environment: &'e Environment<'e>,
    /// Tags that give attributes of namespaces their values, behind the tag at hand.
    attributes: String,
    escaping: Escaping,
    /// Whether the template has `{% autoescape %}` at all.
    escapes: bool,
}

/// A block that sees what is around it: so do the blocks within it, and those that it calls by `self`.
struct ScopedBlock {
    /// What `loop` is called around it.
    loops: Vec<String>,
    /// The blocks within it that are not scoped, as macros.
    block_macros: String,
    /// Whether it has the name `self`.
    reads_self: bool,
}

/// Stands for all blocks until they are known.
const ALL_BLOCKS: &str = "{% set __all_blocks %}";

impl Parser<'_> {
    fn finish(self) -> Parsed<String> {
        let mut start = self.block_macros;
        if self.reads_self {
            let blocks = self
                .blocks
                .iter()
                .map(|name| format!("'{name}': __block_{name}"));
            let blocks: Vec<String> = blocks.collect();
            let _ = write!(
                start,
                "{{% set __self = {{{}}}|__blocks %}}",
                blocks.join(", ")
            );
        }
        if start.contains(ALL_BLOCKS) {
            return Err("self in a scoped block within a block is not taken".to_owned());
        }
        Ok(start.clone() + &self.out.replace(ALL_BLOCKS, &start))
    }

    /// A name that no template uses.
    fn hidden(&mut self, kind: &str) -> String {
        self.hidden += 1;
        format!("__{kind}{}", self.hidden)
    }

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
            Some(Token::Name(name)) => shown(name),
            Some(Token::Operator(operator)) => (*operator).to_owned(),
            _ => return self.fail("a tag does not end where it should"),
        };
        self.fail(&format!("unexpected \"{found}\""))
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

    /// Prints a value, escaped where Jinja2 does.
    fn print(&mut self, printed: Expression) -> Parsed<()> {
        let printed = match (printed.constant, self.escaping) {
            (Constant::Perhaps, Escaping { unknown: true, .. }) => {
                return self.fail(
                    "a choice of a constant within {% autoescape %} by what is no constant is not taken",
                );
            }
            (Constant::No, Escaping { unknown: true, .. }) => printed.through("__escaped_if"),
            (_, Escaping { on: true, .. }) => printed.through("__escaped"),
            _ => printed,
        };
        self.tag("{{", &printed.text, "}}");
        Ok(())
    }

    /// The filter that a text of the template itself goes through to be safe where it is escaped.
    fn made_safe(&self) -> &'static str {
        match self.escaping {
            Escaping { unknown: true, .. } => "|__safe_if",
            Escaping { on: true, .. } => "|safe",
            _ => "",
        }
    }

    /// Text and tags up to a tag of one of these names, which is left to read.
    fn body(&mut self, ends: &[&str]) -> Parsed<()> {
        let outside = std::mem::take(&mut self.skips);
        let mut guarded = false;
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
                    self.print(printed)?;
                }
                Token::TagStart => {
                    self.at += 1;
                    if ends.iter().any(|end| self.is_name(end)) {
                        if guarded {
                            self.statement("endif");
                        }
                        self.skips = outside || guarded;
                        return Ok(());
                    }
                    self.deeper(Self::any_tag)?;
                    if std::mem::take(&mut self.skips) {
                        if guarded {
                            self.statement("endif");
                        }
                        guarded = true;
                        self.unless_left();
                    }
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

    /// Text and tags up to `{% end %}`, which keep to themselves what they set.
    fn closed_body(&mut self, end: &str) -> Parsed<()> {
        self.statement("with");
        self.scoped(|parser| parser.body_to(end))?;
        self.statement("endwith");
        Ok(())
    }

    /// Counts one block more around a body.
    fn scoped(&mut self, body: impl FnOnce(&mut Self) -> Parsed<()>) -> Parsed<()> {
        self.scopes += 1;
        if let Some(inside) = &mut self.inside {
            inside.blocks += 1;
        }
        body(self)?;
        if let Some(inside) = &mut self.inside {
            inside.blocks -= 1;
        }
        self.scopes -= 1;
        Ok(())
    }

    /// A body that is a function of its own to Python: no `break` leaves a loop around it.
    fn function<T>(&mut self, body: impl FnOnce(&mut Self) -> Parsed<T>) -> Parsed<T> {
        let inside = self.inside.take();
        self.scopes += 1;
        let done = body(self)?;
        self.scopes -= 1;
        self.inside = inside;
        Ok(done)
    }

    // minijinja cannot jump out of a block, such as `{% with %}`. A `break` or `continue` within one says so in a hidden
    // namespace, what follows in the block is passed over, and the loop is left where the block ends.

    /// Opens an `if` around what is passed over where the loop has been left.
    fn unless_left(&mut self) {
        if let Some(inside) = &self.inside {
            let tag = format!("if not {}.by", inside.left);
            self.statement(&tag);
        }
    }

    /// Leaves the loop behind the end of a block that told to; where that is in a block too, its end does.
    fn leave(&mut self) {
        let Some(inside) = self
            .inside
            .as_ref()
            .filter(|inside| self.skips && inside.blocks == 0)
        else {
            return;
        };
        let left = inside.left.clone();
        self.skips = false;
        self.statement(&format!("if {left}.by == 'break'"));
        self.statement("break");
        self.statement(&format!("elif {left}.by == 'continue'"));
        self.statement("continue");
        self.statement("endif");
    }

    /// The value of an expression of constants, unless it has none.
    fn worked_out(&self, expression: &str) -> Option<Value> {
        let compiled = self.environment.compile_expression(expression);
        compiled.ok()?.eval(()).ok()
    }

    fn leave_tag(&mut self, name: &str) -> Parsed<()> {
        self.end_tag()?;
        let Some(inside) = &mut self.inside else {
            return self.fail(&format!("{{% {name} %}} outside of a loop"));
        };
        inside.leaves = true;
        if inside.blocks == 0 {
            self.statement(name);
            return Ok(());
        }
        inside.leaves_block = true;
        let tag = format!("set {}.by = '{name}'", inside.left);
        self.statement(&tag);
        self.skips = true;
        Ok(())
    }

    /// The text that a block makes, written out or set by a tag behind it.
    fn captured(&mut self, end: &str, open: &str, inside: &str, close: &str) -> Parsed<()> {
        self.statement("set __block");
        self.closed_body(end)?;
        self.statement("endset");
        if self.skips {
            self.unless_left();
        }
        self.tag(open, inside, close);
        if self.skips {
            self.statement("endif");
        }
        self.leave();
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
                let filtered = format!("__block{}|{filters}|__written", self.made_safe());
                self.captured("endfilter", "{{", &filtered, "}}")
            }
            "generation" => {
                self.end_tag()?;
                self.function(|parser| parser.closed_body("endgeneration"))
            }
            "autoescape" => self.autoescape_tag(),
            "block" => self.block_tag(),
            "print" => {
                let printed = self.tuple(true, &[])?;
                self.end_tag()?;
                self.print(printed)
            }
            "break" | "continue" => self.leave_tag(&name),
            "include" | "import" | "from" | "extends" => self.load_tag(&name),
            _ => {
                self.at -= 1;
                self.fail(&format!("there is no tag \"{}\" here", shown(&name)))
            }
        }
    }

    /// `{% autoescape %}`: what is in force is set before and set back after, which Jinja2 does not do either where a
    /// loop is left from within.
    fn autoescape_tag(&mut self) -> Parsed<()> {
        let value = self.expression()?;
        self.end_tag()?;
        let before = self.escaping;
        match value.constant {
            Constant::Yes => match self.worked_out(&value.text) {
                Some(known) => self.escaping.on = is_true(&known),
                None => self.escaping.unknown = true,
            },
            Constant::Perhaps => {
                return self.fail("{% autoescape %} by a choice of constants is not taken");
            }
            Constant::No => self.escaping.unknown = true,
        }
        let outside = self.hidden("outside");
        self.statement("with");
        let set = value.through("__escape").text;
        self.statement(&format!("set {outside} = {set}"));
        self.scoped(|parser| parser.body_to("endautoescape"))?;
        self.escaping = before;
        if self.skips {
            self.unless_left();
        }
        self.statement(&format!("set {outside} = {outside}|__escape"));
        if self.skips {
            self.statement("endif");
        }
        self.statement("endwith");
        self.leave();
        Ok(())
    }

    fn for_tag(&mut self) -> Parsed<()> {
        // The name `loop` is a loop's own.
        self.loops.push("loop".to_owned());
        let target = self.target(&["in"], false)?;
        self.loops.pop();
        if !self.skip_name("in") {
            return self.fail("\"in\" is missing");
        }
        let each = if target.contains(',') {
            "__each(true)"
        } else {
            "__each"
        };
        let iterated = self.tuple(false, &["recursive"])?;
        let condition = match self.skip_name("if") {
            true => format!(" if {}", self.expression()?.within(Hold::Or)),
            false => String::new(),
        };
        let recursive = self.skip_name("recursive");
        self.end_tag()?;
        if !recursive {
            let iterated = iterated.through(each).text;
            let this = format!("for {target} in {iterated}{condition}");
            self.for_body(&this, "", "loop".to_owned())?;
            self.leave();
            return Ok(());
        }
        // A macro that calls itself: minijinja's own recursive loops pass over `if` and `else` from the second level on.
        let hidden = self.hidden("recursive");
        let begins = self.out.len();
        let from = self.at;
        let this = format!("for {target} in {hidden}_items|{each}{condition}");
        let this_loop = format!("{hidden}_loop");
        // Its caller is that of the macro around it.
        let start =
            format!("{{% set {this_loop} = loop|__recursive({hidden}, {hidden}_depth, caller) %}}");
        let no_caller = start.replace(", caller", "");
        let outer = self.inside.take();
        self.scopes += 1;
        let body = self.out.len();
        self.for_body(&this, &start, this_loop)?;
        self.scopes -= 1;
        self.inside = outer;
        let is_caller = |(word, _): &Word| matches!(word, Token::Name(name) if name == "caller");
        let caller = match self.words[from..self.at].iter().any(is_caller) {
            true => ", caller",
            false => {
                let own = self.out.split_off(body).replacen(&start, &no_caller, 1);
                self.out.push_str(&own);
                ""
            }
        };
        let start = format!("{{% macro {hidden}({hidden}_items, {hidden}_depth{caller}) %}}");
        self.out.insert_str(begins, &start);
        self.statement("endmacro");
        self.tag(
            "{{",
            &format!("{hidden}({}, 0{caller})", iterated.text),
            "}}",
        );
        Ok(())
    }

    /// A loop's body and its `else`; `this` is its tag, `start` stands where each round begins.
    fn for_body(&mut self, this: &str, start: &str, name: String) -> Parsed<()> {
        let before = self.out.len();
        self.statement(this);
        let begins = self.out.len();
        self.out.push_str(start);
        let left = self.hidden("left");
        let outer = self.inside.replace(Loop {
            left,
            blocks: 0,
            leaves: false,
            leaves_block: false,
        });
        self.loops.push(name);
        self.scopes += 1;
        self.body(&["else", "endfor"])?;
        self.scopes -= 1;
        self.loops.pop();
        let this = std::mem::replace(&mut self.inside, outer);
        let this = this.map_or((String::new(), false, false), |l| {
            (l.left, l.leaves, l.leaves_block)
        });
        let (left, leaves, leaves_block) = this;
        let has_else = self.is_name("else");
        if leaves_block {
            let flag = format!("{{% set {left} = __flag() %}}");
            self.out.insert_str(begins, &flag);
        }
        // Jinja2 goes on at `else` where no item was gone through to its end.
        let done = self.hidden("done");
        if leaves && has_else {
            let flag = format!("{{% set {done} = __flag() %}}");
            self.out.insert_str(before, &flag);
            self.statement(&format!("set {done}.by = true"));
            self.statement("endfor");
            self.statement(&format!("if not {done}.by"));
        } else if has_else {
            self.statement("else");
        }
        if has_else {
            self.at += 1;
            self.end_tag()?;
            self.closed_body("endfor")?;
        } else {
            self.at += 1;
            self.end_tag()?;
        }
        self.statement(if leaves && has_else {
            "endif"
        } else {
            "endfor"
        });
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
        let target = self.target(&[], true)?;
        let attributes = std::mem::take(&mut self.attributes);
        if self.skip("=") {
            let value = self.tuple(true, &[])?.through("__kept");
            self.end_tag()?;
            self.statement(&format!("set {target} = {}", value.text));
            self.out.push_str(&attributes);
            return Ok(());
        }
        let filters = match self.skip("|") {
            true => format!("{}|{}", self.made_safe(), self.filters()?),
            false => String::new(),
        };
        self.end_tag()?;
        let made = format!("set {target} = __block{filters}|__safe_if");
        self.captured("endset", "{%", &made, &format!("%}}{attributes}"))
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
                false => self.set_name()?,
            };
            self.expect("=")?;
            let value = self.expression()?.text;
            names.push(format!("{target} = __with{}", values.len()));
            values.push(format!("__with{} = {value}", values.len()));
        }
        self.end_tag()?;
        self.statement(&format!("with {}", values.join(", ")));
        self.statement(&format!("with {}", names.join(", ")));
        self.scoped(|parser| parser.body_to("endwith"))?;
        self.statement("endwith");
        self.statement("endwith");
        self.leave();
        Ok(())
    }

    fn signature(&mut self) -> Parsed<Signature> {
        let (mut names, mut defaults) = (Vec::new(), Vec::new());
        self.expect("(")?;
        while !self.is(")") {
            if !names.is_empty() {
                self.expect(",")?;
            }
            let name = self.name()?;
            if names.contains(&name) {
                return self.fail("a macro has two arguments of one name");
            }
            if self.skip("=") {
                defaults.push(self.expression()?.text);
            } else if !defaults.is_empty() {
                return self.fail("a name without a value follows one with a value");
            }
            names.push(name);
        }
        self.expect(")")?;
        Ok(Signature { names, defaults })
    }

    fn macro_tag(&mut self) -> Parsed<()> {
        let name = self.set_name()?;
        let signature = self.signature()?;
        self.end_tag()?;
        let made = self.macro_body(&quoted(&name), &signature, "endmacro")?;
        self.statement(&format!("set {name} = {made}"));
        Ok(())
    }

    fn call_tag(&mut self) -> Parsed<()> {
        let signature = match self.is("(") {
            true => self.signature()?,
            false => Signature {
                names: Vec::new(),
                defaults: Vec::new(),
            },
        };
        let Some((called, mut arguments)) = self.expression()?.call else {
            return self.fail("{% call %} is not of a call");
        };
        self.end_tag()?;
        let caller = self.macro_body("none", &signature, "endcall")?;
        arguments.given.push(format!("caller={caller}"));
        self.tag(
            "{{",
            &format!("{called}({})|__written", arguments.text()),
            "}}",
        );
        Ok(())
    }

    /// A macro up to its end; returns the expression of it. minijinja's own has a fixed number of arguments, so that
    /// `__macro` makes those of one that Jinja2 would call.
    fn macro_body(&mut self, name: &str, signature: &Signature, end: &str) -> Parsed<String> {
        let mut names = MacroNames::default();
        let mut declared = Vec::new();
        for name in &signature.names {
            if name != "caller" {
                names.sets(name);
            }
            declared.push(self.renamed(name)?);
        }
        let begins = self.out.len();
        let outer = self.macro_names.replace(names);
        self.function(|parser| parser.body_to(end))?;
        self.statement("endmacro");
        let names = std::mem::replace(&mut self.macro_names, outer).unwrap_or_default();
        let mut undeclared = names.undeclared();
        if let Some(outer) = &mut self.macro_names {
            undeclared.iter().for_each(|name| outer.reads(name));
        }
        let required = signature.names.len() - signature.defaults.len();
        if let Some(at) = signature.names.iter().position(|name| name == "caller") {
            if undeclared.contains(&"caller") && at < required {
                return self.fail("an argument named \"caller\" has a value of its own");
            }
            undeclared.retain(|name| *name != "caller");
        }
        let body = self.hidden("macro");
        let all: Vec<&str> = declared
            .iter()
            .map(String::as_str)
            .chain(undeclared.iter().copied())
            .collect();
        let mut start = format!("{{% macro {body}({}) %}}", all.join(", "));
        for (name, value) in declared[required..].iter().zip(&signature.defaults) {
            let _ = write!(
                start,
                "{{% if {name} is __missing %}}{{% set {name} = {value} %}}{{% endif %}}"
            );
        }
        self.out.insert_str(begins, &start);
        let list = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| quoted(name)).collect();
            format!("[{}]", names.join(", "))
        };
        let names: Vec<&str> = signature.names.iter().map(String::as_str).collect();
        let (given, optional) = names.split_at(required);
        let (given, optional, undeclared) = (list(given), list(optional), list(&undeclared));
        Ok(format!(
            "{body}|__macro({name}, {given}, {optional}, {undeclared})"
        ))
    }

    /// A block is written where it stands. It sees what the template itself has set, and nothing of loops and macros
    /// around it, unless it is `scoped`.
    fn block_tag(&mut self) -> Parsed<()> {
        let name = self.name()?;
        let scoped = self.skip_name("scoped");
        let required = self.skip_name("required");
        self.end_tag()?;
        if self.blocks.contains(&name) {
            return self.fail(&format!("the block \"{}\" is there twice", shown(&name)));
        }
        self.blocks.push(name.clone());
        let names = self.macro_names.take();
        let loops = self.loops.clone();
        let around = std::mem::take(&mut self.out);
        let mut outer = None;
        if scoped {
            outer = self.scoped_block.replace(ScopedBlock {
                loops: loops.clone(),
                block_macros: String::new(),
                reads_self: false,
            });
        } else {
            let scoped_block = self.scoped_block.as_ref();
            self.loops = scoped_block.map_or_else(Vec::new, |block| block.loops.clone());
        }
        // Jinja2 compiles blocks apart.
        let escaping = std::mem::take(&mut self.escaping);
        self.function(|parser| {
            parser.body(&["endblock"])?;
            parser.at += 1;
            parser.skip_name(&name);
            parser.end_tag()
        })?;
        let body = std::mem::replace(&mut self.out, around);
        self.macro_names = names;
        self.loops = loops;
        self.escaping = escaping;
        let block = format!(
            "{{% macro __block_{name}() %}}{body}{{% endmacro %}}\
             {{% set __block_{name} = __block_{name}|__macro('{name}', [], [], []) %}}"
        );
        // A scoped block that `self` calls from outside does not see what is around it.
        if self.reads_self || !(scoped || self.scoped_block.is_some()) {
            self.block_macros.push_str(&block);
        }
        if !scoped && let Some(scoped_block) = &mut self.scoped_block {
            scoped_block.block_macros.push_str(&block);
        }
        let within = match scoped {
            true => std::mem::replace(&mut self.scoped_block, outer),
            false => None,
        };
        if let Some(within) = within {
            self.out.push_str("{% with %}");
            if within.reads_self {
                self.out.push_str(ALL_BLOCKS);
            }
            self.out.push_str(&within.block_macros);
            self.out.push_str(&block);
        }
        let written = match required {
            true => "__load('a block that is required is not there')".to_owned(),
            false => format!("__block_{name}()"),
        };
        self.tag("{{", &written, "}}");
        if scoped {
            self.out.push_str("{% endwith %}");
        }
        Ok(())
    }

    /// Tags that take in other templates: there are none, and where one is reached that is an error.
    fn load_tag(&mut self, name: &str) -> Parsed<()> {
        if name == "extends" && self.scopes > 0 {
            return self.fail("{% extends %} within a loop, macro or block");
        }
        self.expression()?;
        match name {
            "include" => {
                if self.skip_name("ignore") && !self.skip_name("missing") {
                    return self.fail("\"missing\" is missing");
                }
                self.skip_context();
            }
            "import" => {
                self.expect_name("as")?;
                self.set_name()?;
                self.skip_context();
            }
            "from" => {
                self.expect_name("import")?;
                loop {
                    if self.skip_context() {
                        break;
                    }
                    if self.name()?.starts_with('_') {
                        return self.fail("what begins with \"_\" cannot be imported");
                    }
                    if self.skip_name("as") {
                        self.set_name()?;
                    }
                    if self.skip_context() || !self.skip(",") {
                        break;
                    }
                }
            }
            _ => {}
        }
        self.end_tag()?;
        self.tag(
            "{{",
            "__load('a chat template stands alone: there is no other one to load')",
            "}}",
        );
        Ok(())
    }

    /// `with context` or `without context`
    fn skip_context(&mut self) -> bool {
        let named = self.is_name("with") || self.is_name("without");
        let is = named && matches!(self.after(), Some(Token::Name(name)) if name == "context");
        self.at += 2 * usize::from(is);
        is
    }

    fn expect_name(&mut self, name: &str) -> Parsed<()> {
        if self.skip_name(name) {
            return Ok(());
        }
        self.fail(&format!("{name:?} is missing"))
    }

    /// A name that is given a value.
    fn set_name(&mut self) -> Parsed<String> {
        let name = self.name()?;
        if let Some(names) = &mut self.macro_names {
            names.sets(&name);
        }
        self.renamed(&name)
    }

    /// A name as minijinja takes it: two of its own are a template's to use.
    fn renamed(&self, name: &str) -> Parsed<String> {
        match name {
            "loop" if !self.loops.is_empty() => {
                self.fail("a name \"loop\" of one's own within a loop is not taken")
            }
            "loop" => Ok("__loop".to_owned()),
            "self" => Ok("__self".to_owned()),
            _ => Ok(name.to_owned()),
        }
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
                let inner = self.deeper(|parser| parser.target(&[], false))?;
                self.expect(")")?;
                format!("({inner})")
            } else {
                let name = self.set_name()?;
                match attributes && self.skip(".") {
                    true => self.attribute_target(&name)?,
                    false => name,
                }
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

    /// What stands for an attribute of a namespace that is set: a hidden name, of which tags behind give it its value.
    fn attribute_target(&mut self, namespace: &str) -> Parsed<String> {
        let attribute = self.name()?;
        if attribute.starts_with('_') {
            return self.fail("an attribute of a namespace may not begin with \"_\"");
        }
        let value = self.hidden("value");
        let _ = write!(
            self.attributes,
            "{{{{ {namespace}|__set('{attribute}', {value}) }}}}"
        );
        Ok(value)
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
            let condition = self.or()?;
            let (mut constant, mut other_constant) = (condition.constant, Constant::No);
            let left_constant = left.constant;
            let condition = condition.within(Hold::Or);
            let mut text = format!("{} if {condition}", left.within(Hold::Or));
            if self.skip_name("else") {
                let other = self.expression()?;
                other_constant = other.constant;
                let _ = write!(text, " else {}", other.text);
            }
            constant = constant.of_choice(left_constant, other_constant);
            left = Expression::new(text, Hold::Choice, constant);
        }
        Ok(left)
    }

    fn or(&mut self) -> Parsed<Expression> {
        let mut links = 0;
        let mut left = self.and()?;
        while self.skip_name("or") {
            self.link(&mut links)?;
            let right = self.and()?;
            let constant = left.constant.or_other(right.constant);
            let right = right.within(Hold::And);
            let text = format!("{} or {right}", left.within(Hold::Or));
            left = Expression::new(text, Hold::Or, constant);
        }
        Ok(left)
    }

    fn and(&mut self) -> Parsed<Expression> {
        let mut links = 0;
        let mut left = self.not()?;
        while self.skip_name("and") {
            self.link(&mut links)?;
            let right = self.not()?;
            let constant = left.constant.or_other(right.constant);
            let right = right.within(Hold::Not);
            let text = format!("{} and {right}", left.within(Hold::And));
            left = Expression::new(text, Hold::And, constant);
        }
        Ok(left)
    }

    fn not(&mut self) -> Parsed<Expression> {
        if !self.skip_name("not") {
            return self.comparison();
        }
        let negated = self.deeper(Self::not)?;
        let constant = negated.constant;
        let text = format!("not {}", negated.within(Hold::Not));
        Ok(Expression::new(text, Hold::Not, constant))
    }

    fn comparison(&mut self) -> Parsed<Expression> {
        let left = self.sum()?;
        let mut links = 0;
        let mut compared = Vec::new();
        let mut constant = Constant::Yes;
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
            let right = self.sum()?;
            constant = match compared.is_empty() {
                true => right.constant,
                // Not looked at where what stands before is false.
                false => constant.or_other(right.constant),
            };
            compared.push(format!("'{operator}', {}", right.text));
        }
        if compared.is_empty() {
            return Ok(left);
        }
        let filter = format!("__compare({})", compared.join(", "));
        Ok(left.through_with(&filter, constant))
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
                left = left.through_with(&format!("__add({})", right.text), right.constant);
            } else if self.skip("-") {
                let right = self.joined()?;
                let constant = left.constant.min(right.constant);
                let right = right.within(Hold::Product);
                let text = format!("{} - {right}", left.within(Hold::Sum));
                left = Expression::new(text, Hold::Sum, constant);
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
        let mut constant = Constant::Yes;
        while self.skip("~") {
            self.link(&mut links)?;
            let other = self.product()?;
            constant = constant.min(other.constant);
            others.push(other.text);
        }
        if others.is_empty() {
            return Ok(first);
        }
        // Safe texts have the others escaped only where Jinja2 knows that it escapes, and does not join beforehand.
        let joins = match (self.escaping, first.constant.min(constant)) {
            (Escaping { unknown: true, .. } | Escaping { on: false, .. }, _)
            | (_, Constant::Yes) => "__concat",
            (_, Constant::No) => "__concat_escaped",
            _ => {
                return self
                    .fail("~ of a choice of constants within {% autoescape %} is not taken");
            }
        };
        Ok(first.through_with(&format!("{joins}({})", others.join(", ")), constant))
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
            let constant = right.constant;
            left = match operator {
                "%" => left.through_with(&format!("__mod({})", right.text), constant),
                "*" => left.through_with(&format!("__times({})", right.text), constant),
                _ => {
                    let constant = left.constant.min(constant);
                    let right = right.within(Hold::Power);
                    let text = format!("{} {operator} {right}", left.within(Hold::Product));
                    Expression::new(text, Hold::Product, constant)
                }
            };
        }
    }

    fn power(&mut self) -> Parsed<Expression> {
        let mut links = 0;
        let mut left = self.unary(true)?;
        while self.skip("**") {
            self.link(&mut links)?;
            let right = self.unary(true)?;
            let constant = left.constant.min(right.constant);
            let right = right.within(Hold::Filter);
            let text = format!("{} ** {right}", left.within(Hold::Power));
            left = Expression::new(text, Hold::Power, constant);
        }
        Ok(left)
    }

    fn unary(&mut self, filters: bool) -> Parsed<Expression> {
        let from = self.at;
        let mut value = if self.skip("-") {
            self.deeper(|parser| parser.unary(false))?.through("__neg")
        } else if self.skip("+") {
            self.deeper(|parser| parser.unary(false))?.through("__pos")
        } else {
            self.primary()?
        };
        value = self.postfix(value, from)?;
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
        let mut constant = Constant::Yes;
        let text = match token {
            Token::Name(name) => {
                if KEYWORDS.contains(&name.as_str()) {
                    self.at -= 1;
                    return self.fail(&format!("{name:?} is no expression"));
                }
                if let Some(names) = &mut self.macro_names {
                    names.reads(&name);
                }
                if name == "self"
                    && let Some(scoped_block) = &mut self.scoped_block
                {
                    scoped_block.reads_self = true;
                }
                if !CONSTANTS.contains(&name.as_str()) {
                    constant = Constant::No;
                }
                match self.loops.last() {
                    Some(own) if name == "loop" => own.clone(),
                    _ => self.renamed(&name)?,
                }
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
                    true => tuple_of(Vec::new()),
                    false => self.tuple(true, &[])?,
                };
                self.expect(")")?;
                constant = inner.constant;
                inner.within(Hold::Primary)
            }
            Token::Operator("[") => {
                let items = self.items("]", &mut constant, |parser, constant| {
                    let item = parser.expression()?;
                    *constant = item.constant.min(*constant);
                    Ok(item.text)
                })?;
                return Ok(self.literal(format!("[{items}]"), constant));
            }
            Token::Operator("{") => {
                let items = self.items("}", &mut constant, |parser, constant| {
                    let key = parser.expression()?;
                    parser.expect(":")?;
                    let value = parser.expression()?;
                    *constant = key.constant.min(value.constant).min(*constant);
                    Ok(format!("{}: {}", key.text, value.text))
                })?;
                return Ok(self.literal(format!("{{{items}}}"), constant));
            }
            _ => {
                self.at -= 1;
                return self.fail("an expression is missing");
            }
        };
        Ok(Expression::new(text, Hold::Primary, constant))
    }

    /// A list or dict as it is written. minijinja has one of those that are constant, Python makes one each time.
    fn literal(&self, text: String, constant: Constant) -> Expression {
        let literal = Expression::new(text, Hold::Primary, constant);
        match self.asks_identity {
            true => literal.through("__fresh"),
            false => literal,
        }
    }

    /// Items with commas between them, up to a closing bracket.
    fn items(
        &mut self,
        close: &str,
        constant: &mut Constant,
        item: impl Fn(&mut Self, &mut Constant) -> Parsed<String>,
    ) -> Parsed<String> {
        let mut items = Vec::new();
        while !self.is(close) {
            if !items.is_empty() {
                self.expect(",")?;
            }
            if self.is(close) {
                break;
            }
            items.push(item(self, constant)?);
        }
        self.expect(close)?;
        Ok(items.join(", "))
    }

    /// Attributes, items and calls that follow an expression.
    /// It began at the word `from`.
    fn postfix(&mut self, mut value: Expression, from: usize) -> Parsed<Expression> {
        let mut links = 0;
        loop {
            if self.skip(".") {
                value = self.attribute(value)?;
            } else if self.skip("[") {
                value = self.deeper(|parser| parser.subscript(value, from))?;
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
        let constant = value.constant;
        let text = format!("{}.{name}", value.within(Hold::Primary));
        Ok(Expression::new(text, Hold::Primary, constant))
    }

    fn subscript(&mut self, value: Expression, from: usize) -> Parsed<Expression> {
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
            let constants = bounds.iter().flatten().map(|bound| bound.constant);
            let bounds_constant = constants.min().unwrap_or(Constant::Yes);
            let bounds = bounds
                .into_iter()
                .map(|bound| bound.map_or("none".into(), |b| b.text));
            slice = Some((bounds.collect::<Vec<_>>().join(", "), bounds_constant));
        }
        self.expect("]")?;
        match (slice, items.len()) {
            (Some((bounds, bounds_constant)), 0) => {
                let constant = self.words[from..self.at]
                    .iter()
                    .all(|(word, _)| match word {
                        Token::Name(name) => CONSTANTS.contains(&name.as_str()),
                        Token::Operator(operator) => !["|", "."].contains(operator),
                        _ => true,
                    });
                let slice = if constant {
                    "__slice_of_constant"
                } else {
                    "__slice"
                };
                Ok(value.through_with(&format!("{slice}({bounds})"), bounds_constant))
            }
            (Some(_), _) => self.fail("a slice beside other items"),
            (None, 0) => self.fail("an item is missing"),
            (None, count) => {
                let item = match items.pop() {
                    Some(item) if count == 1 => item,
                    last => tuple_of(items.into_iter().chain(last).collect()),
                };
                Ok(value.through_with(&format!("__item({})", item.text), item.constant))
            }
        }
    }

    fn call(&mut self, value: Expression) -> Parsed<Expression> {
        let arguments = self.deeper(Self::arguments)?;
        let is_loop = self.loops.last().is_some_and(|own| *own == value.text);
        let called = value.within(Hold::Primary);
        let mut text = format!("{called}({})", arguments.text());
        if is_loop {
            // As the loop's own text where it was declared, not as where it is called.
            text.push_str(self.made_safe());
        }
        Ok(Expression {
            text,
            hold: if is_loop { Hold::Filter } else { Hold::Primary },
            constant: Constant::No,
            call: Some((called, arguments)),
        })
    }

    fn arguments(&mut self) -> Parsed<Arguments> {
        let (mut plain, mut named) = (Vec::new(), Vec::new());
        let (mut star, mut stars) = (None, None);
        let mut constant = Constant::Yes;
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
            let mut argument = |parser: &mut Self| {
                let given = parser.expression()?;
                constant = given.constant.min(constant);
                Parsed::Ok(given)
            };
            if self.skip("*") && star.is_none() && stars.is_none() {
                star = Some(format!("*{}", argument(self)?.within(Hold::Primary)));
            } else if self.skip("**") && stars.is_none() {
                stars = Some(format!("**{}", argument(self)?.within(Hold::Primary)));
            } else if is_named && stars.is_none() {
                let name = self.name()?;
                self.expect("=")?;
                named.push(format!("{name}={}", argument(self)?.text));
            } else if star.is_none() && stars.is_none() && named.is_empty() {
                plain.push(argument(self)?.text);
            } else {
                return self.fail("the arguments of a call are in disorder");
            }
        }
        self.expect(")")?;
        plain.extend(star);
        plain.append(&mut named);
        let given = plain;
        Ok(Arguments {
            constant,
            given,
            stars,
        })
    }

    /// A chain of filters that begins here, without a value.
    fn filters(&mut self) -> Parsed<String> {
        let mut links = 0;
        let mut filters = vec![self.filter(Constant::No)?.0];
        while self.skip("|") {
            self.link(&mut links)?;
            filters.push(self.filter(Constant::No)?.0);
        }
        Ok(filters.join("|"))
    }

    /// A filter of a value that is a constant or not; returns also whether it gives one.
    fn filter(&mut self, value: Constant) -> Parsed<(String, Constant)> {
        let mut name = self.name()?;
        while self.skip(".") {
            name = format!("{name}.{}", self.name()?);
        }
        let (mut constant, mut arguments) = (value, String::new());
        if self.is("(") {
            let given = self.deeper(Self::arguments)?;
            constant = constant.min(given.constant);
            arguments = format!("({})", given.text());
        }
        if self.escaping.unknown || FILTERS_OF_CONTEXT.contains(&name.as_str()) {
            constant = Constant::No;
        }
        if self.escapes && ESCAPING_FILTERS.contains(&name.as_str()) {
            name =
                match (constant, self.escaping.on) {
                    (Constant::No, _) => name,
                    (Constant::Yes, true) => format!("__escaping_{name}"),
                    (Constant::Yes, false) => format!("__plain_{name}"),
                    _ => return self.fail(
                        "a filter of a choice of constants beside {% autoescape %} is not taken",
                    ),
                };
        }
        Ok((name + &arguments, constant))
    }

    /// Filters, tests and calls that follow an expression.
    fn filtered(&mut self, mut value: Expression) -> Parsed<Expression> {
        let mut links = 0;
        loop {
            if self.skip("|") {
                let (filter, constant) = self.filter(value.constant)?;
                value = value.through_with(&filter, constant);
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
        let (arguments, constant) = if self.is("(") {
            let given = self.deeper(Self::arguments)?;
            (given.text(), given.constant)
        } else if argument {
            let from = self.at;
            let argument = self.primary()?;
            let argument = self.deeper(|parser| parser.postfix(argument, from))?;
            (argument.text, argument.constant)
        } else {
            (String::new(), Constant::Yes)
        };
        let constant = match self.escaping.unknown {
            true => Constant::No,
            false => value.constant.min(constant),
        };
        let value = value.within(Hold::Filter);
        let text = format!("{value} is {negation}{name}({arguments})");
        Ok(Expression::new(text, Hold::Filter, constant))
    }
}

fn tuple_of(items: Vec<Expression>) -> Expression {
    let comma = if items.len() == 1 { "," } else { "" };
    let constants = items.iter().map(|item| item.constant);
    let constant = constants.min().unwrap_or(Constant::Yes);
    let items: Vec<String> = items.into_iter().map(|item| item.text).collect();
    let text = format!("({}{comma})", items.join(", "));
    Expression::new(text, Hold::Primary, constant)
}

/// A text in minijinja's notation, on one line.
fn quoted(text: &str) -> String {
    let text = text
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n");
    format!("\"{text}\"")
}
